"""Quantisers of attention probabilities that suit their heavy tail: a study (`scripts/compare_softmax.py`), not in the recipe.

Each gives the values that the integers stand for, of p in 0..1. int8 attention itself (`quantized_attention`) takes the
plain signed quantiser with a scale for each row.
"""

import jax.numpy as jnp
from jax import Array


def log2(p: Array, bits: int) -> Array:
    """2^-q, q = round(-log2 p) (Lin et al. 2022, arXiv:2111.13824, FQ-ViT); 0 where q is beyond 2^bits - 1."""
    q = jnp.round(-jnp.log2(p))
    return jnp.where(q < 2**bits, _halved(q), 0.0)


def log_sqrt2(p: Array, bits: int) -> Array:
    """2^(-q/2), q = round(-2 log2 p) (Li et al. 2023, arXiv:2212.08254, RepQ-ViT); 0 where q is beyond 2^bits - 1."""
    q = jnp.round(-2 * jnp.log2(p))
    return jnp.where(q < 2**bits, _halved(jnp.ceil(q / 2)) * jnp.where(q % 2 == 1, 2**0.5, 1.0), 0.0)


def _halved(times: Array) -> Array:
    """1 halved so many times, exactly, which exp2 is not on every processor."""
    return jnp.ldexp(1.0, -jnp.minimum(times, 126).astype(jnp.int32))


def twin_steps(bits: int, split: float) -> tuple[float, float]:
    """The steps of `twin` below and above `split`."""
    last = 2 ** (bits - 1) - 1
    return split / last, 1 / last


def twin(p: Array, bits: int, split: float = 2**-3) -> Array:
    """Two uniform steps, a fine one below `split` and a coarse one above (Yuan et al. 2022, arXiv:2111.12293, PTQ4ViT).

    One of the bits says which. The paper's code adds what both steps give for a value; this takes the one that it falls under.
    """
    fine, coarse = twin_steps(bits, split)
    return jnp.where(p < split, fine * jnp.round(p / fine), coarse * jnp.round(p / coarse))
