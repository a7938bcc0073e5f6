"""Looks inside a trained run: where attention gathers from, and to which pixels a decision is sensitive.

Writes, over some images: `attention.png`, attention roll-out; `saliency.png`, gradients of the highest logit; and for runs that
skip tokens `patches.png`, those that go on. The images are any others, or the run's own: those in ``figures.names``, or
``figures.count`` of the test split. Works on runs of every method, int8 ones too.

What such maps show and what not: docs/look.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from vitft_jax import captions, cli, figures, overlays, predictor, report, rollout, runtime, saliency, step, tree
from vitft_jax import config as configs
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.inputs import find
from vitft_jax.overlays import Overlay
from vitft_jax.predictor import Predictor

_ATTENTION = "Attention roll-out: from which patches attention gathers what the head reads. It explains no decision."
_SALIENCY = "Saliency: where the logit moves most, up or down, with the brightness. It explains no decision."
_THROUGH = " Gradients pass int8 rounding as if it were not there."
_BLUR = 0.25  # patches: the standard deviation of the Gaussian over saliency, which speckles from pixel to pixel


@dataclass(frozen=True)
class Shown:
    """The images to look at.

    Attributes:
        names: As the user knows them.
        pictures: What the model sees of them, uint8 `(n, S, S, 3)`.
        aspects: Height over width of what that shows.
        labels: True class `(n,)`, or 0/1 for each label `(n, C)`, or `inputs.UNKNOWN`; None: of no image.
    """

    names: tuple[str, ...]
    pictures: np.ndarray
    aspects: tuple[float, ...]
    labels: np.ndarray | None


def look(workdir: Path, images: Path | None = None, output: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Writes the figures.

    Args:
        workdir: The folder of a run with a checkpoint.
        images: A file, a folder or a table, see `inputs.find`; None: the run's own, which must be there then.
        output: The folder for the figures, which is made; None: `figures/` in the run, for its own images alone.
        overrides: Of ``figures.``.

    Raises:
        InputError: The run, the images or the output are at fault; nothing is written then.
    """
    if images is not None and output is None:
        raise InputError(f"--images {images}: give --output too; the figures of the run itself are of its own images")
    if images is not None and not images.exists():
        raise InputError(f"--images {images}: there is no such file or folder")
    folder = Folder(workdir)
    output = output or folder.figures
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; give a folder")
    config = folder.config()
    configs.override(config, overrides, only=("figures.",))
    if not (config.figures.count or config.figures.names):
        raise InputError("config key figures.count=0: no image to look at; at least 1")
    model = predictor.load(workdir)
    shown = _own(folder, config, model) if images is None else _others(images, config, model)
    size = min(model.batch_size, len(shown.pictures))
    p = model.probabilities(shown.pictures)
    rolled = _in_batches(size, partial(_rolled, model), shown.pictures)
    moves = _in_batches(size, partial(_moves, model), shown.pictures, p.argmax(axis=1))

    output.mkdir(parents=True, exist_ok=True)
    _write(output / "attention.png", model, shown, p, rolled, _ATTENTION)
    through = _THROUGH if "quant" in config.methods else ""
    _write(output / "saliency.png", model, shown, p, moves, _SALIENCY + through, of_highest=model.multilabel)
    if model.program.method.patches is not None:
        masks = figures.kept(model.variables, shown.pictures, model.program)
        report.write_figure(output / "patches.png", figures.sheet(shown.pictures, masks, list(shown.names)))
        print(output / "patches.png", flush=True)


def _own(folder: Folder, config: Config, model: Predictor) -> Shown:
    """Images of the run's data."""
    dataset = folder.dataset(config)
    indices = figures.chosen(config, dataset)
    names = tuple(dataset.names[i] for i in indices)
    return _shown(names, [dataset.images[i] for i in indices], dataset.labels[indices].astype(int), model)


def _others(images: Path, config: Config, model: Predictor) -> Shown:
    """Images of a file, a folder or a table: those of such names, or some, evenly spread."""
    inputs = find(images, model.classes, model.multilabel)
    names = [item.name for item in inputs.items]
    if config.figures.names:
        missing = [name for name in config.figures.names if name not in names]
        if missing:
            raise InputError(f"config key figures.names: no image {missing[0]!r} in {images}")
        indices = [names.index(name) for name in config.figures.names]
    else:
        count = min(config.figures.count, len(names))
        indices = np.linspace(0, len(names) - 1, count).round().astype(int)
    read = [inputs.items[i].read(model.max_side) for i in indices]
    labels = None if inputs.labels is None else inputs.labels[indices]
    return _shown(tuple(names[i] for i in indices), read, labels, model)


def _shown(names: tuple[str, ...], images: Sequence[Image.Image], labels: np.ndarray | None, model: Predictor) -> Shown:
    aspects = tuple(image.height / image.width if model.fit == "squash" else 1.0 for image in images)
    return Shown(names, np.stack([model.prepare(image) for image in images]), aspects, labels)


def _in_batches(size: int, function: partial[np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """`function` of all rows of arrays, `size` at a time; the last batch is filled up with its last row."""
    parts = []
    for start in range(0, len(arrays[0]), size):
        rows = np.minimum(np.arange(start, start + size), len(arrays[0]) - 1)
        parts.append(function(*(array[rows] for array in arrays)))
    return np.concatenate(parts)[: len(arrays[0])]


def _rolled(model: Predictor, pictures: np.ndarray) -> np.ndarray:
    """Roll-out over the patches, `(B, side, side)`."""
    shares = np.asarray(_rollout(model.variables, pictures, program=model.program))[:, model.program.model.prefix :]
    side = round(shares.shape[1] ** 0.5)
    return shares.reshape(-1, side, side)


@partial(jax.jit, static_argnames="program")
def _rollout(variables: tree.Tree, pictures: jax.Array, *, program: step.Program) -> jax.Array:
    return program.layout.whole(rollout.rollout(program.model, variables, step.normalise(program, pictures)))


def _moves(model: Predictor, pictures: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Saliency, blurred, `(B, S, S)`."""
    sharp = saliency.saliency(model.program, model.variables, pictures, outputs)
    return gaussian_filter(sharp, _BLUR * model.program.model.patch, axes=(1, 2))


def _write(
    path: Path, model: Predictor, shown: Shown, p: np.ndarray, values: np.ndarray, title: str, of_highest: bool = False
) -> None:
    drawn = []
    for i, picture in enumerate(shown.pictures):
        said, right = captions.said_and_true(model, p[i], None if shown.labels is None else shown.labels[i])
        lines = [shown.names[i], *said]
        if of_highest:
            lines.append(f"saliency of {model.classes[p[i].argmax()]} {p[i].max():.2f}")
        drawn.append(Overlay(picture, values[i], "\n".join(lines), shown.aspects[i], right))
    overlays.draw(path, drawn, title)
    print(path, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(
        __doc__, "python -m vitft_jax.look --workdir runs/lora --images scans/ --output maps --config.figures.count=4"
    )
    arguments.add_argument("--workdir", required=True, type=Path, help="the folder of a trained run")
    arguments.add_argument(
        "--images", type=Path, help="an image, a folder of images, or a CSV table (default: images of the run's data)"
    )
    arguments.add_argument("--output", type=Path, help="folder for the figures (default: figures/ in the run)")
    flags, overrides = cli.parse_with_overrides(arguments, argv, "--config.figures.count=4")
    look(flags.workdir, flags.images, flags.output, overrides)


if __name__ == "__main__":
    cli.main(main)
