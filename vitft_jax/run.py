"""A run: the folder that holds it, and the program and variables that a config stands for.

A run folder holds `config.json` (resolved), `run.json` (what came from outside: weights, classes), `split.csv` (which image
is in which split), `metrics.jsonl`, `summary.json`, `predictions_<split>.csv`, `decision.json` (temperature, thresholds),
`checkpoints/`, `report.html` and `MODEL_CARD.md`; also `figures/` where there is something to draw, and `evaluations/` where
the run was evaluated under other settings.
"""

import csv
import hashlib
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
from vitft_jax import data, lock, methods, optim, pretrained, processes, report, sharding, step, tree
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError, nearest
from vitft_jax.sharding import Layout
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

    def merged(self, trainable: Any) -> tree.Tree:
        """`params` with such adapters folded in and float kernels in the place of integers."""
        trainable, frozen = (self.program.layout.gathered(variables) for variables in (trainable, self.frozen))
        return self.program.method.merge(tree.join(trainable, frozen))["params"]

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


@dataclass(frozen=True)
class Task:
    """What a program needs to know of its data.

    Attributes:
        classes: Names.
        multilabel: Whether an image has several labels.
        total_steps: Optimiser steps of the run.
        class_weights: Of the loss; () = all 1.
    """

    classes: tuple[str, ...]
    multilabel: bool
    total_steps: int
    class_weights: tuple[float, ...] = ()


def task_of(config: configs.Config, dataset: data.Dataset) -> Task:
    """The task of a run that trains on `dataset`."""
    weights = class_weights(dataset) if config.train.class_weights else ()
    return Task(dataset.classes, dataset.multilabel, _total_steps(config, len(dataset.indices("train"))), weights)


def _total_steps(config: configs.Config, train_images: int) -> int:
    return config.train.steps or math.ceil(config.train.epochs * math.ceil(train_images / config.train.batch_size))


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
        workdir = Path(config.model.pretrained).expanduser()
        if Folder(workdir).exists:
            if config.model.revision:
                raise InputError(
                    f"config key model.revision={config.model.revision!r} is for Hub ids, {workdir} is a run"
                )
            source = finetuned(workdir, config.model.name)
        else:
            source = pretrained.load(config.model.pretrained, config.model.revision, config.model.name)
    config = configs.absolute(config)
    config.data.image_size = config.data.image_size or (source.image_size if source else 224)
    return config, source


def finetuned(workdir: Path, name: str = "") -> pretrained.Pretrained:
    """The best model of a run as base weights of another: adapters merged, and the head, which stays where the classes do.

    Args:
        workdir: The folder of the run; its base weights must still be where they were.
        name: Key of `vit.VARIANTS` that the architecture must agree with; '' for no such check.

    Raises:
        InputError: The run has no checkpoint, is quantised, or has another architecture; or as `resolve` and `build`.
    """
    if Folder(workdir).whole() is not None:
        raise InputError(f"model.pretrained={workdir}: is an int8 model; give the run that it was made from")
    found = best(workdir)
    built, trainable = found.built, found.built.program.layout.gathered(found.trainable)
    model = {key: getattr(built.program.model, key) for key in ARCHITECTURE}
    if name:
        pretrained.confirm(name, model, str(workdir))
    digest = hashlib.sha256(built.weights.sha256.encode())
    for leaf_name, leaf in sorted(tree.flatten(trainable).items()):
        digest.update(leaf_name.encode() + np.asarray(leaf).tobytes())
    return pretrained.Pretrained(
        model=model,
        params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), built.merged(trainable)),
        classes=found.task.classes,
        image_size=found.config.data.image_size,
        mean=built.program.mean,
        std=built.program.std,
        antialias=found.source.antialias if found.source else True,
        source=str(workdir.resolve()),
        revision="",
        sha256=digest.hexdigest(),
    )


@dataclass(frozen=True)
class Best:
    """The best model of a run.

    Attributes:
        config: Of the run, on the devices of today.
        task: Of the run.
        source: What its base weights are, its `params` let go; None where they were random, or the checkpoint holds the whole
            model.
        built: Its program, and its variables before step 0.
        trainable: What trained, as in the best checkpoint.
        step: Of that checkpoint.
    """

    config: configs.Config
    task: Task
    source: pretrained.Pretrained | None
    built: Built
    trainable: Any
    step: int


