"""Calibration: what the linear layers of the float model see on training images, without augmentation."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vitft_jax import data, tree
from vitft_jax.build import Built
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.ptq import observe
from vitft_jax.ptq.observe import Seen
from vitft_jax.step import Program, normalise

IMAGES = 128  # drawn by the seed of the run
FEWEST = 16


def plain(program: Program) -> Program:
    """The program of the float model: no method in its products or its attention."""
    return replace(program, model=program.model.clone(dot_general_cls=None, attend=None))


def subset(dataset: data.Dataset, count: int, seed: int) -> data.Dataset:
    """The dataset with `count` images of its training split, drawn by the seed, or all if there are fewer."""
    train = dataset.indices("train")
    chosen = set(np.random.default_rng(seed).permutation(train)[:count].tolist())
    return replace(dataset, splits=tuple("train" if i in chosen else "" for i in range(len(dataset))))


def images_from(path: str, dataset: data.Dataset, config: Config) -> data.Dataset:
    """Other images than the run's, with the same classes.

    Args:
        path: A CSV table, or what ``data.path`` can be: a folder with one sub-folder per class, an .npz file, a prepared
            TFDS dataset. Its own splits hold, or those that the config makes.
        dataset: Of the run.
        config: Of the run.

    Raises:
        InputError: There is no such data, an image cannot be read, or the classes are others.
    """
    place = Path(path).expanduser()
    table = place.name if place.suffix == ".csv" else ""
    named = dataset.multilabel or (place.suffix == ".npz" and config.data.labels)  # other sources know their classes
    settings = config.data.copy_and_resolve_references()
    settings.update(source="", path=str(place.parent if table else place), table=table, name="")
    settings.labels = dataset.classes if named else ()
    try:
        found = data.load(settings, config.seed, classes=dataset.classes)
        found.images.check()
    except InputError as error:
        raise InputError(f"--calibration {path}: {error}") from None
    return found


def see(program: Program, params: tree.Tree, dataset: data.Dataset, config: Config) -> dict[str, Seen]:
    """What each linear layer of a `plain` program sees on the training split of `dataset`, by path.

    Raises:
        InputError: There are too few images, or a layer sees a value that is not finite.
    """
    count = len(dataset.indices("train"))
    if count < FEWEST:
        raise InputError(f"{count} calibration images in the training split: at least {FEWEST} are needed")
    return observe.observe(program.model, params, _normalised(program, dataset, config), count)


def calibrated(built: Built, dataset: data.Dataset, config: Config) -> Built:
    """The variables before step 0 with the ranges that the method asks for; the same where it asks for none.

    Raises:
        InputError: As `see`.
    """
    method = built.program.method
    if not method.ranges:
        return built
    layout = built.program.layout
    params = layout.gathered(method.merge(tree.join(built.trainable, built.frozen))["params"])
    seen = see(plain(built.program), params, subset(dataset, IMAGES, config.seed), config)
    return replace(built, trainable=layout.put(method.calibrate(built.trainable, seen)))


def _normalised(program: Program, dataset: data.Dataset, config: Config) -> Iterator[np.ndarray]:
    """Images of the training split as the model takes them, `(b, S, S, 3)`: on the host, so on whatever devices."""
    batches = data.eval_batches(
        dataset,
        "train",
        batch_size=config.train.batch_size,
        image_size=config.data.image_size,
        fit=config.data.fit,
        workers=config.data.workers,
    )
    for batch in batches:
        yield np.asarray(normalise(program, jnp.asarray(batch["image"][batch["mask"] > 0])))
