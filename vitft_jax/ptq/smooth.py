"""SmoothQuant: moves the spread of activation channels into the kernels behind (Xiao et al. 2022, arXiv:2211.10438, eq. 4).

    s_j = max |X_j|^alpha / max_o |W_jo|^(1 - alpha),    X' = X / s,    W' = diag(s) W

The division is folded into what makes X, so in float nothing changes: the scale and bias of the LayerNorm before query, key
and value and before fc1, and the value projection before out (attention is linear in the values). Between fc1 and fc2 stands
a GELU, which nothing can be moved across.

Alpha is searched on the layers' own outputs. To search it on the block's output takes a forward pass of the model for every
choice and gains nothing with a scale per token: `python scripts/compare_smoothing.py` (bundled weights, 32 images) found
errors of the features of 1.59 % by layer and 1.64 % by block, and of 1.55 % and 1.67 % with planted outliers. With one range
per layer ('max'), it was 3.55 % and 3.21 %, 3.41 % and 2.70 %; without smoothing 2.88 %, and 116 % with the outliers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from vitft_jax import quantizer, tree
from vitft_jax.methods import quant
from vitft_jax.ptq import ranges
from vitft_jax.ptq.observe import Seen

ALPHAS = (0.3, 0.5, 0.7)
LARGEST = 100.0  # of a factor or its inverse, after the geometric mean is divided out


@dataclass(frozen=True)
class Fold:
    """Where a division can be folded: from `source`, a LayerNorm or a value projection, into the `layers` behind it."""

    source: str
    layers: tuple[str, ...]


def folds(params: tree.Tree) -> list[Fold]:
    """All folds of a model."""
    found = []
    for block in (name for name in params if name.startswith("blocks_")):
        attention = tuple(f"{block}/attn/{name}" for name in ("query", "key", "value"))
        found += [
            Fold(f"{block}/norm1", attention),
            Fold(f"{block}/attn/value", (f"{block}/attn/out",)),
            Fold(f"{block}/norm2", (f"{block}/mlp/fc1",)),
        ]
    return found


def factors(activations: Array, weights: Array, alpha: float) -> Array:
    """S from the largest magnitudes `(in,)` of activations and weights; 1 for a channel that is dead on either side."""
    alive = (activations > 0) & (weights > 0)
    log = jnp.where(alive, alpha * jnp.log(activations) - (1 - alpha) * jnp.log(weights), 0.0)
    log -= jnp.sum(log) / jnp.maximum(jnp.sum(alive), 1)
    return jnp.where(alive, jnp.exp(jnp.clip(log, -jnp.log(LARGEST), jnp.log(LARGEST))), 1.0)


def apply(params: tree.Tree, fold: Fold, s: Array) -> dict[str, Array]:
    """Parameters with a division by s `(in,)` folded in; the same function in float."""
    leaves = tree.flatten(params)
    for part in ("scale", "kernel", "bias"):  # of a LayerNorm the first and last, of a projection the others
        if f"{fold.source}/{part}" in leaves:
            leaves[f"{fold.source}/{part}"] = leaves[f"{fold.source}/{part}"] / s
    for layer in fold.layers:
        leaves[f"{layer}/kernel"] = leaves[f"{layer}/kernel"] * s[:, None]
    return tree.unflatten(leaves)


@partial(jax.jit, static_argnames=("bits", "weight_only"))
def error(rows: Array, kernel: Array, s: Array, bound: Array | None, bits: int, weight_only: bool) -> Array:
    """Squared error of the layer's output when it is quantised after smoothing by s.

    Args:
        rows: Inputs before smoothing, `(R, in)`.
        kernel: In float, before smoothing.
        s: Factors, `(in,)`.
        bound: Static range of the smoothed inputs, or None.
        bits: Of the kernel.
        weight_only: Inputs stay in float.
    """
    smoothed = quantizer.quantise_kernel(kernel * s[:, None], bits)
    return jnp.sum((quantizer.frozen_product(rows / s, smoothed, bound, weight_only) - rows @ kernel) ** 2)


def search(
    params: tree.Tree,
    seen: Mapping[str, Seen],
    settings: quant.Settings,
    static: str = "",
    alphas: Sequence[float] = ALPHAS,
) -> tuple[dict[str, Array], dict[str, Seen], dict[str, float | None]]:
    """Smooths every fold by the alpha whose quantised layers come closest to the float ones, or not at all.

    Args:
        params: In float.
        seen: Inputs of the layers.
        settings: How the layers are quantised, and which: those that stay in float have no say.
        static: How the static range of a layer is found, see `ranges.bound_of`; '' for dynamic ones.
        alphas: To choose from.

    Returns:
        Parameters, what the layers see afterwards, and the alpha chosen for each quantised layer, None where there is no
        smoothing.
    """
    params, seen, chosen = dict(params), dict(seen), {}

    def smoothed(layer: str, s: Array) -> Seen:
        return Seen(seen[layer].absmax / s, seen[layer].rows / s)

    def layer_error(layer: str, kernel: Array, s: Array) -> float:
        bound = ranges.bound_of(smoothed(layer, s), static) if static else None
        return float(error(seen[layer].rows, kernel, s, bound, settings.bits, settings.weight_only))

    for fold in folds(params):
        layers = [layer for layer in fold.layers if settings.converts(layer)]
        if not layers:
            continue
        leaves = tree.flatten(params)
        kernels = [leaves[f"{layer}/kernel"] for layer in layers]
        weights = jnp.max(jnp.stack([jnp.max(jnp.abs(kernel), axis=1) for kernel in kernels]), axis=0)
        activations = jnp.max(jnp.stack([seen[layer].absmax for layer in layers]), axis=0)
        candidates = {None: jnp.ones_like(weights)} | {a: factors(activations, weights, a) for a in alphas}
        errors = {
            alpha: sum(layer_error(layer, kernel, s) for layer, kernel in zip(layers, kernels, strict=True))
            for alpha, s in candidates.items()
        }
        best = min(errors, key=errors.__getitem__)
        params = apply(params, fold, candidates[best])
        seen |= {layer: smoothed(layer, candidates[best]) for layer in fold.layers}
        chosen |= dict.fromkeys(layers, best)
    return params, seen, chosen
