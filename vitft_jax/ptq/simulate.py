"""The quantised model in float arithmetic, where each layer can be switched back to float without compiling anew.

For asking many times which layers to quantise; int8 attention has no switch. In float32 it is the int8 model, as long as
sums of products stay below 2^24.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vitft_jax import quantized_attention, quantizer, tree
from vitft_jax.methods import quant
from vitft_jax.quantizer import Quantised
from vitft_jax.step import Program

COLLECTION = "simulated"


class Layer(NamedTuple):
    """A quantised layer: integers, the bias that goes with them, and the static range of its input or None."""

    kernel: Quantised
    bias: Array
    bound: Array | None


class SimulatedDot(nn.Module):
    """A float product of integers with their scales behind it where its switch is on, and of float values where it is off."""

    paths: frozenset[str]
    static: bool
    weight_only: bool

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        dot, kernel = partial(lax.dot_general, dimension_numbers=dimensions, **kwargs), kernel.astype(x.dtype)
        if "/".join(self.path[:-1]) not in self.paths or self.weight_only:
            return dot(x, kernel)
        on = self.variable(COLLECTION, "on", lambda: jnp.ones((), bool)).value
        kernel_scale = self.variable(COLLECTION, "scale", jnp.ones, kernel.shape[1]).value
        bound = self.variable(COLLECTION, "bound", lambda: jnp.ones(())).value if self.static else None
        scale = quantizer.activation_scale(x, bound)
        y = dot(jnp.where(on, quantizer.round_to(x, scale).astype(x.dtype), x), kernel)
        return y * jnp.where(on, scale * kernel_scale, 1).astype(y.dtype)


def program(base: Program, layers: Mapping[str, Layer], settings: quant.Settings) -> Program:
    """The simulated program; its variables are those of `variables`."""
    dot = partial(SimulatedDot, frozenset(layers), settings.static, settings.weight_only, name="dot")
    attend = quantized_attention.attend if settings.attention else None
    return replace(base, model=base.model.clone(dot_general_cls=dot, attend=attend))


def variables(
    params: tree.Tree, layers: Mapping[str, Layer], in_float: Collection[str], weight_only: bool
) -> dict[str, Any]:
    """Variables of the model with all `layers` quantised but those `in_float`."""
    leaves = tree.flatten({"params": params})
    for path, (kernel, bias, bound) in layers.items():
        on = path not in in_float
        if on:
            leaves[f"params/{path}/bias"] = bias
            leaves[f"params/{path}/kernel"] = (
                quantizer.dequantise(kernel) if weight_only else kernel.values.astype(jnp.float32)
            )
        leaves[f"{COLLECTION}/{path}/dot/on"] = jnp.asarray(on)
        leaves[f"{COLLECTION}/{path}/dot/scale"] = kernel.scale
        if bound is not None:
            leaves[f"{COLLECTION}/{path}/dot/bound"] = bound
    return tree.unflatten(leaves)


def divergence(p: np.ndarray, q: np.ndarray, multilabel: bool) -> float:
    """Mean Kullback-Leibler divergence of probabilities q `(n, C)` from p, in nats; multi-label: summed over the labels."""
    p, q = np.clip(p, 1e-12, 1), np.clip(q, 1e-12, 1)
    each = p * np.log(p / q)
    if multilabel:
        p, q = np.clip(1 - p, 1e-12, 1), np.clip(1 - q, 1e-12, 1)
        each = each + p * np.log(p / q)
    return float(np.mean(np.sum(each, axis=1)))
