"""One training step and one evaluation step, as pure jitted functions of arrays.

`Program` holds all that is fixed in a run and is the static argument, so each step compiles once. Only `State.trainable`
is differentiated: for a frozen kernel no gradient is ever formed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from vitft_jax import tree
from vitft_jax.errors import InputError
from vitft_jax.methods import Method
from vitft_jax.sharding import ONE_DEVICE, Layout
from vitft_jax.vit import ViT

Batch = Mapping[str, Array]
_LEAST_REST = 1e-6  # of 1 - p in the focal loss: the slope of its power is infinite at 0 where gamma is below 1


@dataclass(frozen=True, eq=False)
class Program:
    """What is fixed in a run; hashed by identity.

    Attributes:
        model: The network, with the method's products and selector in place.
        method: The stacked fine-tuning methods.
        tx: The optimiser.
        mean: Of the input channels on a scale of 0 to 1; subtracted.
        std: Of the input channels; divided by.
        multilabel: Sigmoid cross-entropy over 0/1 labels instead of softmax over one class.
        class_weights: Loss weight of each class (of the positives of each label, if `multilabel`); () = all 1.
        label_smoothing: Share of the target that is spread evenly over the classes.
        focal_gamma: Exponent of the focal loss; 0 = cross-entropy.
        accumulate: Micro-batches per batch.
        seed: Of dropout.
        layout: Where arrays lie.
    """

    model: ViT
    method: Method
    tx: optax.GradientTransformation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multilabel: bool = False
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    accumulate: int = 1
    seed: int = 0
    layout: Layout = ONE_DEVICE


@struct.dataclass
class State:
    """What training changes; donated to each step."""

    step: Array
    trainable: Any
    opt_state: Any


def init_state(program: Program, trainable: tree.Tree) -> State:
    """The state before step 0."""

    @jax.jit
    def init(trainable: tree.Tree) -> State:
        trainable = jax.tree.map(jnp.copy, trainable)  # the step donates its state, so it must own it
        return program.layout.pin(State(jnp.zeros((), jnp.int32), trainable, program.tx.init(trainable)))

    return init(trainable)


def check_calibrated(program: Program, trainable: tree.Tree) -> None:
    """Refuses variables whose ranges have no values yet.

    Raises:
        InputError: Names the first one.
    """
    for name, leaf in tree.flatten({name: trainable.get(name, {}) for name in program.method.ranges}).items():
        if jnp.isnan(leaf).any():
            raise InputError(f"{name}: this range was never calibrated; `calibration.calibrated` does, before step 0")


def normalise(program: Program, images: Array) -> Array:
    """What the model takes, of uint8 images `(B, S, S, 3)`."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(program.mean)) / jnp.asarray(program.std)


def logits_of(program: Program, variables: tree.Tree, images: Array, rngs: Mapping[str, Array] | None = None) -> Array:
    """Logits `(B, C)` of uint8 images `(B, S, S, 3)`."""
    return program.model.apply(variables, normalise(program, images), rngs=rngs)


def example_losses(program: Program, logits: Array, labels: Array) -> Array:
    """Loss of each example, `(B,)`: cross-entropy, or the mean over the labels of their binary cross-entropies.

    Labels are classes `(B,)`, or shares of the classes `(B, C)` that sum to 1 (multi-label: each in 0..1). The loss of
    shares is the mean, by these shares, of the losses of the classes. Class weights multiply the loss of a class
    (multi-label: of a label's positives) and are not normalised again within a batch, so micro-batches and batches agree.
    With a `focal_gamma`, each logarithm of a probability p has the weight (1 - p)^gamma (Lin et al. 2017, arXiv:1708.02002).
    """
    weights = jnp.asarray(program.class_weights or (1.0,) * logits.shape[-1])
    smooth = program.label_smoothing
    if program.multilabel:
        targets = labels * (1 - smooth) + smooth / 2
        positive, negative = jax.nn.softplus(-logits), jax.nn.softplus(logits)  # -log p and -log (1 - p)
        if program.focal_gamma:
            focal = program.focal_gamma
            positive, negative = positive * jnp.exp(-focal * negative), negative * jnp.exp(-focal * positive)
        return jnp.mean(weights * targets * positive + (1 - targets) * negative, axis=-1)
    shares = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
    weighted = weights * shares
    targets = (1 - smooth) * weighted + smooth * jnp.mean(weighted, axis=-1, keepdims=True)
    if not program.focal_gamma:
        return optax.softmax_cross_entropy(logits, targets)
    log_p = jax.nn.log_softmax(logits)
    rest = jnp.maximum(-jnp.expm1(log_p), _LEAST_REST)
    return -jnp.sum(targets * rest**program.focal_gamma * log_p, axis=-1)


def loss(
    trainable: tree.Tree, frozen: tree.Tree, batch: Batch, rng: Array, program: Program
) -> tuple[Array, dict[str, Array]]:
    """Mean loss of a batch plus the method's penalty; the parts stand in the metrics."""
    logits = logits_of(program, tree.join(trainable, frozen), batch["image"], {"dropout": rng})
    task = jnp.mean(example_losses(program, logits, batch["label"]))
    if program.method.penalty is None:
        return task, {"loss": task}
    penalty = program.method.penalty(trainable)
    return task + penalty, {"loss": task, "penalty": penalty}


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def train_step(state: State, frozen: tree.Tree, batch: Batch, *, program: Program) -> tuple[State, dict[str, Array]]:
    """One optimiser step on a batch ``{image: uint8 (B,S,S,3), label}``; returns the next state and scalar metrics."""
    rng = jax.random.fold_in(jax.random.key(program.seed), state.step)
    gradient = jax.grad(loss, has_aux=True)
    if program.accumulate == 1:
        grads, metrics = gradient(state.trainable, frozen, batch, rng, program)
    else:
        k = program.accumulate
        # Every k-th row, so that each device cuts its own rows.
        micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1), dict(batch))

        def accumulate(total: Any, item: tuple[Batch, Array]) -> tuple[Any, None]:
            part = gradient(state.trainable, frozen, item[0], item[1], program)
            return jax.tree.map(lambda t, p: t + p / k, total, part), None

        shapes = jax.eval_shape(
            lambda b: gradient(state.trainable, frozen, b, rng, program), jax.tree.map(lambda x: x[0], micro)
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (micro, jax.random.split(rng, k)))
    updates, opt_state = program.tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    state = program.layout.pin(State(state.step + 1, trainable, opt_state))
    return state, {**metrics, "grad_norm": optax.global_norm(grads)}


@partial(jax.jit, static_argnames="program")
def eval_step(trainable: tree.Tree, frozen: tree.Tree, images: Array, *, program: Program) -> Array:
    """Logits `(B, C)` in float32, without dropout."""
    return program.layout.whole(logits_of(program, tree.join(trainable, frozen), images))
