"""Pictures of what a method does to images, in `figures/` of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from vitft_jax import data, processes, report, step, tree
from vitft_jax.config import Config
from vitft_jax.errors import InputError

_INCH = 2.2  # side of one image
_DIMMED = 0.3  # of the brightness of patches that do not take part
_TINT = np.array([110, 20, 20])  # and reddish, so that black shows it
_CAPTION = "Dark red: patches that take no part in the blocks that follow"


def chosen(config: Config, dataset: data.Dataset) -> np.ndarray:
    """Positions in the dataset of the images to draw: those named, or some of the test split.

    Raises:
        InputError: There is no image of such a name.
    """
    if config.figures.names:
        missing = [name for name in config.figures.names if name not in dataset.names]
        if missing:
            raise InputError(f"config key figures.names: no image {missing[0]!r} in the data")
        return np.array([dataset.names.index(name) for name in config.figures.names])
    test = dataset.indices("test")
    return test[np.linspace(0, len(test) - 1, min(config.figures.count, len(test))).round().astype(int)]


def draw(
    folder: Path, program: step.Program, trainable: Any, frozen: Any, dataset: data.Dataset, config: Config
) -> None:
    """Writes `figures/patches.png` into a folder, where the method has something to draw."""
    if program.method.patches is None or not (config.figures.count or config.figures.names):
        return
    indices = chosen(config, dataset)
    pictures = np.stack([data.resize(dataset.images[i], config.data.image_size, config.data.fit) for i in indices])
    masks = kept(tree.join(trainable, frozen), pictures, program)
    if processes.first():
        drawn = sheet(pictures, masks, [dataset.names[i] for i in indices])
        report.write_figure(folder / "figures" / "patches.png", drawn)


def kept(variables: tree.Tree, pictures: np.ndarray, program: step.Program) -> dict[int, np.ndarray]:
    """Which patches of pictures, uint8 `(B, S, S, 3)`, go on after a block: bool `(B, patches)` by block."""

    @jax.jit
    def run(variables: tree.Tree, pictures: jax.Array) -> Mapping[int, jax.Array]:
        images = step.normalise(program, pictures)
        return program.layout.whole(program.method.patches(program.model, variables, images))

    return jax.device_get(dict(run(variables, pictures)))


def sheet(pictures: np.ndarray, masks: Mapping[int, np.ndarray], titles: list[str]) -> Figure:
    """A row for each image: as it is, then with the patches dimmed that do not go on after a block, and the others outlined.

    Args:
        pictures: uint8 `(B, S, S, 3)`.
        masks: Block to bool `(B, patches)`, patches in rows of the image.
        titles: Of the images.
    """
    columns = 1 + len(masks)
    figure = Figure(figsize=(_INCH * columns, (_INCH + 0.4) * len(pictures) + 0.3), layout="constrained", dpi=110)
    figure.suptitle(_CAPTION, fontsize=8)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for i, picture in enumerate(pictures):
        axes[i, 0].imshow(picture)
        axes[i, 0].set_title(titles[i], fontsize=7, parse_math=False)  # a name may hold dollars
        for axis, (block, mask) in zip(axes[i, 1:], masks.items(), strict=True):
            axis.imshow(dim(picture, mask[i]))
            if 0 < mask[i].sum() < mask[i].size:  # without colours the outline tells dark tissue from what is dimmed
                axis.contour(_pixels(picture, mask[i]), [0.5], colors="white", linewidths=0.7)
            axis.set_title(f"after block {block}\n{mask[i].sum()} of {mask[i].size} patches go on", fontsize=7)
    for axis in axes.flat:
        axis.axis("off")
    return figure


def dim(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Dims the square patches of a picture `(S, S, 3)` where `mask` `(patches,)` is false."""
    whole = _pixels(picture, mask)[:, :, None]
    return np.where(whole, picture, _DIMMED * picture + _TINT * (1 - _DIMMED)).astype(np.uint8)


def _pixels(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask `(patches,)` of square patches, for each pixel of a picture `(S, S, 3)`."""
    side = round(mask.size**0.5)
    scale = picture.shape[0] // side
    return mask.reshape(side, side).repeat(scale, axis=0).repeat(scale, axis=1)
