"""Multi-head attention of full rows, with a backward pass laid out for speed.

On a CPU a batched product is slow when it reads its large (tokens x tokens) matrix along the columns, as autodiff's backward
does with the probabilities for dV and with the gradient of the scores for dK. Here both products are written as
``small^T @ large``, so that only the thin (tokens x head width) matrices are ever transposed. How much it gives depends on
the number of tokens: `python scripts/benchmark.py attention --model vit_small_patch14` compares with autodiff.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from vitft_jax.product import laid, transposed

F32 = jnp.float32
Attend = Callable[[Array, Array, Array, Array | None], Array]
"""What `attend` is, so that another function can stand in its place."""


def masked_softmax(scores: Array, keys: Array | None) -> Array:
    """Softmax over the last axis of scores `(B, H, N, M)` where `keys`, bool `(B, M)` or None for all, is true."""
    if keys is not None:  # their exponentials are exactly 0, and so are the gradients of their scores
        scores = jnp.where(keys[:, None, None, :], scores, -1e30)
    return jax.nn.softmax(scores, axis=-1)


def _probabilities(q: Array, k: Array, keys: Array | None) -> Array:
    """Softmax over keys of ``q k^T``; q `(B,H,N,d)` is already scaled. Returns `(B,H,N,M)` in float32."""
    return masked_softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=F32), keys)


@jax.custom_vjp
def attend(q: Array, k: Array, v: Array, keys: Array | None = None) -> Array:
    """Attention ``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, eq. 1), softmax in float32.

    Args:
        q: Queries, `(B, H, N, d)`.
        k: Keys, `(B, H, M, d)`.
        v: Values, `(B, H, M, d)`.
        keys: Which keys there are, bool `(B, M)`, at least one in each row; None = all.

    Returns:
        `(B, H, N, d)` in the dtype of `v`.
    """
    return _forward(q, k, v, keys)[0]


def _forward(q: Array, k: Array, v: Array, keys: Array | None) -> tuple[Array, tuple[Array, ...]]:
    q, k, v = laid(q), laid(k), laid(v)
    p = _probabilities(laid(q * q.shape[-1] ** -0.5), k, keys).astype(v.dtype)
    out = jnp.einsum("bhnm,bhmd->bhnd", p, v)
    return out, (q, k, v, p, out)


def _backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, p, out = residuals
    scale = q.shape[-1] ** -0.5
    g = laid(g)
    dv = jnp.einsum("bhdn,bhnm->bhdm", transposed(g), p).swapaxes(2, 3)
    dp = jnp.einsum("bhnd,bhmd->bhnm", g, v, preferred_element_type=F32)
    # Row sums of p * dp, from the output instead of the large matrices (Dao et al. 2022, FlashAttention, eq. 4).
    delta = jnp.sum(g.astype(F32) * out.astype(F32), axis=-1, keepdims=True)
    ds = (p * (dp - delta)).astype(q.dtype)
    dq = jnp.einsum("bhnm,bhmd->bhnd", ds, laid(k * scale))
    dk = jnp.einsum("bhdn,bhnm->bhdm", transposed(q * scale), ds).swapaxes(2, 3)
    return dq, dk, dv, None


attend.defvjp(_forward, _backward)


def prefix_rows(q: Array, k: Array, prefix: int, keys: Array | None = None) -> Array:
    """Attention that the prefix tokens (class, distillation) pay to every token: `(B, H, prefix, M)` in float32.

    Equal to the first rows of the full matrix at a cost of `prefix` rows, so it works beside any fused attention. `keys` as
    in `attend`.
    """
    return _probabilities(q[:, :, :prefix] * q.shape[-1] ** -0.5, k, keys)
