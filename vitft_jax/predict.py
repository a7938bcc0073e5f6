"""Predicts images with a trained run: a file, a folder (recursively), or a table with a column `path`.

Writes a CSV with the decision and the probability of each class for every image, and if wanted contact sheets. Where true
labels are known (sub-folders with the names of classes, or the table's `label` or label columns) it also says how many were
right. The run's folder and its base weights are enough. DICOM files are read where pydicom is installed; each of their frames
is an image.

An image that cannot be read is named and left out, and the exit code is 3; it is 2 if nothing was written.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vitft_jax import captions, cli, predictor, report, runtime, sheets
from vitft_jax.errors import InputError
from vitft_jax.inputs import UNKNOWN, Inputs, Item, find
from vitft_jax.predictor import Predictor

SOME_FAILED = 3  # exit code
_THREADS = 4  # that read images while the model runs; Pillow releases the GIL
_NAMED = 20  # images that cannot be read, on the screen


def predict(
    workdir: Path, images: Path, output: Path, grid: Path | None = None, mistakes: Path | None = None
) -> list[str]:
    """Predicts images and writes the table and the sheets; returns a message for each image that cannot be read.

    Raises:
        InputError: The run, the images or an output are at fault, or no image can be read; nothing is written then.
    """
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise InputError(f"--output {output}: no file can be made there; give a file in a folder that exists")
    sheets.check_name("--grid", grid)
    sheets.check_name("--mistakes", mistakes)
    if not images.exists():
        raise InputError(f"--images {images}: there is no such file or folder")
    model = predictor.load(workdir)
    inputs = find(images, model.classes, model.multilabel)
    _check_outputs({"--output": output, "--grid": grid, "--mistakes": mistakes}, images, inputs)
    if mistakes is not None and (inputs.labels is None or not _known(inputs.labels).any()):
        raise InputError(
            f"--mistakes {mistakes}: no true labels are known; give a table with them, or a sub-folder for each class"
        )
    started = time.perf_counter()
    read, p, failed = _run(model, inputs)
    seconds = time.perf_counter() - started
    if not len(read):
        raise InputError(f"--images {images}: none of {len(inputs.items)} images can be read, such as: {failed[0]}")
    inputs = Inputs(
        tuple(inputs.items[i] for i in read), None if inputs.labels is None else inputs.labels[read]
    )  # the others are told below
    names = [item.name for item in inputs.items]
    report.write_text(output, report.predictions_table(names, model.classes, model.decide(p), p, inputs.labels))
    print(f"{output}: {len(read)} images in {seconds:.1f} s, {_counts(model, p)}", flush=True)
    if inputs.labels is not None and _known(inputs.labels).any():
        known = _known(inputs.labels)
        right = _right(model, inputs.labels, p)[known]
        what = "have all labels right" if model.multilabel else "are right"
        print(f"{right.sum()} of {len(right)} images with a true label {what}", flush=True)
    if grid is not None:
        shown = sheets.spread(len(read))
        _sheet(grid, model, inputs, p, shown, f"{len(shown)} of {len(read)} images")
    if mistakes is not None:
        wrong = _mistakes(model, inputs.labels, p)
        title = f"{len(wrong)} mistakes in {_known(inputs.labels).sum()} images, those furthest off first"
        _sheet(mistakes, model, inputs, p, wrong[: sheets.MOST], title)
    return failed


def _check_outputs(outputs: Mapping[str, Path | None], images: Path, inputs: Inputs) -> None:
    """Raises InputError if an output would be written over what is read, or over another output."""
    taken = {images.resolve(): "--images", **{item.path.resolve(): "an image to predict" for item in inputs.items}}
    for flag, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise InputError(f"{flag} {path}: is {taken[path.resolve()]}; give another file, so that nothing is lost")
        taken[path.resolve()] = flag


def _run(model: Predictor, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Positions of the images that could be read, their probabilities, and messages about the others."""
    read, parts, failed, batch = [], [], [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        for i, picture in enumerate(_ahead(pool, model, inputs)):
            if isinstance(picture, str):
                failed.append(picture)
                continue
            read.append(i)
            batch.append(picture)
            if len(batch) == model.batch_size:
                parts.append(model.probabilities(np.stack(batch)))
                batch = []
    if batch:
        parts.append(model.probabilities(np.stack(batch)))
    return np.array(read, int), np.concatenate(parts or [np.zeros((0, len(model.classes)))]), failed


def _ahead(pool: ThreadPoolExecutor, model: Predictor, inputs: Inputs) -> Iterator[np.ndarray | str]:
    """Inputs of the model in order, or why there is none; a batch is read ahead, however many images there are."""

    def prepared(i: int) -> np.ndarray | str:
        try:
            return model.prepare(inputs.items[i].read(model.max_side))
        except InputError as error:
            return str(error)

    count, window = len(inputs.items), model.batch_size + _THREADS
    running = deque(pool.submit(prepared, i) for i in range(min(window, count)))
    for i in range(count):
        picture = running.popleft().result()
        if i + window < count:
            running.append(pool.submit(prepared, i + window))
        yield picture


def _known(labels: np.ndarray) -> np.ndarray:
    """Which images have their true label, or all of them, `(n,)`."""
    return (labels != UNKNOWN) if labels.ndim == 1 else (labels != UNKNOWN).all(axis=1)


def _right(model: Predictor, labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    same = labels == model.decide(p)
    return same if same.ndim == 1 else same.all(axis=1)


def _mistakes(model: Predictor, labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Positions of the mistakes, those first where the least probability was left for the truth."""
    truth = labels if model.multilabel else np.eye(p.shape[1])[labels]
    wrong = np.flatnonzero(_known(labels) & ~_right(model, labels, p))
    return wrong[np.argsort(-np.abs(p - truth).max(axis=1)[wrong], kind="stable")]


def _counts(model: Predictor, p: np.ndarray) -> str:
    decided = model.decide(p)
    counts = decided.sum(axis=0) if model.multilabel else np.bincount(decided, minlength=len(model.classes))
    return ", ".join(f"{name} {count}" for name, count in zip(model.classes, counts, strict=True))


def _sheet(path: Path, model: Predictor, inputs: Inputs, p: np.ndarray, shown: Sequence[int], title: str) -> None:
    tiles = []
    for i in shown:
        said, right = captions.said_and_true(model, p[i], None if inputs.labels is None else inputs.labels[i])
        caption = "\n".join([inputs.items[i].name, *said])
        tiles.append(sheets.Tile(_picture(model, inputs.items[i]), caption, right))
    sheets.draw(path, tiles, title)
    print(f"{path}: {title}", flush=True)


def _picture(model: Predictor, item: Item) -> Image.Image | None:
    """The image once more; None if it went away since it was predicted."""
    try:
        return item.read(model.max_side)
    except InputError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    example = "python -m vitft_jax.predict --workdir runs/lora --images scans/ --output predictions.csv --grid grid.png"
    arguments = cli.parser(__doc__, example)
    arguments.add_argument("--workdir", required=True, type=Path, help="the folder of a trained run")
    arguments.add_argument("--images", required=True, type=Path, help="an image, a folder of images, or a CSV table")
    arguments.add_argument("--output", required=True, type=Path, help="the CSV file to write")
    arguments.add_argument(
        "--grid", type=Path, help=f"PNG to write: the images, {sheets.MOST} at most, with what is said of them"
    )
    arguments.add_argument("--mistakes", type=Path, help="PNG to write: those of which the wrong thing is said")
    flags = arguments.parse_args(argv)
    failed = predict(flags.workdir, flags.images, flags.output, flags.grid, flags.mistakes)
    for message in failed[:_NAMED]:
        print(f"left out: {message}", file=sys.stderr)
    if failed:
        more = f", {len(failed) - _NAMED} of them not named here" if len(failed) > _NAMED else ""
        print(f"error: {len(failed)} images could not be read{more}; the others are in {flags.output}", file=sys.stderr)
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    cli.main(main)
