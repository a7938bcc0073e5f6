"""Properties of quantisation itself, and the contract of a product that trains, on both backends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vitft_jax import quantizer
from vitft_jax.methods import quant
from vitft_jax.quantizer import Quantised

X = jax.random.normal(jax.random.key(0), (3, 7, 16)) * 10.0 ** jnp.linspace(-3, 3, 7)[:, None]
KERNEL = jax.random.normal(jax.random.key(1), (16, 5)) * jnp.array([0.01, 1, 1, 30, 1])
BACKENDS = {"aqt": quant.trained_product, "reference": quantizer.trained_product}
KINDS = [(8, False), (4, False), (8, True), (4, True)]


def oracle(x, axis, bits=8):
    """Integers and scale of the formulas in `quantizer`, by numpy in float32."""
    n = np.float32(2 ** (bits - 1) - 1)
    largest = np.abs(x).max(axis=axis, keepdims=True)
    scale = np.where(largest == 0, np.float32(1), largest) * (np.float32(1) / (n + np.float32(0.5)))
    return np.round(np.clip(x * (np.float32(1) / scale), -n, n)), scale


def straight(x, axis, value, bits=8):
    """x + stop_gradient(s q(x) - x) at x = `value`, from which autodiff makes straight-through gradients."""
    integers, scale = oracle(np.asarray(value), axis, bits)
    return x + lax.stop_gradient(integers * scale - x)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_stay_in_range_and_no_value_moves_further_than_half_a_step(bits):
    q = quantizer.quantise_kernel(KERNEL, bits)
    n = 2 ** (bits - 1) - 1
    assert q.values.dtype == jnp.int8
    assert int(jnp.abs(q.values).max()) == n
    assert (jnp.abs(quantizer.dequantise(q) - KERNEL) <= q.scale / 2 * (1 + 1e-5)).all()


def test_per_channel_is_no_worse_than_per_tensor_and_much_better_for_the_small_channel():
    per_channel = (quantizer.dequantise(quantizer.quantise_kernel(KERNEL)) - KERNEL) ** 2
    scale = quantizer.scale_of(quantizer.absmax(KERNEL, None))
    per_tensor = (quantizer.round_to(KERNEL, scale) * scale - KERNEL) ** 2
    assert per_channel.sum() <= per_tensor.sum()
    assert per_channel[:, 0].sum() < 1e-3 * per_tensor[:, 0].sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_again_with_the_same_scale_changes_nothing(bits):
    q = quantizer.quantise_kernel(KERNEL, bits)
    np.testing.assert_array_equal(quantizer.round_to(quantizer.dequantise(q), q.scale, bits), q.values)


def test_zeros_are_exact():
    q = quantizer.quantise_kernel(jnp.zeros((4, 3)))
    assert np.isfinite(q.scale).all()
    assert not quantizer.dequantise(q).any()
    assert not quantizer.frozen_product(jnp.zeros((2, 16)), quantizer.quantise_kernel(KERNEL)).any()


def test_ties_round_to_even():
    scale = jnp.float32(1)
    np.testing.assert_array_equal(
        quantizer.round_to(jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, 300]), scale), [0, 2, 2, 0, -2, 127]
    )


def test_a_clipped_channel_saturates():
    q = quantizer.quantise_kernel(KERNEL, clip=0.5)
    beyond = jnp.abs(KERNEL) >= 0.5 * jnp.abs(KERNEL).max(0)
    error = jnp.abs(quantizer.dequantise(q) - KERNEL) / q.scale
    assert (jnp.abs(q.values)[beyond] == 127).all()
    assert (error[~beyond] <= 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "weight_only"), KINDS)
def test_forward_equals_the_oracle(backend, bits, weight_only):
    """To the bit with our own; AQT multiplies the sums by one scale after the other."""
    y = BACKENDS[backend](bits, weight_only)(X, KERNEL)
    qw, sw = oracle(np.asarray(KERNEL), 0, bits)
    if weight_only:
        np.testing.assert_allclose(y, X @ (qw * sw), rtol=1e-5, atol=1e-6 * float(jnp.abs(X).max()))
    else:
        qx, sx = oracle(np.asarray(X), -1)
        expected = (qx @ qw) * (sx * sw)
        if backend == "reference":
            np.testing.assert_array_equal(y, expected)
        else:
            np.testing.assert_allclose(y, expected, rtol=3e-7)  # two roundings more


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "weight_only"), KINDS)
def test_gradients_are_straight_through_those_of_the_quantised_product(backend, bits, weight_only):
    x = X[:, 2:5]  # of one size, so that a tolerance says something for each
    product = BACKENDS[backend](bits, weight_only)

    g = jax.random.normal(jax.random.key(2), (*x.shape[:-1], 5))

    def grads(function):
        return jax.vjp(function, x, KERNEL)[1](g)

    ours = grads(product)
    expected = grads(lambda a, b: (a if weight_only else straight(a, -1, x)) @ straight(b, 0, KERNEL, bits))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_static_range_is_the_oracle_and_passes_no_gradient_where_it_saturates(backend):
    x, g, bound = X[:, 2:5], jax.random.normal(jax.random.key(2), (3, 3, 5)), jnp.float32(1.5)
    y, pull = jax.vjp(BACKENDS[backend](8, False), x, KERNEL, bound)
    dx, dkernel, dbound = pull(g)
    (qw, sw), sx = oracle(np.asarray(KERNEL), 0), np.float32(1.5) / np.float32(127.5)
    qx = np.round(np.clip(np.asarray(x) / sx, -127, 127))
    np.testing.assert_allclose(y, (qx @ qw) * (sx * sw), rtol=3e-7, atol=0)
    inside = np.abs(x) <= bound
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_array_equal(dx[~inside], 0)
    np.testing.assert_allclose(dx[inside], (g @ (qw * sw).T)[inside], rtol=1e-4, atol=1e-5)
    expected = (qx * sx).reshape(-1, 16).T @ g.reshape(-1, 5)
    np.testing.assert_allclose(dkernel, expected, rtol=1e-5, atol=1e-5)
    assert not dbound


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_static_range_at_the_largest_value_is_the_dynamic_one_of_a_single_token_in_training(backend):
    product, x = BACKENDS[backend](8, False), X[0, 3]
    np.testing.assert_array_equal(product(x, KERNEL, jnp.abs(x).max()), product(x, KERNEL))
    assert not product(jnp.zeros((2, 16)), KERNEL, jnp.float32(0)).any()  # a layer that saw nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_pass_does_not_ignore_quantisation(backend):
    """The gradient by x is exactly the quantised kernel, and that by the kernel the quantised x: neither is the float one."""
    product, x = BACKENDS[backend](4, False), X[0, 3:5]
    y, pull = jax.vjp(product, x, KERNEL)
    dx, dkernel = pull(jnp.ones_like(y))
    (qw, sw), (qx, sx) = oracle(np.asarray(KERNEL), 0, 4), oracle(np.asarray(x), -1)
    np.testing.assert_allclose(dx[0], (qw * sw).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel[:, 0], (qx * sx).sum(0), rtol=1e-5, atol=1e-5)
    assert np.abs(dx[0] - KERNEL.sum(1)).max() > 0.1  # far beyond that tolerance
    assert np.abs(dkernel[:, 0] - x.sum(0)).max() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_scaled_by_a_power_of_two_scales_its_output_and_no_other(backend):
    product = BACKENDS[backend](8, False)
    y, scaled = product(X, KERNEL), product(X.at[1, 2].multiply(8.0), KERNEL)
    np.testing.assert_array_equal(scaled[1, 2], 8 * y[1, 2])
    np.testing.assert_array_equal(scaled.at[1, 2].set(0), y.at[1, 2].set(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_bfloat16_and_is_close(backend):
    x, kernel = X[:, 2:5].astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    y, pull = jax.vjp(BACKENDS[backend](8, False), x, kernel)
    assert [a.dtype for a in (y, *pull(y))] == [jnp.bfloat16] * 3
    expected = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    assert jnp.linalg.norm(y - expected) < 0.02 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("weight_only", [False, True])
def test_the_frozen_product_is_the_trained_one_on_the_same_kernel(weight_only):
    kernel = quantizer.quantise_kernel(KERNEL)
    y, pull = jax.vjp(lambda x: quantizer.frozen_product(x, kernel, None, weight_only), X)
    expected, expected_pull = jax.vjp(lambda x: quantizer.trained_product(8, weight_only)(x, KERNEL), X)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull(y)[0], expected_pull(y)[0])


def test_gradient_of_the_frozen_product_is_the_dequantised_kernel():
    kernel = quantizer.quantise_kernel(KERNEL, 4)
    dx = jax.grad(lambda x: jnp.sum(quantizer.frozen_product(x, kernel)))(X)
    np.testing.assert_allclose(dx[0, 0], quantizer.dequantise(kernel).sum(1), rtol=1e-5, atol=1e-5)


def test_a_static_range_at_the_largest_value_is_the_dynamic_one_of_a_single_token():
    kernel, x = quantizer.quantise_kernel(KERNEL), X[0, 3]
    static = quantizer.frozen_product(x, kernel, jnp.abs(x).max())
    np.testing.assert_array_equal(static, quantizer.frozen_product(x, kernel))


def test_beyond_a_static_range_nothing_passes_forward_or_backward():
    kernel, x = quantizer.quantise_kernel(jnp.eye(4)), jnp.array([0.5, -0.9, 1.7, -40])
    y, pull = jax.vjp(lambda x: quantizer.frozen_product(x, kernel, jnp.float32(1)), x)
    np.testing.assert_allclose(y, [0.5, -0.9, 1, -1], atol=0.01)
    assert (np.asarray(pull(jnp.ones(4))[0]) != 0).tolist() == [True, True, False, False]


def test_nan_is_not_swallowed():
    kernel = quantizer.quantise_kernel(KERNEL)
    assert np.isnan(quantizer.frozen_product(X.at[0, 0, 0].set(jnp.nan), kernel)[0, 0]).all()
    assert np.isnan(quantizer.frozen_product(X, kernel, jnp.float32(jnp.nan))).all()


def test_the_frozen_kernel_gets_no_gradient():
    kernel = quantizer.quantise_kernel(KERNEL)
    grads = jax.grad(lambda scale: jnp.sum(quantizer.frozen_product(X, Quantised(kernel.values, scale))))(kernel.scale)
    assert not grads.any()
