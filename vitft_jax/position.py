"""Position embeddings for another image size: bicubic resampling of the square grid they were trained on.

The two libraries that published the weights resample differently, and a classifier notices. Hugging Face interpolates
(Keys' cubic with a = -0.75, borders repeated); timm also lets the kernel grow when the grid shrinks (antialiasing, with
a = -0.5 and the weights renormalised at the borders). Both are separable, so each is one small matrix per axis.
"""

import math

import numpy as np


def grid_side(rows: int) -> int:
    """Side of the square grid with `rows` positions.

    Raises:
        ValueError: `rows` is not a square.
    """
    side = math.isqrt(max(rows, 0))
    if side * side != rows or not side:
        raise ValueError(f"{rows} positions are not a square grid")
    return side


def resize_matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """Matrix `(new, old)` in float64 that resamples one axis; pixel centres correspond (`align_corners=False`).

    Args:
        old: Positions along the axis.
        new: Wanted positions.
        antialias: Widen the kernel by `old / new` where that is above 1, as timm does.
    """
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale
    if not antialias:
        taps = np.floor(centre - 0.5).astype(int)[:, None] + np.arange(-1, 3)
        weights = _cubic(centre[:, None] - (taps + 0.5), a=-0.75)
        matrix = np.zeros((new, old))
        # Taps beyond the border read the border, so several weights may land in one column.
        np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weights)
        return matrix
    matrix = _cubic((centre[:, None] - (np.arange(old) + 0.5)) / max(scale, 1.0), a=-0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize(position: np.ndarray, prefix: int, side: int, antialias: bool) -> np.ndarray:
    """Resamples position embeddings to a grid of `side` by `side`.

    Args:
        position: `(1, prefix + n * n, D)`.
        prefix: Positions of the class and distillation tokens, which come first and stay as they are.
        side: Side of the wanted grid.
        antialias: See `resize_matrix`.

    Returns:
        `(1, prefix + side * side, D)` in the dtype of `position`; the same array where the size agrees.

    Raises:
        ValueError: The positions after the prefix are not a square grid.
    """
    old = grid_side(position.shape[1] - prefix)
    if old == side:
        return position
    matrix = resize_matrix(old, side, antialias)
    grid = position[0, prefix:].reshape(old, old, -1)
    # One axis at a time, as two matrix products.
    grid = np.tensordot(matrix, np.tensordot(matrix, grid, (1, 0)), (1, 1)).swapaxes(0, 1)
    grid = grid.reshape(1, side * side, -1).astype(position.dtype)
    return np.concatenate([position[:, :prefix], grid], axis=1)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (Keys 1981, eq. 4), zero beyond 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
