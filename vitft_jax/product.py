"""The product of a linear layer, with a backward pass laid out for speed.

XLA's fast bfloat16 products on a CPU (AMX) read row-major matrices. Where an operand is transposed, as autodiff's backward
pass has it, it converts both to float32 and multiplies those, ten times slower or more. So here an operand is first transposed
in memory, and of the two in a kernel's gradient it is the thinner one. `python scripts/benchmark.py linear --dtype bfloat16`
compares with autodiff.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

_PORTABLE = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """Within it `laid` does nothing, since `jax.export` serialises no layouts; for traces that are exported."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def laid(x: Array) -> Array:
    """The same array, row-major in memory on a CPU; on other devices as the compiler likes."""
    if _PORTABLE.get():
        return x
    order = Layout(tuple(range(x.ndim)))
    return lax.platform_dependent(x, cpu=lambda x: with_layout_constraint(x, order), default=lambda x: x)


def transposed(x: Array) -> Array:
    """`(..., m, n)` to `(..., n, m)`, `laid`."""
    return laid(x.swapaxes(-1, -2))


def input_gradient(g: Array, w: Array) -> Array:
    """``g w^T``: `(..., out)` and `(in, out)` to `(..., in)`."""
    if w.dtype == jnp.float32:  # these products read a transposed kernel as fast as another
        product = lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))
    else:
        product = g @ transposed(w)
    # The barrier keeps XLA from fusing this product with that of the next layer, which is slower than the two.
    return lax.optimization_barrier(product)


def kernel_gradient(x: Array, g: Array) -> Array:
    """``x^T g`` over all rows: `(..., in)` and `(..., out)` to `(in, out)`."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if x.shape[1] <= g.shape[1]:
        return transposed(x) @ g
    # Without the barrier XLA rewrites this as x^T g again.
    return lax.optimization_barrier(transposed(g) @ x).T


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """``x w``: `(..., in)` and `(in, out)` to `(..., out)`, in the dtype of both."""
    return x @ w


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    return input_gradient(g, w), kernel_gradient(x, g)


matmul.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    """`matmul`, called as a linear layer of Flax calls `lax.dot_general`; the kernel is cast to the dtype of x."""
    return matmul(x, kernel.astype(x.dtype))
