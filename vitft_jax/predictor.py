"""A trained run or an export, ready for images that it has not seen: ``vitft_jax.load(RUN).predict(images)``.

Images go the way that they went in evaluation, through the same compiled step and in batches of the same shape, so what is
said of an image does not depend on who asks. The folder of the run and its base weights are enough; its data need not be there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from vitft_jax import config as configs
from vitft_jax import data, decision, exported, peft, run, step, tree
from vitft_jax.build import Built, build_for
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError, nearest
from vitft_jax.exported import About
from vitft_jax.folder import Folder
from vitft_jax.task import Task


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


@dataclass(frozen=True, eq=False)
class Predictor:
    """The best model of a run, or an exported one.

    Attributes:
        classes: Names of the columns of the probabilities.
        multilabel: Whether an image has several labels.
        decision: How logits are read: the temperature and thresholds.
        step: Of the checkpoint.
        image_size: Side of the model's input in pixels.
        fit: How an image becomes that square, see `data.resize`.
        batch_size: Images that the model sees at once.
        answer: Probabilities `(batch_size, C)` of inputs uint8 `(batch_size, S, S, 3)`.
        program: What computes; None where that is a compiled program.
        variables: Of its model; None likewise.
    """

    classes: tuple[str, ...]
    multilabel: bool
    decision: Decision
    step: int
    image_size: int
    fit: str
    batch_size: int
    answer: Callable[[np.ndarray], np.ndarray]
    program: step.Program | None = None
    variables: tree.Tree | None = None

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
        size = self.batch_size
        parts = [np.zeros((0, len(self.classes)))]
        for start in range(0, len(inputs), size):
            rows = inputs[start : start + size]
            batch = np.zeros((size, *inputs.shape[1:]), np.uint8)
            batch[: len(rows)] = rows
            parts.append(self.answer(batch)[: len(rows)])
        return np.concatenate(parts)

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
    """The best model of a run, from its folder and its base weights alone; or one that `vitft_jax.export` wrote.

    Of an adapter (format 'peft') the base weights must be where they were. An ONNX file is run by ONNX Runtime.

    Raises:
        InputError: As `run.best`; or an export is damaged, its base is another one now, or onnxruntime is missing.
    """
    if (workdir / exported.FILE).is_file() and not Folder(workdir).exists:
        about = exported.read(workdir)
        if about.format not in _OPENERS:
            raise InputError(
                f"{workdir / exported.FILE}: format {about.format!r} is unknown; {nearest(about.format, _OPENERS)}"
            )
        return _OPENERS[about.format](workdir, about)
    best = run.best(workdir)
    return of_model(best.config, best.built, best.trainable, best.task, decision.read(workdir), best.step)


def of_model(
    config: configs.Config, built: Built, trainable: tree.Tree, task: Task, how: Decision, at: int
) -> Predictor:
    """A model of ours; each new `config.train.batch_size` compiles anew."""
    program = built.program

    def answer(batch: np.ndarray) -> np.ndarray:
        logits = step.eval_step(trainable, built.frozen, program.layout.batch(batch), program=program)
        return how.probabilities(np.asarray(logits), task.multilabel)

    return Predictor(
        classes=task.classes,
        multilabel=task.multilabel,
        decision=how,
        step=at,
        image_size=config.data.image_size,
        fit=config.data.fit,
        batch_size=program.layout.rows(config.train.batch_size),
        answer=answer,
        program=program,
        variables=tree.join(trainable, built.frozen),
    )


def _whole(folder: Path, about: About) -> Predictor:
    """A whole model in the files of transformers or timm."""
    config, built, task = _built(_config(about, str(folder)), about)
    return of_model(config, built, built.trainable, task, about.decision, about.step)


def _adapter(folder: Path, about: About) -> Predictor:
    """An adapter, on the base that it was trained on."""
    source, revision = (about.base.get(key, "") for key in ("source", "revision"))
    adapter = peft.read(folder)
    config = _config(about, source, revision)
    config.methods, config.init_adapter = (adapter.method,), str(folder)
    config.adalora.target_r = 1  # of training; any that is no higher than the adapter's rank
    config, built, task = _built(config, about)
    if built.weights.sha256 != about.base.get("sha256"):
        raise InputError(
            f"{folder}: its base {source} has other weights than when it was exported; restore them, or load the run"
        )
    built, no_head = peft.insert(built, adapter, about.classes)
    if no_head:
        raise InputError(f"{folder}: without its head ({no_head}); export the run again")
    return of_model(config, built, built.trainable, task, about.decision, about.step)


def _config(about: About, source: str, revision: str = "") -> configs.Config:
    """A config of ours with such weights, for what an export says of itself."""
    config = configs.default()
    config.model.update(pretrained=source, revision=revision)
    config.data.update(image_size=about.image_size, fit=about.fit)
    return config


def _built(config: configs.Config, about: About) -> tuple[configs.Config, Built, Task]:
    """The program of such a config, with what its weights determine filled in."""
    config, weights = run.resolve(config)
    config, _ = peft.resolve(config, weights)
    task = Task(about.classes, about.multilabel, total_steps=1)
    return config, build_for(config, task, replace(weights, mean=about.mean, std=about.std)), task


def _program(folder: Path, about: About) -> Predictor:
    """A StableHLO module."""
    from jax import export

    module = _opened(folder / "model.jax", lambda file: export.deserialize(bytearray(file.read_bytes())))
    call = jax.jit(module.call)
    return _compiled(about, lambda batch: np.asarray(call(batch)))


def _graph(folder: Path, about: About) -> Predictor:
    """An ONNX graph."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise InputError(f"{folder}: ONNX files need ONNX Runtime: pip install onnxruntime") from None
    session = _opened(
        folder / "model.onnx",
        lambda file: onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]),
    )
    return _compiled(about, lambda batch: session.run(["probabilities"], {"images": batch})[0])


def _opened(file: Path, read: Callable[[Path], Any]) -> Any:
    if not file.is_file():
        raise InputError(f"{file}: is missing; export the run again")
    try:
        return read(file)
    except Exception as error:  # whatever a library makes of a damaged file
        raise InputError(f"{file}: cannot be read ({error}); export the run again") from error


def _compiled(about: About, answer: Callable[[np.ndarray], np.ndarray]) -> Predictor:
    return Predictor(
        classes=about.classes,
        multilabel=about.multilabel,
        decision=about.decision,
        step=about.step,
        image_size=about.image_size,
        fit=about.fit,
        batch_size=configs.default().train.batch_size,
        answer=answer,
    )


_OPENERS = {"hf": _whole, "timm": _whole, "peft": _adapter, "stablehlo": _program, "onnx": _graph}


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"
