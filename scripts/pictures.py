"""Draws the pictures of README.md and docs/ from a run on generated images, which anyone may have and pass on.

    python -m vitft_jax.train --config configs/lora.py --workdir runs/lora
    python scripts/pictures.py runs/lora

writes into docs/figures, each smaller than 150 kB: the run's report on a screen and on a telephone (needs Chromium), pairs of
duplicates that check_data finds, maps of look, and a sheet of predict. Which images are shown is told by their position, not
by eye.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitft_jax import check_data, look, predict, runtime
from vitft_jax import config as configs
from vitft_jax.data import Dataset
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.report import page, record

MOST = 150_000  # bytes
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=5000",
)  # fmt: skip
TELEPHONE = 390  # CSS pixels; no window of Chromium is that narrow, so the page stands in a frame


def screenshot(html: str, output: Path, width: int, height: int, dark: bool, folder: Path) -> None:
    """Writes the top of a page as a browser shows it, at twice as many pixels on a telephone.

    Raises:
        InputError: There is no Chromium.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        raise InputError(f"needs a browser, one of {', '.join(CHROMIUM)}")
    if width == TELEPHONE:
        frame = f"{json.dumps(html)}".replace("<", "\\u003c")
        html = (
            "<!DOCTYPE html><meta name='color-scheme' content='light dark'><style>* { margin: 0; border: 0 }</style>"
            f"<iframe width={width} height={height}></iframe><script>document.querySelector('iframe').srcdoc = {frame}</script>"
        )
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += [f"--window-size={max(width, 600)},{height + 200}", (folder / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(folder / "page.png") as image:
        small(image.crop((0, 0, width, height)), output)


def small(image: Image.Image, output: Path) -> None:
    """Writes a picture as a PNG of at most MOST bytes, of as many colours as that leaves it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for colours in (256, 128, 64, 32, 16):
        image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(output, optimize=True)
        if output.stat().st_size <= MOST:
            break
    print(
        f"{output}: {image.width} x {image.height}, {colours} colours, {output.stat().st_size / 1e3:.0f} kB", flush=True
    )


def images(dataset: Dataset, positions: Sequence[int], folder: Path) -> Path:
    """Images of a dataset as files, in a folder for each class."""
    for i in positions:
        path = folder / dataset.classes[dataset.labels[i]] / f"{dataset.names[i]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.images[i].save(path)
    return folder


def stacked(paths: Sequence[Path]) -> Image.Image:
    """Pictures of one width, one below the other."""
    parts = [Image.open(path).convert("RGB") for path in paths]
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def main() -> None:
    """Command line."""
    runtime.start()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run", type=Path, help="folder of a run on generated images, such as runs/lora")
    arguments.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (default: docs/figures)")
    options = arguments.parse_args()
    folder = Folder(options.run)
    dataset = folder.dataset(folder.config())
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        html = page.render(record.read(options.run), dataset)
        screenshot(html, options.output / "report.png", 1060, 1400, False, scratch)
        screenshot(html, options.output / "report_telephone.png", TELEPHONE, 1400, True, scratch)

        # Without a table nothing tells which images are of one patient, and views of one get into different splits.
        config = configs.default()
        config.data.path = str(images(dataset, np.flatnonzero(np.array(dataset.splits) != "train"), scratch / "all"))
        check_data.write(check_data.check(config), scratch)
        with Image.open(scratch / "duplicates.png") as sheet:
            small(sheet.crop((0, 0, sheet.width, sheet.height * 2 // 10)), options.output / "duplicates.png")

        test = dataset.indices("test")
        first = next(i for i in test if dataset.classes[dataset.labels[i]] == "malignant")
        look.look(options.run, output=scratch, overrides=[f"figures.names={dataset.names[first]}"])
        small(stacked([scratch / "attention.png", scratch / "saliency.png"]), options.output / "maps.png")

        few = images(dataset, test[np.linspace(0, len(test) - 1, 6).round().astype(int)], scratch / "few")
        predict.predict(options.run, few, scratch / "predictions.csv", scratch / "grid.png")
        small(Image.open(scratch / "grid.png"), options.output / "predictions.png")


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        raise SystemExit(f"error: {problem}") from None
