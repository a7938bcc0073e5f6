"""Contact sheets: many images on one page, each with a caption."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vitft_jax import report
from vitft_jax.errors import InputError

MOST = 60  # tiles on a sheet; more would be too small to see or too tall to open
_INCH = 1.9  # side of a tile
_LONGEST = 30  # characters of a line of a caption
COLOURS = {True: "#1a7f37", False: "#b3261e", None: "black"}
"""Of a caption, by whether what it says is right; None: not known."""


@dataclass(frozen=True)
class Tile:
    """One place on a sheet.

    Attributes:
        image: Mode 'L' or 'RGB', or None for an image that cannot be read.
        caption: Lines of text below it.
        right: Colours the caption: green, red, or black for None.
    """

    image: Image.Image | None
    caption: str
    right: bool | None = None


def check_name(flag: str, path: Path | None) -> None:
    """Raises InputError unless a sheet can be written there; None is no sheet."""
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"{flag} {path}: sheets are PNG files; give a name that ends in .png")
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: there is no folder {path.absolute().parent}")


def spread(count: int) -> np.ndarray:
    """Positions of the tiles to show of `count`: all, or MOST evenly spread."""
    return np.linspace(0, count - 1, min(count, MOST)).round().astype(int)


def draw(path: Path, tiles: Sequence[Tile], title: str, columns: int = 8) -> None:
    """Writes a PNG, whole or not at all: tiles in rows from the left, `columns` of them a row."""
    columns = max(1, min(columns, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    captions = ["\n".join(map(_fitted, tile.caption.split("\n"))) for tile in tiles]
    below = 0.14 * max((caption.count("\n") + 1 for caption in captions), default=1) + 0.1
    size = (max(_INCH * columns, 4.0), (_INCH + below) * rows + 0.35)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=9)
    for axis in figure.subplots(rows, columns, squeeze=False).flat[len(tiles) :]:
        axis.axis("off")
    for axis, tile, caption in zip(figure.axes, tiles, captions, strict=False):
        if tile.image is not None:
            axis.imshow(_small(tile.image), cmap="gray", vmin=0, vmax=255)
        else:
            axis.set_box_aspect(1)
            axis.text(0.5, 0.5, "cannot be read", ha="center", va="center", fontsize=8, transform=axis.transAxes)
        axis.set(xticks=[], yticks=[], anchor="N")
        axis.set_xlabel(caption, fontsize=6.5, color=COLOURS[tile.right], parse_math=False)
        for spine in axis.spines.values():
            spine.set(color=COLOURS[tile.right], linewidth=0.5 if tile.right is None else 1.5)
    report.write_figure(path, figure)


def _small(image: Image.Image) -> np.ndarray:
    image = image.copy()
    image.thumbnail((256, 256))
    return np.asarray(image)


def _fitted(line: str) -> str:
    """A line as narrow as a tile: a path by its end, which tells more than its beginning; other text in several lines."""
    if "/" in line:
        return line if len(line) <= _LONGEST else f"...{line[3 - _LONGEST :]}"
    return textwrap.fill(line, _LONGEST)
