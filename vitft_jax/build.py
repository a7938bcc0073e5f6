"""The program and the variables before step 0 that a config and its base weights stand for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from vitft_jax import config as configs
from vitft_jax import data, methods, optim, pretrained, sharding, step, tree
from vitft_jax.errors import InputError, nearest
from vitft_jax.sharding import Layout
from vitft_jax.step import Program
from vitft_jax.task import Task, task_of
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
        """Numbers of parameters; adapters count in the total, scales and ranges of int8 do not."""
        names = ("params", *self.program.method.collections)
        trainable, frozen = (sum(tree.count(v.get(n, {})) for n in names) for v in (self.trainable, self.frozen))
        total = trainable + frozen
        return {"total": total, "trainable": trainable, "trainable_percent": 100 * trainable / total}


def whole_model(program: Program, weights: Weights) -> dict[str, Any]:
    """What `run.json` says of a run whose checkpoint holds the whole model, so that it needs no other weights."""
    return {
        "weights": asdict(weights),
        "model": {name: getattr(program.model, name) for name in ARCHITECTURE},
        "mean": list(program.mean),
        "std": list(program.std),
    }


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
    """Builds the model and its optimiser, from what `run.resolve` returned; `whole` as there.

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
        if architecture.get("distilled") and config.model.features != "cls":
            raise InputError(
                f"config key model.features={config.model.features!r}: a model with a distillation token has 'cls' alone"
            )
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
    initial = _initial(model, config, source, method, task.classes, layout)
    trainable, frozen = tree.split(method.prepare(initial), trains(config, method))
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


def trains(config: configs.Config, method: methods.Method) -> Callable[[str], bool]:
    """Whether a variable trains, by its name: what belongs to the method, and what ``config.train.trainable`` matches.

    Raises:
        InputError: That is no regex, or empty.
    """
    if not config.train.trainable:
        raise InputError("config key train.trainable='': would match every name; '.' trains all of them, '$^' none")
    try:
        chosen = re.compile(config.train.trainable)
    except re.error as error:
        raise InputError(f"config key train.trainable={config.train.trainable!r}: no regex: {error}") from None

    def one(name: str) -> bool:
        collection, _, rest = name.partition("/")
        return collection in (*method.collections, *method.ranges) or (
            collection == "params" and bool(chosen.search(rest))
        )

    return one
