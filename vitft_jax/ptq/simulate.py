"""The quantised model in float arithmetic, where each layer can be switched back to float without compiling anew.

For asking many times which layers to quantise; integers of up to 127 and their sums are exact in float32 up to rounding.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vitft_jax import quantizer, tree
from vitft_jax.quantizer import Quantised
from vitft_jax.step import Program

COLLECTION = "simulated"


class Layer(NamedTuple):
    """A quantised layer: integers, the bias that goes with them, and the static range of its input or None."""

    kernel: Quantised
    bias: Array
    bound: Array | None


class SimulatedDot(nn.Module):
    """A float product whose input is rounded to what int8 can say, where its switch is on."""

    paths: frozenset[str]
    static: bool
    weight_only: bool

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        if "/".join(self.path[:-1]) in self.paths and not self.weight_only:
            on = self.variable(COLLECTION, "on", lambda: jnp.ones(())).value
            bound = self.variable(COLLECTION, "bound", lambda: jnp.ones(())).value if self.static else None
            x = jnp.where(on > 0, quantizer.fake(x, bound).astype(x.dtype), x)
        return lax.dot_general(x, kernel, dimensions, **kwargs)


def program(base: Program, layers: Mapping[str, Layer], static: bool, weight_only: bool) -> Program:
    """The simulated program; its variables are those of `variables`."""
    dot = partial(SimulatedDot, frozenset(layers), static, weight_only, name="dot")
    return replace(base, model=base.model.clone(dot_general_cls=dot))


def variables(params: tree.Tree, layers: Mapping[str, Layer], in_float: Collection[str]) -> dict[str, Any]:
    """Variables of the model with all `layers` quantised but those `in_float`."""
    leaves = tree.flatten({"params": params})
    for path, layer in layers.items():
        on = path not in in_float
        if on:
            leaves[f"params/{path}/kernel"] = quantizer.dequantise(layer.kernel)
            leaves[f"params/{path}/bias"] = layer.bias
        leaves[f"{COLLECTION}/{path}/dot/on"] = jnp.float32(on)
        if layer.bound is not None:
            leaves[f"{COLLECTION}/{path}/dot/bound"] = layer.bound
    return tree.unflatten(leaves)


def divergence(p: np.ndarray, q: np.ndarray, multilabel: bool) -> float:
    """Mean Kullback-Leibler divergence of probabilities q `(n, C)` from p, in nats; multi-label: summed over the labels."""
    p, q = np.clip(p, 1e-12, 1), np.clip(q, 1e-12, 1)
    each = p * np.log(p / q)
    if multilabel:
        p, q = np.clip(1 - p, 1e-12, 1), np.clip(1 - q, 1e-12, 1)
        each = each + p * np.log(p / q)
    return float(np.mean(np.sum(each, axis=1)))
