"""Do the maps of a run belong to the model, and does the model use a place that a map names?

    python scripts/map_checks.py RUN --images 4                 # the sanity checks of Adebayo et al. 2018, arXiv:1810.03292
    python scripts/map_checks.py RUN --cover "malignant/malignant (11).png" 44 70 0 42 30

The first prints, for maps of saliency and roll-out after each change to the model, their rank correlation (Spearman) with the
maps of the model as it is and the share of the highest twentieth of the pixels that stays, least to most over the images. The
second covers a rectangle of an image, rows TOP to BOTTOM and columns LEFT to RIGHT of what the model sees, with what lies DOWN
rows further down (up, if negative), covers as much elsewhere for comparison, and prints the probabilities of all three.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from vitft_jax import cli, data, figures, look, predictor, runtime, saliency, tree
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.predictor import Predictor

Change = Callable[[str, Any], Any]
"""Takes the name and the value of a leaf."""


def shuffled(*parts: str) -> Change:
    """Shuffles the values of leaves whose names hold one of the parts."""
    rng = np.random.default_rng(0)

    def change(name: str, leaf: Any) -> Any:
        if not any(part in name for part in parts):
            return leaf
        values = np.asarray(leaf)
        return rng.permutation(values.ravel()).reshape(values.shape)

    return change


def without_adapters(name: str, leaf: Any) -> Any:
    """Low-rank adapters whose product is 0."""
    return leaf * 0 if name.startswith("lora") and name.endswith("/b") else leaf


def alike(a: np.ndarray, b: np.ndarray) -> tuple[str, str]:
    """Rank correlation, and share of the highest twentieth, of maps `(B, S, S)`; the least and the most of the images."""
    ranks, stays = [], []
    for x, y in zip(a.reshape(len(a), -1), b.reshape(len(b), -1), strict=True):
        count = max(1, x.size // 20)
        ranks.append(spearmanr(x, y).statistic)
        stays.append(len(set(np.argsort(-x)[:count]) & set(np.argsort(-y)[:count])) / count)
    return tuple(f"{min(values):.2f} to {max(values):.2f}" for values in (ranks, stays))


def checks(model: Predictor, pictures: np.ndarray) -> list[str]:
    """Lines of the table."""
    decided = model.probabilities(pictures).argmax(axis=1)

    def maps(change: Change, outputs: np.ndarray = decided, samples: int = saliency.SAMPLES) -> list[np.ndarray]:
        variables = tree.map_named(change, model.variables)
        sharp = saliency.saliency(model.program, variables, pictures, outputs, samples)
        rolled = look._rollout(variables, pictures, program=model.program)[:, model.program.model.prefix :]
        return [gaussian_filter(sharp, look._BLUR * model.program.model.patch, axes=(1, 2)), np.asarray(rolled)]

    def same(_: str, leaf: Any) -> Any:
        return leaf

    depth = model.program.model.depth
    last = [f"blocks_{i}/" for i in range(depth - 3, depth)]
    base = maps(same)
    changed = {
        "half the noisy copies": maps(same, samples=saliency.SAMPLES // 2),
        "the logit of another class": maps(same, (decided + 1) % len(model.classes)),
        "head shuffled": maps(shuffled("/head")),
        "no adapters": maps(without_adapters),
        "last three blocks shuffled": maps(shuffled(*last)),
        "all blocks shuffled": maps(shuffled("blocks_")),
    }
    head = ("change", "saliency", "highest twentieth", "roll-out", "highest twentieth")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in changed.items():
        cells = [cell for a, b in zip(base, found, strict=True) for cell in alike(a, b)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def covered(model: Predictor, picture: np.ndarray, box: tuple[int, int, int, int], down: int) -> list[str]:
    """Probabilities of a picture `(S, S, 3)` as it is, with a rectangle covered, and with one of the same size elsewhere."""
    top, bottom, left, right = box
    size = len(picture)
    if not (0 <= top < bottom <= size and 0 <= left < right <= size and top + down >= 0 and bottom + down <= size):
        raise InputError(
            f"--cover {top} {bottom} {left} {right} {down}: not within the {size} pixels that the model sees"
        )
    there, elsewhere = picture.copy(), picture.copy()
    there[top:bottom, left:right] = picture[top + down : bottom + down, left:right]
    other = slice(size // 2, size // 2 + right - left) if left < size // 2 else slice(0, right - left)
    elsewhere[top:bottom, other] = picture[top + down : bottom + down, other]
    p = model.probabilities(np.stack([picture, there, elsewhere]))
    told = [", ".join(f"{name} {value:.3f}" for name, value in zip(model.classes, row, strict=True)) for row in p]
    return [f"{what:<22}{text}" for what, text in zip(("as it is", "covered", "covered elsewhere"), told, strict=True)]


def main() -> None:
    """Command line."""
    runtime.start()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run", type=Path, help="a finished run, its images and its base weights")
    arguments.add_argument(
        "--images", type=int, default=4, help="of the test split, evenly spread (default: %(default)s)"
    )
    arguments.add_argument(
        "--cover", nargs=6, action="append", metavar=("NAME", "TOP", "BOTTOM", "LEFT", "RIGHT", "DOWN"), default=[]
    )
    options = arguments.parse_args()
    folder = Folder(options.run)
    config = folder.config()
    dataset, model = folder.dataset(config), predictor.load(options.run)
    for name, *numbers in options.cover:
        config.figures.names = (name,)
        (index,) = figures.chosen(config, dataset)
        top, bottom, left, right, down = map(int, numbers)
        print(name, *covered(model, _seen(dataset, model, index), (top, bottom, left, right), down), sep="\n")
    if not options.cover:
        config.figures.count = options.images
        pictures = np.stack([_seen(dataset, model, i) for i in figures.chosen(config, dataset)])
        print("\n".join(checks(model, pictures)))


def _seen(dataset: data.Dataset, model: Predictor, index: int) -> np.ndarray:
    return model.prepare(dataset.images[index])


if __name__ == "__main__":
    cli.main(main)
