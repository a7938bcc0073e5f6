"""Attention whose two products multiply int8 by int8 into int32, in training and after; softmax runs in float32 between them.

    q k^T: a scale for each query and each key            p v: one for each row of p, and each channel of v over the tokens

All scales come from the values at hand. Gradients are those of the products of s q, passed on as if rounding were the
identity, as those of `quantizer.trained_product`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array, lax

from vitft_jax.attention import masked_softmax
from vitft_jax.product import laid, transposed
from vitft_jax.quantizer import absmax, round_to, scale_of

F32 = jnp.float32
Residuals = tuple[Array, Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, y: Array, dtype: Dtype = F32) -> Array:
    """Batched ``x y`` of both sides in int8.

    Args:
        x: Float32 `(..., n, c)`, a scale for each row.
        y: Float32 `(..., c, m)`, a scale for each column.
        dtype: What the backward pass multiplies in.

    Returns:
        Float32 `(..., n, m)`.
    """
    return _forward(x, y, dtype)[0]


def _forward(x: Array, y: Array, dtype: Dtype) -> tuple[Array, Residuals]:
    x_scale, y_scale = scale_of(absmax(x, -1)), scale_of(absmax(y, -2))
    x, y = round_to(x, x_scale), round_to(y, y_scale)
    batch = tuple(range(x.ndim - 2))
    dimensions = (((x.ndim - 1,), (y.ndim - 2,)), (batch, batch))
    sums = lax.dot_general(x, y, dimensions, preferred_element_type=jnp.int32)
    return sums.astype(F32) * (x_scale * y_scale), (x, x_scale, y, y_scale)


def _backward(dtype: Dtype, residuals: Residuals, g: Array) -> tuple[Array, Array]:
    x, x_scale, y, y_scale = residuals
    multiply = partial(jnp.matmul, preferred_element_type=F32)
    # The integers are exact in any dtype, so the scales go to the other factor.
    by_y, by_x = laid((g * y_scale).astype(dtype)), laid((g * x_scale).astype(dtype))
    x, y = x.astype(dtype), y.astype(dtype)
    dx = multiply(by_y, transposed(y))
    if x.shape[-1] <= g.shape[-1]:  # the thinner one is transposed, see `attention`
        return dx, multiply(transposed(x), by_x)
    return dx, multiply(transposed(by_x), x).swapaxes(-1, -2)


product.defvjp(_forward, _backward)


def attend(q: Array, k: Array, v: Array, keys: Array | None = None) -> Array:
    """`attention.attend` with int8 products; arguments and result as there. Keys that are left out set no scale."""
    if keys is not None:
        v = jnp.where(keys[:, None, :, None], v, 0)
    scores = product((q * q.shape[-1] ** -0.5).astype(F32), k.swapaxes(2, 3).astype(F32), q.dtype)
    return product(masked_softmax(scores, keys), v.astype(F32), v.dtype).astype(v.dtype)
