"""Attention roll-out: against hand computations, transformers (by golden files), and attention that is planted."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import init, tiny
from test_pretrained import GOLDEN, HF, golden, model_for, write

from vitft_jax import pretrained, quantized_attention, rollout
from vitft_jax.methods import skip
from vitft_jax.methods.skip import Skip, Split

PATCHES = 16  # of a tiny model at 16 pixels
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
MODELS = {
    "cls": {},
    "mean": {"features": "mean"},
    "cls+mean": {"features": "cls+mean"},
    "distilled": {"distilled": True},
    "distilled, one head": {"distilled": True, "dist_head": False},
    "int8": {"attend": quantized_attention.attend, "features": "cls+mean"},
    "bfloat16, remat": {"dtype": jnp.bfloat16, "remat": "full"},
}
SKIPS = {
    "fuse": Skip((Split(0, 0.35), Split(1, 0.5), Split(2, 0.3)), fuse=True),
    "nested": Skip((Split(0, 0.35, rejoin=4), Split(1, 0.5, rejoin=3))),
}


@cache
def drawn(**changes):
    """Random variables of a tiny model; nobody changes them."""
    return init(tiny(**changes))


def rolled(model, variables, images=IMAGES):
    return np.asarray(jax.jit(lambda v, x: rollout.rollout(model, v, x))(variables, images))


def attentions(model, variables, keys=None):
    """Mean attention `(B, N, M)` of each block of a dense model, from what its projections put out.

    `keys`: which there are, bool `(B, N)`, by block.
    """
    seen = model.apply(variables, IMAGES, capture_intermediates=lambda m, _: m.name in ("query", "key"))[1]
    found = []
    for i in range(model.depth):
        attn = seen["intermediates"][f"blocks_{i}"]["attn"]
        q, k = (np.asarray(attn[name]["__call__"][0], np.float64) for name in ("query", "key"))
        q, k = (x.reshape(*x.shape[:2], model.heads, -1).transpose(0, 2, 1, 3) for x in (q, k))
        p = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
        if keys and i in keys:
            p = p * keys[i][:, None, None]
        found.append((p / p.sum(-1, keepdims=True)).mean(axis=1))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_shares(name):
    model = tiny(**MODELS[name])
    rows = rolled(model, drawn(features=model.features, distilled=model.distilled))
    assert rows.shape == (2, model.prefix + PATCHES)
    assert rows.dtype == np.float32
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    assert (rows.max(axis=1) > 1.2 * rows.min(axis=1)).all()


@pytest.mark.parametrize("name", ["cls", "cls+mean", "distilled", "distilled, one head"])
def test_equals_the_product_of_the_attention_that_the_projections_give(name):
    model = tiny(**MODELS[name])
    variables = drawn(features=model.features, distilled=model.distilled)
    product = np.eye(model.prefix + PATCHES)
    for p in attentions(model, variables):  # the last block may have the rows of the prefix tokens alone
        product = (p + np.eye(*p.shape[1:])) / 2 @ product
    expected = {
        "cls": lambda: product[:, 0],
        "cls+mean": lambda: (product[:, 0] + product[:, 1:].mean(axis=1)) / 2,
        "distilled": lambda: product[:, :2].mean(axis=1),
        "distilled, one head": lambda: product[:, 0],
    }
    np.testing.assert_allclose(rolled(model, variables), expected[name](), atol=1e-6)


def test_uniform_attention_gives_every_patch_the_same():
    model = tiny(depth=3)
    variables = jax.tree.map(jnp.array, drawn(depth=3))
    for i in range(3):
        query = variables["params"][f"blocks_{i}"]["attn"]["query"]
        query |= {name: jnp.zeros_like(leaf) for name, leaf in query.items()}
    expected = np.full(1 + PATCHES, (1 - 2**-3) / (1 + PATCHES))
    expected[0] += 2**-3  # what the residual branch keeps of the class token
    np.testing.assert_allclose(rolled(model, variables), [expected] * 2, atol=1e-6)


def planted(patch, depth):
    """A model whose class token attends to one patch and whose other tokens attend to all alike."""
    model = tiny(depth=depth, width=8, heads=2, hidden=8)
    variables = jax.tree.map(lambda leaf: 0.01 * leaf, drawn(depth=depth, width=8, heads=2, hidden=8))
    embed = variables["params"]["embed"]
    # Channel 0: I am the class token; channel 1: I am that patch; channel 2: I am another.
    channels = jnp.full(1 + PATCHES, 2).at[0].set(0).at[1 + patch].set(1)
    embed["position"] = 5 * jax.nn.one_hot(channels, 8)[None]
    for i in range(depth):
        block = variables["params"][f"blocks_{i}"]
        block["norm1"] = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
        for name, channel in (("query", 0), ("key", 1)):
            kernel = jnp.zeros((8, 8)).at[channel, jnp.array([0, 4])].set(3)  # one channel of each head
            block["attn"][name] = {"kernel": kernel, "bias": jnp.zeros(8)}
    return model, variables


@pytest.mark.parametrize("depth", [1, 3])
def test_peaks_at_the_patch_to_which_the_class_token_attends(depth):
    for patch in (0, 9):
        rows = rolled(*planted(patch, depth))[:, 1:]
        assert (rows[:, patch] > 5 * np.delete(rows, patch, axis=1).max(axis=1)).all()


@pytest.mark.parametrize("name", SKIPS)
def test_skipping_by_gathering_and_by_masking_roll_out_alike(name):
    select = SKIPS[name]
    model, variables = tiny(depth=4, features="cls+mean"), drawn(depth=4, features="cls+mean")
    gather, mask = (
        rolled(model.clone(select=Skip(select.splits, select.fuse, mode)), variables) for mode in skip.MODES
    )
    np.testing.assert_allclose(gather, mask, atol=1e-6)
    np.testing.assert_allclose(gather.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("rejoin", [None, 2])
def test_tokens_that_left_keep_their_row_and_are_seen_by_none(rejoin):
    """Two blocks by hand: in the second those mix that go on, among themselves."""
    model = tiny(depth=2, features="mean", select=Skip((Split(0, 0.5, rejoin=rejoin),)))
    variables = drawn(features="mean")
    kept = np.concatenate([np.ones((2, 1), bool), skip.kept_patches(model, variables, IMAGES)[0]], axis=1)
    assert (kept.sum(axis=1) == 9).all()
    # What goes into the second block is what does so in the dense model, less the tokens that left.
    first, second = attentions(model.clone(select=None), variables, {1: kept})
    rows = rolled(model, variables)
    for b in range(2):
        product = (first[b] + np.eye(17)) / 2
        mixed = (second[b] + np.eye(17)) / 2 @ product
        read = np.where(kept[b][:, None], mixed, product)[1:]
        np.testing.assert_allclose(rows[b], (read if rejoin else read[kept[b][1:]]).mean(axis=0), atol=1e-6)


def test_a_fused_token_is_the_mean_of_those_it_stands_for_by_their_scores():
    model = tiny(depth=2, features="mean", select=Skip((Split(0, 0.5),), fuse=True))
    variables = jax.tree.map(jnp.array, drawn(features="mean"))
    zero = variables["params"]["blocks_1"]["attn"]["query"]
    zero |= {name: jnp.zeros_like(leaf) for name, leaf in zero.items()}
    kept = np.concatenate([np.ones((2, 1), bool), skip.kept_patches(model, variables, IMAGES)[0]], axis=1)
    (first,) = attentions(model.clone(select=None, depth=1), variables)
    rows = rolled(model, variables)
    for b in range(2):
        product = (first[b] + np.eye(17)) / 2
        score = np.where(kept[b], 0, first[b][0])
        tokens = np.concatenate([product[kept[b]], score[None] @ product / score.sum()])
        mixed = (tokens.mean(axis=0) + tokens) / 2  # uniform attention over the ten tokens
        np.testing.assert_allclose(rows[b], mixed[1:].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("family", HF)
def test_equals_that_of_transformers(family, tmp_path):
    loaded = pretrained.load(write(tmp_path, family))
    images, _ = golden(family)[2][16]
    with np.load(GOLDEN / "rollout.npz", allow_pickle=False) as archive:
        expected = archive[family]
    assert expected.std() > 0.005
    np.testing.assert_allclose(rolled(model_for(loaded), {"params": loaded.params}, images), expected, atol=1e-6)
