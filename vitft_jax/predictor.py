"""A trained run, ready for images that it has not seen: ``vitft_jax.load(RUN).predict(images)``.

Images go the way that they went in evaluation, through the same compiled step and in batches of the same shape, so what is
said of an image does not depend on who asks. The folder of the run and its base weights are enough; its data need not be there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vitft_jax import config as configs
from vitft_jax import data, decision, exported, run, step, tree
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError


@dataclass(frozen=True)
class Prediction:
    """What a model says about n images.

    Attributes:
        probabilities: float64 `(n, C)`; of several labels each by itself, else they sum to 1.
        decisions: int32: the class `(n,)`, or 0/1 for each label `(n, C)`.
        labels: Names of what was decided, a tuple for each image: one class, or any number of labels.
    """

    probabilities: np.ndarray
    decisions: np.ndarray
    labels: tuple[tuple[str, ...], ...]


class Predictor:
    """The best model of a run.

    Attributes:
        classes: Names of the columns of the probabilities.
        multilabel: Whether an image has several labels.
        program: What computes.
        variables: Of its model.
        decision: How logits are read: the temperature and thresholds of the run.
        image_size: Side of the model's input in pixels.
        fit: How an image becomes that square, see `data.resize`.
        batch_size: Images that the model sees at once; each new value compiles anew.
        step: Of the checkpoint.
    """

    def __init__(self, config: Any, built: run.Built, trainable: Any, task: run.Task, how: Decision, at: int) -> None:
        """Takes what `load` read."""
        self._built, self._trainable = built, trainable
        self.fit = config.data.fit
        self.classes, self.multilabel = task.classes, task.multilabel
        self.decision, self.step = how, at
        self.image_size = config.data.image_size
        self.batch_size = built.program.layout.rows(config.train.batch_size)

    @property
    def program(self) -> step.Program:
        """See the attributes."""
        return self._built.program

    @property
    def variables(self) -> tree.Tree:
        """See the attributes."""
        return tree.join(self._trainable, self._built.frozen)

    @property
    def max_side(self) -> int:
        """The `max_side` with which `data.decode` reads a file for this model."""
        return data.side_to_keep(self.image_size)

    def prepare(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """The model's input, uint8 `(S, S, 3)`, of an image of any size.

        Args:
            image: uint8 `(H, W)`, `(H, W, 3)` or, with an alpha channel, `(H, W, 4)`; or a PIL image of any mode.

        Raises:
            InputError: It is no such array.
        """
        if not isinstance(image, Image.Image):
            grey = isinstance(image, np.ndarray) and image.ndim == 2
            colour = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] in (3, 4)
            if not (grey or colour) or image.dtype != np.uint8 or not image.size:
                raise InputError(
                    f"{_describe(image)} is no image: give uint8 of shape (H, W), (H, W, 3) or (H, W, 4), or a PIL image"
                )
            image = Image.fromarray(image)
        image = data.to_8_bit(ImageOps.exif_transpose(image), self.max_side)
        return data.resize(image, self.image_size, self.fit)

    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of model inputs uint8 `(n, S, S, 3)`; the last batch is filled up with black."""
        size, frozen = self.batch_size, self._built.frozen
        logits = [np.zeros((0, len(self.classes)), np.float32)]
        for start in range(0, len(inputs), size):
            rows = inputs[start : start + size]
            batch = np.zeros((size, *inputs.shape[1:]), np.uint8)
            batch[: len(rows)] = rows
            said = step.eval_step(self._trainable, frozen, self.program.layout.batch(batch), program=self.program)
            logits.append(np.asarray(said)[: len(rows)])
        return self.decision.probabilities(np.concatenate(logits), self.multilabel)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Decisions of probabilities `(n, C)`, as in `Prediction`."""
        return self.decision.decide(probabilities, self.multilabel)

    def names(self, decisions: np.ndarray) -> tuple[tuple[str, ...], ...]:
        """Names of decisions: one class an image, or any number of labels."""
        rows = decisions if self.multilabel else np.eye(len(self.classes), dtype=np.int32)[decisions]
        return tuple(tuple(name for name, on in zip(self.classes, row, strict=True) if on) for row in rows)

    def predict(self, images: Iterable[np.ndarray | Image.Image]) -> Prediction:
        """What the model says about images of any sizes.

        Args:
            images: As `prepare` takes them, any number; or one array `(n, H, W, 3)`.

        Raises:
            InputError: Something is no image; names its position.
        """
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise InputError(f"{_describe(images)} is no sequence of images: put one image into a list")
        inputs = self._inputs(images)
        parts = [np.zeros((0, len(self.classes)))]
        while batch := list(islice(inputs, self.batch_size)):
            parts.append(self.probabilities(np.stack(batch)))
        p = np.concatenate(parts)
        decisions = self.decide(p)
        return Prediction(p, decisions, self.names(decisions))

    def _inputs(self, images: Iterable[np.ndarray | Image.Image]) -> Iterator[np.ndarray]:
        for i, image in enumerate(images):
            try:
                yield self.prepare(image)
            except InputError as error:
                raise InputError(f"image {i}: {error}") from error


def load(workdir: Path) -> Predictor:
    """The best model of a run, from its folder and its base weights alone; or one that was exported for transformers or timm.

    Raises:
        InputError: As `run.best`; or another export is there.
    """
    if (workdir / exported.FILE).is_file() and not run.Folder(workdir).exists:
        return _load_exported(workdir)
    best = run.best(workdir)
    return Predictor(best.config, best.built, best.trainable, best.task, decision.read(workdir), best.step)


def _load_exported(folder: Path) -> Predictor:
    about = exported.read(folder)
    if about.format not in exported.WHOLE_MODELS:
        raise InputError(
            f"{folder}: is an export in the format {about.format!r}, which other programs read; give the run, or an export "
            f"in the format {' or '.join(exported.WHOLE_MODELS)}"
        )
    config = configs.default()
    config.model.pretrained = str(folder)
    config.data.update(image_size=about.image_size, fit=about.fit)
    config, source = run.resolve(config)
    task = run.Task(about.classes, about.multilabel, total_steps=1)
    built = run.build_for(config, task, replace(source, mean=about.mean, std=about.std))
    return Predictor(config, built, built.trainable, task, about.decision, about.step)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"
