"""A run: the folder that holds it, and the program and variables that a config stands for.

A run folder holds `config.json` (resolved), `run.json` (what came from outside: weights, classes), `split.csv` (which image
is in which split), `metrics.jsonl`, `summary.json`, `predictions_<split>.csv` and `checkpoints/`; also `figures/` where there
is something to draw, and `evaluations/` where the run was evaluated under other settings.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitft_jax import config as configs
from vitft_jax import data, lock, methods, optim, pretrained, report, tree
from vitft_jax.errors import InputError, nearest
from vitft_jax.step import Program
from vitft_jax.vit import VARIANTS, ViT

ARCHITECTURE = (
    "patch", "width", "depth", "heads", "hidden", "distilled", "dist_head", "layer_scale", "features", "eps"
)  # fmt: skip
"""Arguments of `ViT` that say what the model is."""


@dataclass(frozen=True)
class Weights:
    """Where the base weights came from."""

    source: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class Built:
    """A program with its variables before step 0.

    `phases` stand in for the program early in training, each until a step. Of a run whose checkpoint holds the whole model,
    `trainable` is None (restore it), `frozen` is empty, and `whole` says what the model is.
    """

    program: Program
    trainable: dict[str, Any] | None
    frozen: dict[str, Any]
    weights: Weights
    total_steps: int
    phases: tuple[tuple[int, Program], ...] = ()
    whole: dict[str, Any] | None = None

    def program_at(self, step: int) -> Program:
        """The program that trains at a step."""
        return next((program for end, program in self.phases if step < end), self.program)

    @property
    def parameters(self) -> dict[str, float]:
        """Numbers of parameters; adapters count in the total."""
        ranges = sum(tree.count(self.trainable.get(name, {})) for name in self.program.method.ranges)
        trainable, frozen = tree.count(self.trainable) - ranges, tree.count(self.frozen) + ranges
        total = trainable + frozen
        return {"total": total, "trainable": trainable, "trainable_percent": 100 * trainable / total}


def total_steps(config: configs.Config, dataset: data.Dataset) -> int:
    """Optimiser steps of a run."""
    return config.train.steps or math.ceil(config.train.epochs * data.steps_per_epoch(dataset, config.train.batch_size))


def whole_model(program: Program, weights: Weights) -> dict[str, Any]:
    """What `run.json` says of a run whose checkpoint holds the whole model, so that it needs no other weights."""
    return {
        "weights": asdict(weights),
        "model": {name: getattr(program.model, name) for name in ARCHITECTURE},
        "mean": list(program.mean),
        "std": list(program.std),
    }


def resolve(
    config: configs.Config, whole: dict[str, Any] | None = None
) -> tuple[configs.Config, pretrained.Pretrained | None]:
    """Reads the base weights; returns the config with what they determine filled in, and the weights.

    Args:
        config: Of the run.
        whole: Of a run whose checkpoint holds the whole model, `Folder.whole`: no weights are read then.

    Raises:
        InputError: The weights cannot be read.
    """
    source = None
    if config.model.pretrained and whole is None:
        source = pretrained.load(config.model.pretrained, config.model.revision, config.model.name)
    config = configs.absolute(config)
    config.data.image_size = config.data.image_size or (source.image_size if source else 224)
    return config, source


def build(
    config: configs.Config,
    dataset: data.Dataset,
    source: pretrained.Pretrained | None,
    whole: dict[str, Any] | None = None,
) -> Built:
    """Builds the model and its optimiser, from what `resolve` returned; `whole` as there.

    Raises:
        InputError: The weights do not fit, a method refuses its settings, or nothing trains.
    """
    mean = std = (0.5, 0.5, 0.5)
    if whole is not None:
        architecture, mean, std = dict(whole["model"]), tuple(whole["mean"]), tuple(whole["std"])
    elif source is not None:
        architecture, mean, std = dict(source.model), source.mean, source.std
    elif config.model.name in VARIANTS:
        architecture = dict(VARIANTS[config.model.name])
    else:
        raise InputError(
            f"config key model.name={config.model.name!r}; {nearest(config.model.name, VARIANTS)} "
            "(or give model.pretrained)"
        )
    if config.model.features:
        architecture["features"] = config.model.features
    size = config.data.image_size
    if size % architecture["patch"]:
        raise InputError(f"config key data.image_size={size}: not a multiple of the patch size {architecture['patch']}")

    method = methods.load(config)
    model = ViT(
        **architecture,
        classes=len(dataset.classes),
        dtype=jnp.dtype(config.dtype),
        dot_general_cls=method.dot_general_cls,
        attend=method.attend,
        select=method.select,
    )
    method.check(model, (size // model.patch) ** 2)
    steps_in_all = total_steps(config, dataset)
    program = Program(
        model=model,
        method=method,
        tx=optim.optimizer(config, method, steps_in_all),
        mean=mean,
        std=std,
        multilabel=dataset.multilabel,
        class_weights=class_weights(dataset) if config.train.class_weights else (),
        label_smoothing=config.train.label_smoothing,
        accumulate=config.train.accumulate,
        seed=config.seed,
    )
    if whole is not None:
        return Built(program, None, {}, Weights(**whole["weights"]), steps_in_all, whole=whole)
    # On the device once: numpy arrays would be copied there at every step.
    initial = _initial(model, config, source, method, () if dataset.multilabel else dataset.classes)
    variables = jax.device_put(method.prepare(initial))
    trains = _trains(config, method)
    trainable, frozen = tree.split(variables, trains)
    if "params" not in trainable:
        raise InputError(
            f"config key train.trainable={config.train.trainable!r} matches no parameter: nothing to train"
        )
    weights = Weights(source.source, source.revision, source.sha256) if source else Weights("random", "", "")
    phases = tuple(
        (end, replace(program, model=model.clone(select=select))) for end, select in method.phases(steps_in_all)
    )
    return Built(program, trainable, frozen, weights, steps_in_all, phases)


def _initial(
    model: ViT,
    config: configs.Config,
    source: pretrained.Pretrained | None,
    method: methods.Method,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Variables of the model: pretrained where there is something pretrained, fresh elsewhere."""
    key, images = jax.random.key(config.seed), jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    shapes = dict(jax.eval_shape(model.init, key, images))
    for collection in method.collections:
        if collection not in shapes:
            layers = [n.removesuffix("/kernel") for n in tree.flatten(shapes["params"]) if n.endswith("/kernel")]
            raise InputError(
                f"{collection}.targets matches no linear layer of the model; layers are {', '.join(sorted(layers))}"
            )
    known = {} if source is None else tree.flatten({"params": pretrained.fit(source, shapes["params"], classes)})
    known = {name: leaf for name, leaf in known.items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
    # Only what is missing is drawn: to compile the draws of a whole model takes seconds.
    fresh = tree.flatten(jax.jit(lambda key: tree.split(model.init(key, images), lambda n: n not in known)[0])(key))
    return tree.unflatten({name: known[name] if name in known else fresh[name] for name in tree.flatten(shapes)})


def _trains(config: configs.Config, method: methods.Method) -> Callable[[str], bool]:
    try:
        chosen = re.compile(config.train.trainable)
    except re.error as error:
        raise InputError(f"config key train.trainable={config.train.trainable!r}: no regex: {error}") from None

    def trains(name: str) -> bool:
        collection, _, rest = name.partition("/")
        return collection in (*method.collections, *method.ranges) or (
            collection == "params" and bool(chosen.search(rest))
        )

    return trains


def class_weights(dataset: data.Dataset) -> tuple[float, ...]:
    """Loss weights from the training split.

    Classes are weighed by n / (C n_c), so the mean over the training images is 1; the positives of a label by
    negatives / positives.
    """
    labels = dataset.labels[dataset.indices("train")]
    if dataset.multilabel:
        positives = labels.sum(axis=0)
        return tuple(((len(labels) - positives) / positives).tolist())
    counts = np.bincount(labels, minlength=len(dataset.classes))
    return tuple((len(labels) / (len(counts) * counts)).tolist())


_FIRST = {lock.FILE, "config.json", "config.json.part", "split.csv", "run.json.part"}
"""What a command that was killed may leave in a folder before there is a run."""


def _read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it from a copy") from error
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise InputError(f"{path}: no object with {', '.join(keys)}; restore it from a copy")
    return content


class Folder:
    """A run folder."""

    def __init__(self, path: Path) -> None:
        """Names the files in `path`; raises InputError if Orbax could not keep checkpoints there."""
        if pattern := set("*?[") & set(str(path.absolute())):
            raise InputError(
                f"run folder {path.absolute()}: checkpoints cannot lie below a name with {min(pattern)!r}, which Orbax takes "
                "for a pattern; choose another"
            )
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.figures = path / "figures"

    @property
    def exists(self) -> bool:
        """Whether there is a run in the folder."""
        return (self.path / "run.json").is_file()  # written last, so config.json and split.csv are whole

    def check(self, config: configs.Config) -> None:
        """Refuses a folder that holds something else than this run.

        Raises:
            InputError: It holds a run with another config, or files that are no run.
        """
        if self.exists:
            if other := configs.differences(self.config(), config):
                raise InputError(
                    f"--workdir {self.path} holds another run; it differs in {'; '.join(other[:5])}. "
                    "Choose another --workdir, or delete this one"
                )
        elif {path.name for path in self.path.glob("*")} - _FIRST:
            raise InputError(f"--workdir {self.path}: has files in it that are no run; choose an empty or new folder")

    def open(self, config: configs.Config, dataset: data.Dataset, built: Built) -> None:
        """Creates the run, or makes sure that its weights and classes are still what they were.

        Raises:
            InputError: They are not.
        """
        now = {"weights": asdict(built.weights), "classes": list(dataset.classes), "multilabel": dataset.multilabel}
        now |= built.whole or {}
        if self.exists:
            for key, then in self.resolved().items():
                if then != now[key]:
                    raise InputError(
                        f"--workdir {self.path}: its {key} were {then} when it was started and are {now[key]} now. "
                        "Restore them, or choose another --workdir"
                    )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        report.write_text(self.path / "config.json", configs.to_json(config))
        data.write_table(dataset, self.path / "split.csv")
        report.write_json(self.path / "run.json", now)

    def config(self) -> configs.Config:
        """The config of the run.

        Raises:
            InputError: This is no run folder.
        """
        if not self.exists:
            raise InputError(f"--workdir {self.path}: no run here (a run folder has config.json and run.json)")
        try:
            return configs.from_json((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.path / 'config.json'}: cannot be read ({error}); restore it from a copy"
            ) from error

    def resolved(self) -> dict[str, Any]:
        """Contents of `run.json`: weights, classes, multilabel; and of a whole model, what it is."""
        return _read_json(self.path / "run.json", ("weights", "classes", "multilabel"))

    def results(self) -> dict[str, Any]:
        """Contents of `summary.json`."""
        return _read_json(self.summary, ("metrics", "best_step"))

    def whole(self) -> dict[str, Any] | None:
        """What `build` needs of a run whose checkpoint holds the whole model; None for other runs."""
        resolved = self.resolved() if self.exists else {}
        return {k: resolved[k] for k in ("weights", "model", "mean", "std")} if "model" in resolved else None

    def dataset(self, config: configs.Config) -> data.Dataset:
        """The images of the run: in the splits that it was started with, if it was."""
        if not self.exists:
            return data.load(config.data, config.seed)
        classes = tuple(self.resolved()["classes"])
        return data.load(config.data, config.seed, classes=classes, table=self.path / "split.csv")
