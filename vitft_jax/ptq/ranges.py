"""Static ranges of activations: one number per layer, fixed before use."""

import jax.numpy as jnp
from jax import Array

from vitft_jax import quantizer
from vitft_jax.errors import InputError
from vitft_jax.ptq.observe import Seen

PERCENTILES = (100.0, 99.999, 99.99, 99.9)
TRAINED = "trained"
"""In the place of a way to find ranges: those with which the model was trained."""


def percentile(seen: Seen, p: float) -> Array:
    """The range that holds p percent of the sampled values; at 100, of all values."""
    return jnp.max(seen.absmax) if p == 100 else jnp.percentile(jnp.abs(seen.rows), p)


def least_error(seen: Seen) -> Array:
    """The one of `PERCENTILES` with the least squared error of the sampled values (as in RepQ-ViT, Li et al. 2022)."""
    bounds = [percentile(seen, p) for p in PERCENTILES]
    errors = [float(jnp.sum((quantizer.fake(seen.rows, bound) - seen.rows) ** 2)) for bound in bounds]
    return bounds[errors.index(min(errors))]


def share(how: str) -> float | None:
    """The percentile that `how` stands for, see `bound_of`; None for 'mse'.

    Raises:
        InputError: It is no way to find a range.
    """
    if how == "mse":
        return None
    try:
        p = 100.0 if how == "max" else float(how)
    except ValueError:
        raise InputError(
            f"--static {how}: mse, max, a percentile such as 99.99, or of a run that trained with static ranges, {TRAINED}"
        ) from None
    if not 0 < p <= 100:
        raise InputError(f"--static {how}: a percentile is above 0 and at most 100")
    return p


def bound_of(seen: Seen, how: str) -> Array:
    """The static range by 'mse' (`least_error`), 'max', or a percentile such as '99.99'.

    Raises:
        InputError: `how` is none of these.
    """
    p = share(how)
    return least_error(seen) if p is None else percentile(seen, p)
