import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import integer_dots

from vitft_jax import attention, quantized_attention, quantizer

SHAPE = (2, 3, 7, 8)
HERE = jnp.array([[True, False, True, True, False, True, False], [False, True, True, True, False, False, True]])


def qkv(dtype=jnp.float32):
    """Queries and keys of different sizes, values with channels of different sizes, and a gradient of the output."""
    k = jax.random.split(jax.random.key(0), 4)
    q, key, v, g = (jax.random.normal(k[i], SHAPE) for i in range(4))
    sizes = jnp.array([0.1, 1, 3, 0.3, 2, 0.5, 1])[:, None]
    return [x.astype(dtype) for x in (q * sizes, key * sizes, v * 10.0 ** jnp.linspace(-2, 2, 8), g)]


def rounded(x, axis):
    """s q of x by the formulas of `quantizer`, in numpy."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis, keepdims=True) / 127.5
    return np.round(np.clip(x / scale, -127, 127)) * scale


def by_numpy(q, k, v):
    scores = rounded(q, -1) @ rounded(k, -1).swapaxes(2, 3) / np.sqrt(8)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return rounded(p / p.sum(-1, keepdims=True), -1) @ rounded(v, -2)


def straight(q, k, v):
    """Differentiable: s q of each operand, straight through the rounding."""

    def seen(x, axis):
        scale = quantizer.scale_of(quantizer.absmax(x, axis))
        return x + lax.stop_gradient(quantizer.round_to(x, scale) * scale - x)

    p = jax.nn.softmax(seen(q, -1) @ seen(k, -1).swapaxes(2, 3) / np.sqrt(8), axis=-1)
    return seen(p, -1) @ seen(v, -2)


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_forward_is_that_of_the_oracle_and_not_the_float_one():
    q, k, v, _ = qkv()
    ours, expected = quantized_attention.attend(q, k, v), by_numpy(q, k, v)
    size = np.abs(expected).max((0, 1, 2))
    np.testing.assert_allclose(ours / size, expected / size, atol=2e-6)
    assert np.abs((attention.attend(q, k, v) - expected) / size).max() > 1e-3


def test_gradients_are_straight_through_those_of_the_quantised_products():
    q, k, v, g = qkv()
    ours = jax.vjp(quantized_attention.attend, q, k, v)[1](g)
    expected = jax.vjp(straight, q, k, v)[1](g)
    exact = jax.vjp(attention.attend, q, k, v)[1](g)
    for a, b, c in zip(ours, expected, exact, strict=True):
        assert distance(a, b) < 1e-5 < 1e-3 < distance(c, b)


def test_products_are_int8_into_int32():
    q, k, v, _ = qkv()
    compiled = jax.jit(quantized_attention.attend).lower(q, k, v).compile()
    assert sorted(integer_dots(compiled)) == ["2,3,7,7", "2,3,7,8"]  # all heads of all images at once


def test_keys_that_are_left_out_are_as_if_they_were_not_there():
    q, k, v, g = qkv()
    v = v.at[0, :, 1].multiply(1e3)  # one that is left out has large values
    out, pull = jax.vjp(lambda *x: quantized_attention.attend(*x, HERE), q, k, v)
    grads = pull(g)
    for b in range(2):
        alone = [q[b : b + 1], k[b : b + 1, :, HERE[b]], v[b : b + 1, :, HERE[b]]]
        expected, pull_alone = jax.vjp(quantized_attention.attend, *alone)
        np.testing.assert_allclose(out[b : b + 1], expected, rtol=1e-5, atol=1e-5)
        for a, e, kept in zip(grads, pull_alone(g[b : b + 1]), (slice(None), HERE[b], HERE[b]), strict=True):
            np.testing.assert_allclose(a[b : b + 1, :, kept], e, rtol=1e-4, atol=1e-4)
        assert not any(a[b, :, ~HERE[b]].any() for a in grads[1:])


def test_bfloat16_stays_bfloat16_and_is_close():
    q, k, v, g = qkv(jnp.bfloat16)
    ours, pull = jax.vjp(quantized_attention.attend, q, k, v)
    exact, exact_pull = jax.vjp(attention.attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip((ours, *pull(g)), (exact, *exact_pull(g.astype(jnp.float32))), strict=True):
        assert a.dtype == jnp.bfloat16
        # Relative to what int8 (half a step of 1/127 for each of two operands) and bfloat16 (2^-9) round off.
        assert distance(a.astype(jnp.float32), b) < 0.03


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_gradients_lower_for_other_platforms(platform):
    q, k, v, g = qkv()
    gradients = jax.jit(lambda q, k, v, g: jax.vjp(quantized_attention.attend, q, k, v)[1](g))
    assert "xi32>" in gradients.trace(q, k, v, g).lower(lowering_platforms=(platform,)).as_text()
