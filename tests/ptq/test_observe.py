import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import init, tiny

from vitft_jax import tree
from vitft_jax.errors import InputError
from vitft_jax.ptq import observe

IMAGES = jax.random.normal(jax.random.key(7), (6, 16, 16, 3))
MODEL = tiny()
PARAMS = init(MODEL)["params"]


@pytest.fixture(scope="module")
def seen():
    return observe.observe(MODEL, PARAMS, [IMAGES], len(IMAGES))


def test_every_linear_layer_is_seen_with_its_input(seen):
    kernels = {n.removesuffix("/kernel"): a for n, a in tree.flatten(PARAMS).items() if n.endswith("/kernel")}
    assert {path: s.rows.shape[1] for path, s in seen.items()} == {path: a.shape[0] for path, a in kernels.items()}
    for s in seen.values():
        assert (jnp.abs(s.rows).max(0) <= s.absmax * (1 + 1e-6)).all()
    # 17 tokens an image, all of them sampled; the last block reads its class token alone behind the attention
    assert len(seen["blocks_0/mlp/fc1"].rows) == 6 * 17
    assert len(seen["blocks_1/mlp/fc1"].rows) == 6
    x = IMAGES.reshape(6, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, 48)
    np.testing.assert_array_equal(seen["embed/patch"].rows, x)
    np.testing.assert_array_equal(seen["embed/patch"].absmax, jnp.abs(x).max(0))


def test_extremes_do_not_depend_on_the_order_of_images_or_on_batches(seen, monkeypatch):
    monkeypatch.setattr(observe, "ROWS", 12)
    parts = observe.observe(MODEL, PARAMS, [IMAGES[::-1][:3], IMAGES[::-1][3:]], 6)
    for path, s in seen.items():
        np.testing.assert_allclose(parts[path].absmax, s.absmax, rtol=1e-5)
    assert len(parts["blocks_0/mlp/fc1"].rows) == 12  # and the sample is bounded


def test_activations_that_are_not_finite_are_refused():
    broken = tree.map_named(lambda n, a: a * jnp.inf if n == "blocks_1/norm2/scale" else a, PARAMS)
    with pytest.raises(InputError, match="3 layers are not finite, such as that of blocks_1/mlp/fc1: "):
        observe.observe(MODEL, broken, [IMAGES], 6)
