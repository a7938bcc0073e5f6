"""Draws the generated ultrasound images, and real ones beside them, to judge them by eye.

    python scripts/contact_sheet.py --output sheet.png [--beside FOLDER]

Rows of the generated sets: each class by each scanner, then a frame of many videos and the frames of one, with their
labels. FOLDER has one sub-folder of images per class.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vitft_jax.data import cases
from vitft_jax.data.anatomy import CLASSES
from vitft_jax.data.images import decode, find_images, resize
from vitft_jax.data.ultrasound import SIDE
from vitft_jax.errors import InputError

Row = tuple[str, list[tuple[str, Callable[[], np.ndarray]]]]


def generated(columns: int) -> list[Row]:
    """Title, and captions with images, of each row of the generated sets."""
    rows: list[Row] = []
    for config in ("source", "target"):
        found = cases.cases(config)
        for label, name in enumerate(CLASSES):
            first = [i for i, case in enumerate(found) if case.labels == (label,) and case.position == 0][:columns]
            rows.append((f"{config}\n{name}", [("", lambda c=config, i=i: cases.image(c, i)) for i in first]))
    found = cases.cases("video")
    middle = [i for i, case in enumerate(found) if case.position == cases.FRAMES // 2][:columns]
    changing = max(middle, key=lambda i: len({case.labels for case in found if case.group == found[i].group}))
    frames = [i for i, case in enumerate(found) if case.group == found[changing].group][:columns]
    for title, chosen in (("videos", middle), ("one video", frames)):
        rows.append((title, [(_words(found[i].labels), lambda i=i: cases.image("video", i)) for i in chosen]))
    return rows


def _words(labels: tuple[int, ...]) -> str:
    return "\n".join(name for name, value in zip(cases.LABELS, labels, strict=True) if value) or "none"


def real(folder: Path, columns: int) -> list[Row]:
    """As `generated`, of a folder with one sub-folder per class; the images are spread over each class."""
    rows: list[Row] = []
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if files := find_images(part):
            chosen = [files[i] for i in np.linspace(0, len(files) - 1, columns).astype(int)]
            rows.append(
                (f"real\n{part.name}", [("", lambda f=part / f: resize(decode(f), SIDE, "squash")) for f in chosen])
            )
    if not rows:
        raise InputError(f"{folder} has no sub-folders with images; give a folder with one sub-folder per class.")
    return rows


def draw(rows: list[Row], output: Path, columns: int) -> None:
    """Writes the sheet."""
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns + 0.6, 1.45 * len(rows)), squeeze=False)
    for line, (title, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(title, fontsize=8)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        for axis, (caption, image) in zip(line, images, strict=False):
            axis.imshow(image(), cmap="gray", vmin=0, vmax=255)
            axis.set_xlabel(caption, fontsize=6)
    figure.tight_layout(pad=0.3)
    figure.savefig(output, dpi=110)
    print(output)


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, required=True, help="PNG file to write")
    arguments.add_argument("--beside", type=Path, help="folder of real images, one sub-folder per class")
    arguments.add_argument("--columns", type=int, default=10)
    options = arguments.parse_args()
    try:
        rows = generated(options.columns) + (real(options.beside, options.columns) if options.beside else [])
    except (InputError, OSError) as error:
        arguments.error(str(error))
    draw(rows, options.output, options.columns)


if __name__ == "__main__":
    main()
