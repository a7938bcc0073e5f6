"""Symmetric integer quantisation in plain JAX, and products of quantised matrices with straight-through gradients.

    s = max |x| / b,   q = round(clip(x / s, -n, n)),   x ~ s q        n = 2^(bits - 1) - 1,   b = n + 1/2

Rounding is half to even. The largest value falls on the far edge of the last integer's interval, so that no value is further
than s / 2 from s q (as in AQT, Abdolrashidi et al. 2021, arXiv:2105.03536). Kernels have a scale per output channel,
activations one per token, taken from the values at hand (dynamic), or one per layer, fixed beforehand (static).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from vitft_jax.product import input_gradient, kernel_gradient

F32 = jnp.float32
Product = Callable[[Array, Array, Array | None], Array]


class Quantised(NamedTuple):
    """A kernel in integers.

    Attributes:
        values: int8 `(in, out)`, whatever the number of bits.
        scale: Float32, one for each output, `(out,)`.
    """

    values: Array
    scale: Array


def edge(bits: int) -> float:
    """b, the far edge of the last integer's interval: 127.5 for 8 bits."""
    return 2.0 ** (bits - 1) - 0.5


def scale_of(largest: Array, bits: int = 8) -> Array:
    """The scale s of values up to `largest` in magnitude; 1/b where that is 0."""
    return jnp.where(largest == 0, 1.0, largest.astype(F32)) * (1 / edge(bits))


def absmax(x: Array, axis: int | None) -> Array:
    """Largest magnitude along an axis, which stays with size 1, in float32; NaN where there is one."""
    return jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None).astype(F32)


def round_to(x: Array, scale: Array, bits: int = 8) -> Array:
    """The integers q of x, as int8."""
    n = edge(bits) - 0.5
    return jnp.round(jnp.clip(x.astype(F32) * (1 / scale), -n, n)).astype(jnp.int8)


def quantise_kernel(kernel: Array, bits: int = 8, clip: Array | float = 1.0) -> Quantised:
    """Quantises a kernel `(in, out)` per output channel; `clip` times its largest magnitude is where a channel saturates."""
    scale = scale_of(clip * absmax(kernel, 0)[0], bits)
    return Quantised(round_to(kernel, scale, bits), scale)


def dequantise(kernel: Quantised) -> Array:
    """The kernel in float32."""
    return kernel.values.astype(F32) * kernel.scale


def activation_scale(x: Array, bound: Array | None) -> Array:
    """Scale of activations `(..., in)`: per token `(..., 1)`, or of the static range up to `bound` where that is given."""
    return scale_of(absmax(x, -1) if bound is None else bound)


def fake(x: Array, bound: Array | None = None) -> Array:
    """Activations `(..., in)` as the integer product sees them, s q, in float32."""
    scale = activation_scale(x, bound)
    return round_to(x, scale).astype(F32) * scale


def _forward(x: Array, kernel: Quantised, bound: Array | None, weight_only: bool) -> Array:
    if weight_only:
        return x @ dequantise(kernel).astype(x.dtype)
    scale = activation_scale(x, bound)
    sums = lax.dot_general(
        round_to(x, scale), kernel.values, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return (sums.astype(F32) * (scale * kernel.scale)).astype(x.dtype)


def _to_input(dy: Array, x: Array, kernel: Quantised, bound: Array | None) -> Array:
    """Gradient by x: dy times the transposed kernel; nothing passes where a static range saturates."""
    dx = input_gradient(dy * kernel.scale.astype(dy.dtype), kernel.values.astype(dy.dtype))
    return dx if bound is None else jnp.where(jnp.abs(x) <= bound, dx, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_product(x: Array, kernel: Quantised, bound: Array | None = None, weight_only: bool = False) -> Array:
    """Product with a kernel that is stored in integers and gets no gradient.

    int8 by int8 into int32, then scaled; the backward pass multiplies in float by the kernel that the integers stand for.

    Args:
        x: Activations, `(..., in)`.
        kernel: Of `in` by `out`.
        bound: Static range of x, a scalar; None is one scale per token, from x itself.
        weight_only: Leaves x in float.

    Returns:
        `(..., out)` in the dtype of x.
    """
    return _forward(x, kernel, bound, weight_only)


def _frozen_forward(
    x: Array, kernel: Quantised, bound: Array | None, weight_only: bool
) -> tuple[Array, tuple[Array | None, Quantised, Array | None]]:
    # x is kept only where the backward pass reads it.
    return _forward(x, kernel, bound, weight_only), (None if bound is None else x, kernel, bound)


def _frozen_backward(
    weight_only: bool, residuals: tuple[Array | None, Quantised, Array | None], dy: Array
) -> tuple[Array, None, None]:
    return _to_input(dy, *residuals), None, None


frozen_product.defvjp(_frozen_forward, _frozen_backward)


def trained_product(bits: int = 8, weight_only: bool = False, multiply: Product | None = None) -> Product:
    """A product that quantises both sides anew at every call, with straight-through gradients (Bengio et al. 2013).

    Gradients are those of the product of s q of both sides, passed on as if rounding were the identity; nothing passes
    to x where a static range saturates.

    Args:
        bits: Of the kernel.
        weight_only: Leaves x in float.
        multiply: The forward pass of another library, called as what is returned; None is our own.

    Returns:
        ``product(x, kernel, bound)``, x `(..., in)`, a float kernel `(in, out)` and the static range of x or None to
        `(..., out)` in the dtype of x.
    """

    @jax.custom_vjp
    def product(x: Array, kernel: Array, bound: Array | None = None) -> Array:
        if multiply is not None:
            return multiply(x, kernel, bound)
        return _forward(x, quantise_kernel(kernel, bits), bound, weight_only)

    def forward(x: Array, kernel: Array, bound: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
        return product(x, kernel, bound), (x, kernel, bound)

    def backward(residuals: tuple[Array, Array, Array | None], dy: Array) -> tuple[Array, Array, None]:
        x, kernel, bound = residuals
        seen = x if weight_only else fake(x, bound).astype(dy.dtype)
        dx = _to_input(dy, x, quantise_kernel(kernel, bits), bound)
        return dx.astype(x.dtype), kernel_gradient(seen, dy).astype(kernel.dtype), None

    product.defvjp(forward, backward)
    return product
