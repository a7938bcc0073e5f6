"""DoRA: LoRA with a trained magnitude for every output (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    y = x (m / n) V        V = W + s A B,   n = ||V|| per column, that is, per output,   m: (out,)

m starts at ||W||, so a fresh adapter changes nothing. No gradient goes through n (section 4.3 of the paper): V itself is
formed once a step and layer, only for its norm. Thin products could replace it, as in ||w + A b||^2 = ||w||^2 + ...; on a
CPU they were no faster, and they lose digits where the adapter cancels a column.

With dropout, as in PEFT, y = x W + (m / n - 1) drop(x) W + (m / n) s (drop(x) A) B, at the price of a second product with
the kernel. Settings are those of LoRA, in ``config.lora``.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from vitft_jax.methods import Method, Variables, lora


class DoraDot(lora.LoraDot):
    """A product with a DoRA adapter beside it; `prepare` sets the magnitudes."""

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        product = partial(self.base(), **kwargs)
        y = product(x, kernel, dimensions)
        if not self.rank:
            return y
        a, b = self.factors(kernel)
        m = self.variable(lora.COLLECTION, "m", jnp.ones, kernel.shape[1]).value
        gain = m / norms(*lax.stop_gradient((kernel, {"a": a, "b": b})), self.settings)
        dropped = self.drop(x)
        turned = y if dropped is x else product(dropped, kernel, dimensions)
        # gain - 1 in float32: in bfloat16 it would vanish below 1/256.
        return y + (gain - 1).astype(y.dtype) * turned + gain.astype(y.dtype) * self.low(dropped, a, b)


def norms(kernel: Array, adapter: dict[str, Array], settings: lora.Settings) -> Array:
    """n, the norm of every column of V, `(out,)` in float32; above 0 even where a column is 0."""
    n = jnp.linalg.norm(kernel + lora.delta(adapter, settings), axis=0)
    return jnp.maximum(n, jnp.finfo(jnp.float32).tiny)


def prepare(variables: Variables, settings: lora.Settings) -> Variables:
    """Sets every magnitude to the norm of its column."""
    return lora.map_layers(
        lambda _, kernel, adapter: (kernel, {**adapter, "m": norms(kernel, adapter, settings)}), variables
    )


def merge(variables: Variables, settings: lora.Settings) -> Variables:
    """Folds the adapters into the kernels: (m / n) V."""

    def kernel_of(kernel: Array, adapter: dict[str, Array]) -> Array:
        return adapter["m"] / norms(kernel, adapter, settings) * (kernel + lora.delta(adapter, settings))

    return lora.fold(kernel_of, variables)


def method(config: Any) -> Method:
    """Builds DoRA from ``config.lora``.

    Raises:
        InputError: As `lora.settings_of`.
    """
    settings = lora.settings_of(config)
    plain = lora.method(config)
    return replace(
        plain,
        sharding=(*plain.sharding, (r"/dot/m$", ("out",))),
        dot=lambda base: partial(DoraDot, settings, base, name="dot"),
        prepare=partial(prepare, settings=settings),
        merge=partial(merge, settings=settings),
    )
