"""Float kernels to integers: where channels saturate, and the bias that takes up the mean error."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from vitft_jax import quantizer
from vitft_jax.quantizer import Quantised

CLIPS = tuple(1 - i / 40 for i in range(21))  # 1 down to 0.5; 1 first, so that of equal errors nothing is clipped


@partial(jax.jit, static_argnames="bits")
def clip_search(kernel: Array, bits: int = 8) -> Array:
    """Share of its largest magnitude where each output channel saturates, `(out,)`, with the least squared error."""

    def errors(clip: Array) -> Array:
        return jnp.sum((quantizer.dequantise(quantizer.quantise_kernel(kernel, bits, clip)) - kernel) ** 2, axis=0)

    clips = jnp.asarray(CLIPS)
    return clips[jnp.argmin(lax.map(errors, clips), axis=0)]


@partial(jax.jit, static_argnames="weight_only")
def mean_error(rows: Array, exact: Array, kernel: Quantised, bound: Array | None, weight_only: bool) -> Array:
    """E[x W - q(x) q(W)] over the rows, `(out,)`: what is added to the bias (Nagel et al. 2019, arXiv:1906.04721, sec. 4.2).

    Args:
        rows: Inputs, `(R, in)`.
        exact: The float kernel.
        kernel: Its integers.
        bound: Static range, or None.
        weight_only: Inputs stay in float.
    """
    return jnp.mean(rows @ exact - quantizer.frozen_product(rows, kernel, bound, weight_only), axis=0)


@partial(jax.jit, static_argnames="weight_only")
def signal_to_noise(
    rows: Array, exact: Array, bias: Array, kernel: Quantised, new_bias: Array, bound: Array | None, weight_only: bool
) -> Array:
    """Signal-to-noise ratio of the layer's output, in dB: power of the float output over power of the error."""
    signal = rows @ exact + bias
    noise = quantizer.frozen_product(rows, kernel, bound, weight_only) + new_bias - signal
    return 10 * jnp.log10(jnp.sum(signal**2) / jnp.sum(noise**2))
