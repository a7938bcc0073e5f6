"""PiSSA: a LoRA adapter that starts as the principal part of its kernel (Meng et al. 2024, arXiv:2404.02948, eq. 2-4).

    W = U S V^T,   A = U_r (S_r / s)^(1/2),   B = (S_r / s)^(1/2) V_r^T,   y = x (W - U_r S_r V_r^T) + s (x A) B

At the start this is x W. The largest r singular directions train, the residual is frozen in the kernel's place; all else is
LoRA, with its settings in ``config.lora`` and its collection.

A checkpoint holds the trained A and B; the residual is made anew from the base weights whenever a run is built. That is safe
because the residual is a function of W alone: signs and rotations among singular vectors cancel in U_r S_r V_r^T, and the
decomposition is in float64, so machines differ in the last digit of a float32 at most. The one exception, singular values r
and r + 1 that coincide, is refused.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from vitft_jax import tree
from vitft_jax.errors import InputError
from vitft_jax.methods import Method, Variables, lora

GAP = 1e-8
"""Least difference of the squared singular values r and r + 1, relative to the largest; keeps rounding below float32's."""


def principal(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of a kernel `(in, out)` by a product: U_r S_r^(1/2) `(in, r)` and S_r^(1/2) V_r^T `(r, out)`.

    In float64, by the eigenvectors of the smaller Gram matrix, several times as fast as a singular value decomposition.

    Raises:
        ValueError: The rank is too large, or the approximation is not unique.
    """
    rows, columns = kernel.shape
    if rank > min(rows, columns):
        raise ValueError(f"a {rows} x {columns} kernel has no principal part of rank {rank}")
    if rows > columns:
        left, right = principal(kernel.T, rank)
        return right.T, left.T
    kernel = kernel.astype(np.float64)
    squares, vectors = np.linalg.eigh(kernel @ kernel.T)  # ascending
    squares, vectors = squares[::-1], vectors[:, ::-1]
    rest = squares[rank] if rank < rows else 0.0
    if not squares[rank - 1] - rest > GAP * squares[0]:
        raise ValueError(f"its principal part of rank {rank} is not unique, the next singular value is as large")
    root = squares[:rank] ** 0.25
    u = vectors[:, :rank]
    return u * root, u.T @ kernel / root[:, None]


def prepare(variables: Variables, settings: lora.Settings) -> Variables:
    """Moves the principal part of each adapted kernel into its adapter.

    Raises:
        InputError: A kernel has no principal part of that rank.
    """

    def move(path: str, kernel: Array, adapter: dict[str, Array]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rank = adapter["a"].shape[1]
        try:
            left, right = principal(np.asarray(kernel), rank)
        except ValueError as error:
            raise InputError(f"pissa: {path}: {error}; choose another rank by lora.rank or lora.rank_pattern") from None
        # From the unrounded factors, since those of another machine round differently.
        residual = (kernel - left @ right).astype(np.float32)
        root = math.sqrt(settings.scale(rank))
        return residual, {"a": (left / root).astype(np.float32), "b": (right / root).astype(np.float32)}

    return lora.map_layers(move, variables)


def to_lora(trained: Variables, initial: Variables, settings: lora.Settings) -> tuple[dict[str, Any], lora.Settings]:
    """The same model as LoRA of twice the rank on the unchanged kernels: A' = [A, A_0], B' = [B; -B_0].

    Args:
        trained: The adapters after training, a collection.
        initial: Those that `prepare` made.
        settings: Of both.

    Returns:
        The collection of LoRA, and its settings; the factor s stays what it was.
    """
    start = tree.flatten(initial)

    def double(name: str, leaf: Array) -> Array:
        if name.endswith("/a"):
            return jnp.concatenate([leaf, start[name]], axis=1)
        return jnp.concatenate([leaf, -start[name]], axis=0)

    doubled = replace(
        settings,
        rank=2 * settings.rank,
        alpha=settings.alpha * (math.sqrt(2) if settings.rs else 2),
        rank_pattern=tuple((pattern, 2 * rank) for pattern, rank in settings.rank_pattern),
    )
    return tree.map_named(double, trained), doubled


def method(config: Any) -> Method:
    """Builds PiSSA from ``config.lora``.

    Raises:
        InputError: As `lora.settings_of`.
    """
    return replace(lora.method(config), prepare=partial(prepare, settings=lora.settings_of(config)))
