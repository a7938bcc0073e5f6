import jax.numpy as jnp
import numpy as np
import pytest

from vitft_jax.ptq import softmax

EDGES = 1e-6  # of a value from the border between two integers


def test_log2_is_the_table():
    for q in range(16):
        inside = jnp.array([2.0 ** -(q + 0.5) * (1 + EDGES), 2.0**-q, min(1.0, 2.0 ** -(q - 0.5) * (1 - EDGES))])
        np.testing.assert_array_equal(softmax.log2(inside, 4), 2.0**-q)
    np.testing.assert_array_equal(softmax.log2(jnp.array([2.0**-16, 1e-30, 0.0]), 4), 0)
    assert softmax.log2(jnp.float32(2.0**-16), 8) == 2.0**-16


def test_log_sqrt2_is_the_table_of_powers_of_two_and_those_times_the_root():
    """As its paper writes it: 2^-ceil(q/2), times the square root of 2 where q is odd."""
    for q in range(16):
        value = 2.0 ** -np.ceil(q / 2) * (np.sqrt(2) if q % 2 else 1)
        inside = jnp.array(
            [2.0 ** -(q / 2 + 0.25) * (1 + EDGES), value, min(1.0, 2.0 ** -(q / 2 - 0.25) * (1 - EDGES))]
        )
        np.testing.assert_allclose(softmax.log_sqrt2(inside, 4), value, rtol=1e-6)
    np.testing.assert_array_equal(softmax.log_sqrt2(jnp.array([2.0**-8, 1e-30, 0.0]), 4), 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("split", [2**-2, 2**-3])
def test_twin_is_monotone_and_no_further_than_half_a_step_on_either_side(bits, split):
    p = jnp.linspace(0, 1, 20001)
    values = softmax.twin(p, bits, split)
    assert (jnp.diff(values) >= -1e-7).all()
    fine, coarse = softmax.twin_steps(bits, split)
    assert fine < coarse
    error = jnp.abs(values - p)
    assert (error[p < split] <= fine / 2 * (1 + 1e-4)).all()
    assert (error[p >= split] <= coarse / 2 * (1 + 1e-4)).all()
    assert len(np.unique(np.asarray(values).round(6))) <= 2**bits
    assert softmax.twin(jnp.float32(0.3), 8, 0.25) == pytest.approx(0.3, abs=1 / 254)  # both steps added give 0.549