def best(workdir: Path, devices: int = 0) -> Best:
    """The best model of a run, from its folder and its base weights alone, on so many devices (0 = all).

    Raises:
        InputError: No run or no checkpoint there, its base weights are not what they were, or its static ranges were never
            calibrated.
    """
    folder = Folder(workdir)
    whole = folder.whole()
    config = folder.config()
    config.mesh = configs.default().mesh  # the devices of today
    config.mesh.data = devices
    config, source = resolve(config, whole)
    task = folder.task(config)
    built = build_for(config, task, source, whole)
    source = replace(source, params={}) if source else None  # in float, beside what `built` holds
    folder.confirm(task, built)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, at = checkpoints.restore_best(built.trainable, built.program.layout)
    step.check_calibrated(built.program, trainable)
    return Best(config, task, source, built, trainable, at)


def build(
    config: configs.Config,
    dataset: data.Dataset,
    source: pretrained.Pretrained | None,
    whole: dict[str, Any] | None = None,
) -> Built:
    """`build_for` the task of a run that trains on `dataset`."""
    return build_for(config, task_of(config, dataset), source, whole)


def build_for(
    config: configs.Config,
    task: Task,
    source: pretrained.Pretrained | None,
    whole: dict[str, Any] | None = None,
) -> Built:
    """Builds the model and its optimiser, from what `resolve` returned; `whole` as there.

    Raises:
        InputError: The weights do not fit, a method refuses its settings, nothing trains, or the devices do not suit
            ``config.mesh``.
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
    layout = sharding.layout(config, method.sharding)
    model = ViT(
        **architecture,
        classes=len(task.classes),
        dtype=jnp.dtype(config.dtype),
        dot_general_cls=layout.products(method.dot_general_cls),
        attend=method.attend,
        select=method.select,
        remat=config.remat,
    )
    if model.heads % config.mesh.model:
        raise InputError(
            f"config key mesh.model={config.mesh.model}: does not divide the {model.heads} attention heads"
        )
    method.check(model, (size // model.patch) ** 2)
    program = Program(
        model=model,
        method=method,
        tx=optim.optimizer(config, method, task.total_steps),
        mean=mean,
        std=std,
        multilabel=task.multilabel,
        class_weights=task.class_weights,
        label_smoothing=config.train.label_smoothing,
        focal_gamma=config.train.focal_gamma,
        accumulate=config.train.accumulate,
        seed=config.seed,
        layout=layout,
    )
    if whole is not None:
        return Built(program, None, {}, Weights(**whole["weights"]), task.total_steps, whole=whole)
    initial = _initial(model, config, source, method, () if task.multilabel else task.classes, layout)
    trainable, frozen = tree.split(method.prepare(initial), _trains(config, method))
    if "params" not in trainable:
        raise InputError(
            f"config key train.trainable={config.train.trainable!r} matches no parameter: nothing to train"
        )
    state = step.State(jnp.zeros((), jnp.int32), trainable, jax.eval_shape(program.tx.init, trainable))
    layout.check({"state": state, "frozen": frozen})
    # On the devices once: numpy arrays would be copied there at every step.
    trainable, frozen = layout.put(trainable), layout.put(frozen)
    weights = Weights(source.source, source.revision, source.sha256) if source else Weights("random", "", "")
    phases = tuple(
        (end, replace(program, model=model.clone(select=select))) for end, select in method.phases(task.total_steps)
    )
    return Built(program, trainable, frozen, weights, task.total_steps, phases)


def _initial(
    model: ViT,
    config: configs.Config,
    source: pretrained.Pretrained | None,
    method: methods.Method,
    classes: Sequence[str],
    layout: Layout,
) -> dict[str, Any]:
    """Variables of the model: pretrained and on the host where there is something pretrained, fresh elsewhere.

    What is fresh comes to life where it belongs. Only methods, which may rewrite it beside what is on the host, get it whole.
    """
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
    missing = tree.split(shapes, lambda n: n not in known)[0]
    names = tree.flatten(missing).keys()  # not `known`: jit keeps what a function refers to

    def draw(key: jax.Array) -> dict[str, Any]:
        return tree.split(model.init(key, images), lambda n: n in names)[0]

    fresh = jax.jit(draw, out_shardings=layout.shardings(missing))(key)
    if config.methods and layout.mesh is not None:
        fresh = jax.device_get(layout.gathered(fresh))
    fresh = tree.flatten(fresh)
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


def _from_outside(task: Task, built: Built) -> dict[str, Any]:
    """What `run.json` holds."""
    now = {"weights": asdict(built.weights), "classes": list(task.classes), "multilabel": task.multilabel}
    return now | (built.whole or {})


class Folder:
    """A run folder."""

    def __init__(self, path: Path) -> None:
        """Names the files in `path`; raises InputError if Orbax could not keep checkpoints there."""
        if pattern := set("*?[") & set(str(path.absolute())):
            raise InputError(
                f"run folder {path.absolute()}: checkpoints cannot lie below a name with {min(pattern)!r}, which Orbax "
                "takes for a pattern; choose another"
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
            differ = configs.differences(self.config(), config)
            if other := [text for text in differ if not text.startswith(configs.ON_RESUME)]:
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
        task = Task(dataset.classes, dataset.multilabel, built.total_steps)
        exists = self.exists
        processes.wait("every process has looked at the folder")
        if exists:
            self.confirm(task, built)
            return
        if processes.first():
            self.path.mkdir(parents=True, exist_ok=True)
            report.write_text(self.path / "config.json", configs.to_json(config))
            data.write_table(dataset, self.path / "split.csv")
            report.write_json(self.path / "run.json", _from_outside(task, built))
        processes.wait("the folder is there")

    def confirm(self, task: Task, built: Built) -> None:
        """Makes sure that the weights and classes of a run are still what they were.

        Raises:
            InputError: They are not.
        """
        now = _from_outside(task, built)
        for key, then in self.resolved().items():
            if then != now[key]:
                raise InputError(
                    f"--workdir {self.path}: its {key} were {then} when it was started and are {now[key]} now. "
                    "Restore them, or choose another --workdir"
                )

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
        found = _read_json(self.path / "run.json", ("weights", "classes", "multilabel"))
        classes, strings = found["classes"], lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x)
        if not (isinstance(found["weights"], dict) and strings(classes) and isinstance(found["multilabel"], bool)):
            raise InputError(
                f"{self.path / 'run.json'}: weights, classes or multilabel are no such; restore it from a copy"
            )
        return found

    def results(self) -> dict[str, Any]:
        """Contents of `summary.json`."""
        return _read_json(self.summary, ("metrics", "best_step"))

    def whole(self) -> dict[str, Any] | None:
        """What `build` needs of a run whose checkpoint holds the whole model; None for other runs."""
        resolved = self.resolved() if self.exists else {}
        if "model" not in resolved:
            return None
        fields = ("source", "revision", "sha256"), ARCHITECTURE
        try:
            known = set(resolved["weights"]) == set(fields[0]) and set(resolved["model"]) == set(fields[1])
            if known and all(len([float(x) for x in resolved[key]]) == 3 for key in ("mean", "std")):
                return {k: resolved[k] for k in ("weights", "model", "mean", "std")}
        except (TypeError, ValueError, KeyError):
            pass
        raise InputError(
            f"{self.path / 'run.json'}: says of the model what this version does not write; restore it from a copy"
        )

    def task(self, config: configs.Config) -> Task:
        """The task of the run, from its folder alone: its data need not be there. Loss weights are left out.

        Raises:
            InputError: `split.csv` is not in the folder.
        """
        try:
            with (self.path / "split.csv").open(encoding="utf-8", newline="") as file:
                train_images = sum(row["split"] == "train" for row in csv.DictReader(file))
        except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.path / 'split.csv'}: cannot be read ({error!r}); restore it from a copy") from None
        resolved = self.resolved()
        return Task(tuple(resolved["classes"]), resolved["multilabel"], _total_steps(config, train_images))

    def dataset(self, config: configs.Config) -> data.Dataset:
        """The images of the run: in the splits that it was started with, if it was."""
        if not self.exists:
            return data.load(config.data, config.seed)
        classes = tuple(self.resolved()["classes"])
        return data.load(config.data, config.seed, classes=classes, table=self.path / "split.csv")
