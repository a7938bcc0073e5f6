"""AdaLoRA: adapters that share one budget of rank by importance (Zhang et al. 2023, arXiv:2303.10512).

    y = x W + s ((x Q) * lam) P        Q: (in, r0),  lam: (r0,),  P: (r0, out),  s = alpha / (r0 + 1e-5)

Q and P are the paper's transposed, so that both stand as they multiply. They start as N(0, 0.02^2) and lam at zero: a fresh
adapter changes nothing. A penalty keeps them near orthonormal, so that lam acts as singular values. A triplet is a column of
Q, an entry of lam and a row of P; its importance is averaged over the steps, and the triplets of all layers are ranked
together. From `t_init` on the budget of triplets falls along a cubic from r0 to `target_r` a layer; at every allocation lam is
set to zero outside the budget, and what was set to zero may grow back until the next. In the last `t_final` of the run the
choice is frozen.

Shapes never change while training. All of it is an optax wrapper: averages and mask are part of the optimiser state, and the
gradient that it sees is clipped and accumulated (`optim.optimizer` clips before what methods wrap; micro-batches are summed
before the optimiser), so a step is always an optimiser step. Steps count from 1, as PEFT's `global_step` does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from vitft_jax import tree
from vitft_jax.errors import InputError
from vitft_jax.methods import DotGeneralCls, Method, Variables, lora
from vitft_jax.product import matmul

COLLECTION = "adalora"
IMPORTANCE_AT = ("post", "pre")
BETA_SENSITIVITY = BETA_UNCERTAINTY = 0.85  # of both averages, in the paper and in PEFT

_init_pq = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class Settings:
    """Which layers get an adapter, how rank is allotted among them, and the scale.

    Attributes:
        init_r: Rank r0 of every adapter at the start, and its shape for ever.
        target_r: Mean rank of an adapter at the end.
        alpha: Numerator of the scale.
        targets: Regex on the path of a linear layer.
        t_init: Share of the run before the budget falls.
        t_final: Share of the run after the last allocation.
        delta_t: Optimiser steps between allocations.
        penalty: Weight of the orthogonality penalty.
        importance_at: Importance is |w g| with w after ('post', as the authors' code) or before ('pre', as the paper's
            algorithm 1) the step that g led to.
    """

    init_r: int
    target_r: int
    alpha: float
    targets: str
    t_init: float
    t_final: float
    delta_t: int
    penalty: float
    importance_at: str = "post"

    @property
    def scale(self) -> float:
        """The factor s; it stays that of the initial rank, so that pruning changes no other triplet."""
        return self.alpha / (self.init_r + 1e-5)


class AdaLoraDot(nn.Module):
    """A product with an adapter beside it; stands in for `lax.dot_general` inside a linear layer."""

    settings: Settings
    base: DotGeneralCls

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        y = self.base()(x, kernel, dimensions, **kwargs)
        if not re.search(self.settings.targets, "/".join(self.path[:-1])):
            return y
        r = self.settings.init_r
        q = self.variable(COLLECTION, "q", lambda: _init_pq(self.make_rng("params"), (kernel.shape[0], r))).value
        lam = self.variable(COLLECTION, "lam", lambda: jnp.zeros(r)).value
        p = self.variable(COLLECTION, "p", lambda: _init_pq(self.make_rng("params"), (r, kernel.shape[1]))).value
        low = matmul(x, q.astype(x.dtype)) * (self.settings.scale * lam).astype(x.dtype)
        return y + matmul(low, p.astype(x.dtype))


def layers(collection: tree.Tree) -> dict[str, dict[str, Array]]:
    """Returns ``{path of a linear layer: {p, lam, q}}``, ordered by path: the order of the rows of scores and masks."""
    leaves = tree.flatten(collection)
    paths = sorted(name.removesuffix("/dot/lam") for name in leaves if name.endswith("/dot/lam"))
    return {path: {part: leaves[f"{path}/dot/{part}"] for part in ("p", "lam", "q")} for path in paths}


def penalty(variables: Variables, settings: Settings) -> Array:
    """Orthogonality: the mean over all P and Q of ||P P' - I||_F and ||Q' Q - I||_F, times its weight.

    The norms are not squared and are averaged, as in the authors' code and PEFT (the paper's eq. 4 sums squares).
    """
    dot = partial(jnp.matmul, precision="highest")  # differences from I drown in the rounding of fast products
    pairs = [(dot(a["p"], a["p"].T), dot(a["q"].T, a["q"])) for a in layers(variables[COLLECTION]).values()]
    gaps = jnp.stack([gram for pair in pairs for gram in pair]) - jnp.eye(settings.init_r)
    # The root has no derivative at zero; the small addend gives it one.
    return settings.penalty * jnp.mean(jnp.sqrt(jnp.sum(gaps**2, axis=(1, 2)) + 1e-12))


def phases(settings: Settings, total_steps: int) -> tuple[int, int]:
    """The last step with the whole budget, and the step of the last allocation.

    Raises:
        InputError: They leave no room for an allocation.
    """
    start, final = round(settings.t_init * total_steps), round(settings.t_final * total_steps)
    between = total_steps - final - start
    if between < settings.delta_t:
        raise InputError(
            f"adalora: of {total_steps} steps in all, the first {start} (t_init={settings.t_init}) keep the initial ranks "
            f"and the last {final} (t_final={settings.t_final}) the final ones; {between} are left to allocate rank, fewer "
            f"than delta_t={settings.delta_t}. Train for longer, or lower adalora.t_init, adalora.t_final or "
            "adalora.delta_t"
        )
    return start, total_steps - final


def budgets(settings: Settings, count: int, total_steps: int) -> list[int]:
    """Triplets that `count` layers may keep at each step 0..total_steps (eq. 12), in exact arithmetic of Python."""
    start, end = phases(settings, total_steps)
    whole, target = settings.init_r * count, settings.target_r * count

    def budget(step: int) -> int:
        if step <= start:
            return whole
        left = 1 - (min(step, end) - start) / (end - start)
        return int((whole - target) * left**3 + target)

    return [budget(step) for step in range(total_steps + 1)]


def scores(sensitivity: tree.Tree, uncertainty: tree.Tree) -> Array:
    """Importance of every triplet, `(layers, r0)`: of its lam, plus the means of its column of Q and its row of P.

    The importance of an entry is sensitivity times uncertainty (eq. 8 to 11).
    """
    entries = layers(jax.tree.map(jnp.multiply, sensitivity, uncertainty))
    return jnp.stack([e["lam"] + (e["q"].mean(axis=0) + e["p"].mean(axis=1)) for e in entries.values()])


def keep_best(scores: Array, budget: Array) -> Array:
    """Mask of exactly the `budget` highest scores over all layers; of equal ones the first stay."""
    order = jnp.argsort(-scores.ravel(), stable=True)
    return jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < budget).reshape(scores.shape)


class BudgetState(NamedTuple):
    """State of `allocate_rank`.

    Attributes:
        step: Optimiser steps done.
        final: Whether the choice is frozen.
        mask: Triplets within the budget of the latest allocation, `(layers, r0)`, rows as in `layers`.
        sensitivity: Moving average of |w g|, shaped like the adapters.
        uncertainty: Moving average of the distance of |w g| from `sensitivity`.
        inner: State of the wrapped optimiser.
    """

    step: Array
    final: Array
    mask: Array
    sensitivity: Any
    uncertainty: Any
    inner: Any


def allocate_rank(
    tx: optax.GradientTransformation, settings: Settings, total_steps: int
) -> optax.GradientTransformation:
    """Wraps an optimiser so that lam stays within the budget of rank.

    Raises:
        InputError: The phases do not fit into the run.
    """
    start, end = phases(settings, total_steps)

    def init(params: Variables) -> BudgetState:
        zeros = jax.tree.map(jnp.zeros_like, params[COLLECTION])
        mask = jnp.ones((len(layers(zeros)), settings.init_r), bool)
        none = jax.tree.map(jnp.copy, zeros)  # not the same buffers: the train step donates its state
        return BudgetState(jnp.zeros((), jnp.int32), jnp.zeros((), bool), mask, zeros, none, tx.init(params))

    def update(grads: Any, state: BudgetState, params: Variables) -> tuple[Any, BudgetState]:
        updates, inner = tx.update(grads, state.inner, params)
        step = state.step + 1
        moved = optax.apply_updates(params[COLLECTION], updates[COLLECTION])
        weights = moved if settings.importance_at == "post" else params[COLLECTION]
        sensitivity, uncertainty = _averages(state, weights, grads[COLLECTION], step < end)

        due = (step > start) & (step < end) & (step % settings.delta_t == 0) | (step == end)
        budget = jnp.asarray(budgets(settings, len(state.mask), total_steps), jnp.int32)[step]
        mask = lax.cond(
            due, lambda: keep_best(scores(sensitivity, uncertainty), budget), lambda: state.mask
        )  # the sort runs only where it is due
        final = step >= end
        return (
            {**updates, COLLECTION: _zero(updates[COLLECTION], params[COLLECTION], ~mask & (due | final))},
            BudgetState(step, final, mask, sensitivity, uncertainty, inner),
        )

    return optax.GradientTransformation(init, update)


def _averages(state: BudgetState, weights: Any, grads: Any, on: Array) -> tuple[Any, Any]:
    """Both moving averages after a step; as they were where `on` is false."""

    def mix(old: Array, new: Array, beta: float) -> Array:
        return jnp.where(on, beta * old + (1 - beta) * new, old)

    now = jax.tree.map(lambda w, g: jnp.abs(w * g), weights, grads)
    sensitivity = jax.tree.map(partial(mix, beta=BETA_SENSITIVITY), state.sensitivity, now)
    distance = jax.tree.map(lambda i, mean: jnp.abs(i - mean), now, sensitivity)
    return sensitivity, jax.tree.map(partial(mix, beta=BETA_UNCERTAINTY), state.uncertainty, distance)


def _zero(updates: tree.Tree, params: tree.Tree, where: Array) -> tree.Tree:
    """Updates that take lam to zero `where` `(layers, r0)` says so: x + (-x) is zero to the bit."""
    leaves = tree.flatten(updates)
    for row, (path, adapter) in zip(where, layers(params).items(), strict=True):
        name = f"{path}/dot/lam"
        leaves[name] = jnp.where(row, -adapter["lam"], leaves[name])
    return tree.unflatten(leaves)


def delta(adapter: Mapping[str, Array], settings: Settings) -> Array:
    """The change of a kernel that an adapter ``{p, lam, q}`` stands for: s Q diag(lam) P, `(in, out)`."""
    return settings.scale * ((adapter["q"] * adapter["lam"]) @ adapter["p"])


def merge(variables: Variables, settings: Settings) -> Variables:
    """Folds the adapters into the kernels; the variables given stay as they are."""
    leaves = tree.flatten(variables["params"])
    for path, adapter in layers(variables[COLLECTION]).items():
        kernel = leaves[f"{path}/kernel"]
        leaves[f"{path}/kernel"] = (kernel + delta(adapter, settings)).astype(kernel.dtype)
    rest = {name: value for name, value in variables.items() if name not in ("params", COLLECTION)}
    return {**rest, "params": tree.unflatten(leaves)}


def to_lora(variables: Variables, settings: Settings) -> tuple[Variables, lora.Settings]:
    """The same model with plain LoRA adapters of as many ranks as are left: variables and settings for `methods.lora`.

    A triplet whose lam is zero is left out, and so is a layer without any. LoRA scales by alpha / rank, which differs by
    layer where ranks do; lam and the ratio of the scales are folded into A, so one alpha serves all layers.
    """
    adapters, pattern = {}, []
    for path, adapter in layers(jax.device_get(variables[COLLECTION])).items():
        kept = adapter["lam"] != 0
        rank = int(kept.sum())
        pattern.append((f"^{re.escape(path)}$", rank))
        if rank:
            ratio = settings.scale * rank / settings.alpha
            adapters[f"{path}/dot/a"] = jnp.asarray(ratio * (adapter["q"] * adapter["lam"])[:, kept])
            adapters[f"{path}/dot/b"] = jnp.asarray(adapter["p"][kept])
    rest = {name: value for name, value in variables.items() if name != COLLECTION}
    plain = lora.Settings(settings.init_r, settings.alpha, settings.targets, rank_pattern=tuple(pattern))
    return {**rest, lora.COLLECTION: tree.unflatten(adapters)}, plain


def report(trainable: Variables, opt_state: Any, settings: Settings) -> dict[str, Any]:
    """Ranks within the budget by layer and in all, and the parameters that `to_lora` would keep of the adapters.

    Raises:
        RuntimeError: The choice is frozen, but there is another rank than the budget or lam differs from zero outside it.
    """
    found = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, BudgetState))
    state = next(node for node in found if isinstance(node, BudgetState))
    adapters = layers(trainable[COLLECTION])
    mask, final, lam = jax.device_get((state.mask, state.final, [a["lam"] for a in adapters.values()]))
    ranks = mask.sum(axis=1)
    budget, outside = settings.target_r * len(adapters), int(np.count_nonzero(np.stack(lam)[~mask]))
    if final and (ranks.sum() != budget or outside):
        raise RuntimeError(
            f"adalora: at the end the total rank is {ranks.sum()} of a budget of {budget}, and {outside} singular values "
            "outside it are not zero; something other than this method changed the adapters or the optimiser state"
        )
    sizes = [a["q"].shape[0] + 1 + a["p"].shape[1] for a in adapters.values()]
    return {
        "active_rank": {path: int(rank) for path, rank in zip(adapters, ranks, strict=True)},
        "total_rank": int(ranks.sum()),
        "active_parameters": int(ranks @ np.array(sizes)),
    }


def method(config: Any) -> Method:
    """Builds AdaLoRA from ``config.adalora``.

    Raises:
        InputError: A setting is out of range, or a regex does not compile.
    """
    c = config.adalora
    if not 1 <= c.target_r <= c.init_r:
        raise InputError(
            f"adalora.target_r={c.target_r}, adalora.init_r={c.init_r}: ranks fall, and no lower than to 1"
        )
    for key in ("t_init", "t_final"):
        if not 0 <= c[key] < 1:
            raise InputError(f"adalora.{key}={c[key]}: a share of the run, at least 0 and below 1")
    if c.delta_t < 1:
        raise InputError(f"adalora.delta_t={c.delta_t}: optimiser steps between allocations, at least 1")
    if c.alpha <= 0 or c.penalty < 0:
        raise InputError(f"adalora.alpha={c.alpha}, adalora.penalty={c.penalty}: above 0, and at least 0")
    if c.importance_at not in IMPORTANCE_AT:
        raise InputError(f"adalora.importance_at={c.importance_at!r}: one of {', '.join(map(repr, IMPORTANCE_AT))}")
    targets = lora.targets_of("adalora", c.targets)
    try:
        re.compile(targets)
    except re.error as error:
        raise InputError(f"adalora.targets={targets!r}: none of {sorted(lora.TARGETS)} and no regex: {error}") from None
    settings = Settings(
        c.init_r, c.target_r, c.alpha, targets, c.t_init, c.t_final, c.delta_t, c.penalty, c.importance_at
    )
    return Method(
        collections=(COLLECTION,),
        sharding=(
            (r"/dot/q$", ("in", None)),
            (r"/dot/lam$", (None,)),
            (r"/dot/p$", (None, "out")),
            (r"/final$", ()),
            (r"/mask$", (None, None)),  # ranked as one, and small
        ),
        dot=lambda base: partial(AdaLoraDot, settings, base, name="dot"),
        penalty=partial(penalty, settings=settings) if c.penalty else None,
        wrap_tx=lambda tx, total_steps: allocate_rank(tx, settings, total_steps),
        merge=partial(merge, settings=settings),
        ready_from=lambda total_steps: phases(settings, total_steps)[1],
        report=partial(report, settings=settings),
    )
