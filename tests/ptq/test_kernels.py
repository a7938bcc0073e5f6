import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitft_jax import quantizer
from vitft_jax.ptq import kernels

KERNEL = jax.random.t(jax.random.key(0), 3, (64, 10)).at[:, 0].set(0)  # heavy tails, and a dead channel
ROWS = jax.random.normal(jax.random.key(1), (200, 64)) + 0.5


def errors(clip, bits):
    return jnp.sum((quantizer.dequantise(quantizer.quantise_kernel(KERNEL, bits, clip)) - KERNEL) ** 2, axis=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_clipping_is_never_worse_than_the_largest_value_and_best_among_its_choices(bits):
    clip = kernels.clip_search(KERNEL, bits)
    best = errors(clip, bits)
    assert (best <= errors(1.0, bits)).all()
    for other in kernels.CLIPS:
        assert (best <= errors(other, bits) * (1 + 1e-6)).all()
    if bits == 4:
        assert (best < errors(1.0, bits))[1:].all()  # with few integers every channel has something to gain
    assert clip[0] == 1  # nothing to gain


@pytest.mark.parametrize("weight_only", [False, True])
def test_bias_correction_takes_away_the_mean_error(weight_only):
    integers = quantizer.quantise_kernel(KERNEL, 4)
    bias = kernels.mean_error(ROWS, KERNEL, integers, None, weight_only)
    error = ROWS @ KERNEL - quantizer.frozen_product(ROWS, integers, None, weight_only)
    assert jnp.abs(error.mean(0)).max() > 0.1
    np.testing.assert_allclose((error - bias).mean(0), 0, atol=1e-5)
    assert ((error - bias) ** 2).sum() < (error**2).sum()


def test_signal_to_noise_is_in_decibel():
    """6.02 dB for each bit; the integers' errors are those of uniform rounding."""
    zero = jnp.zeros(10)
    values = [
        float(kernels.signal_to_noise(ROWS, KERNEL, zero, quantizer.quantise_kernel(KERNEL, b), zero, None, True))
        for b in (4, 8)
    ]
    assert values[1] - values[0] == pytest.approx(4 * 6.02, abs=1.5)
    out = ROWS @ quantizer.dequantise(quantizer.quantise_kernel(KERNEL, 4))
    exact = ROWS @ KERNEL
    assert values[0] == pytest.approx(float(10 * jnp.log10((exact**2).sum() / ((out - exact) ** 2).sum())), abs=0.01)
