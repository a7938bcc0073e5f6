import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitft_jax import attention

SHAPE = (2, 3, 7, 8)


def qkv(dtype=jnp.float32, keys=7):
    k = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k[i], SHAPE if i in (0, 3) else (2, 3, keys, 8)).astype(dtype) for i in range(4)]


def reference(q, k, v):
    """Independent: JAX's own attention, on (B, N, H, d)."""
    out = jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)))
    return out.swapaxes(1, 2)


@pytest.mark.parametrize("keys", [7, 5])
def test_output_and_all_gradients_equal_the_reference(keys):
    q, k, v, g = qkv(keys=keys)
    with jax.default_matmul_precision("highest"):
        ours, pull = jax.vjp(attention.attend, q, k, v)
        theirs, pull_reference = jax.vjp(reference, q, k, v)
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        for a, b in zip(pull(g), pull_reference(g), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)


def test_keys_that_are_left_out_are_as_if_they_were_not_there():
    q, k, v, g = qkv()
    here = jnp.array([[True, False, True, True, False, True, False], [False, True, True, True, False, False, True]])
    out, pull = jax.vjp(lambda q, k, v: attention.attend(q, k, v, here), q, k, v)
    grads = pull(g)
    for b in range(2):
        alone = [q[b : b + 1], k[b : b + 1, :, here[b]], v[b : b + 1, :, here[b]]]
        expected, pull_alone = jax.vjp(attention.attend, *alone)
        np.testing.assert_allclose(out[b : b + 1], expected, atol=2e-6)
        dq, dk, dv = pull_alone(g[b : b + 1])
        np.testing.assert_allclose(grads[0][b : b + 1], dq, atol=5e-6)
        for got, only in ((grads[1], dk), (grads[2], dv)):
            np.testing.assert_allclose(got[b : b + 1, :, here[b]], only, atol=5e-6)
            assert (got[b, :, ~here[b]] == 0).all()
        rows = attention.prefix_rows(q, k, 2, here)[b : b + 1]
        assert (rows[..., ~here[b]] == 0).all()
        np.testing.assert_allclose(rows[..., here[b]], attention.prefix_rows(alone[0], alone[1], 2), atol=1e-6)


def test_bfloat16_stays_within_its_rounding():
    q, k, v, g = qkv(jnp.bfloat16)
    exact = jax.vjp(reference, *(x.astype(jnp.float32) for x in (q, k, v)))
    ours, pull = jax.vjp(attention.attend, q, k, v)
    assert ours.dtype == jnp.bfloat16
    for a, b in zip((ours, *pull(g)), (exact[0], *exact[1](g.astype(jnp.float32))), strict=True):
        assert a.dtype == jnp.bfloat16
        # A handful of roundings at 2^-8 each, relative to the largest entry of a sum.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=4 * 2**-8 * float(jnp.abs(b).max()))


def test_prefix_rows_are_the_first_rows_of_the_full_matrix():
    q, k, _, _ = qkv()
    full = jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(8))
    rows = attention.prefix_rows(q, k, 2)
    assert rows.shape == (2, 3, 2, 7)
    np.testing.assert_allclose(rows, full[:, :, :2], atol=1e-6)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-6)
