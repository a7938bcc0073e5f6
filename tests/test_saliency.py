"""Saliency: against numerical differences, and where a model sees nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr
from support import init, tiny

from vitft_jax import config as configs
from vitft_jax import methods, saliency, step
from vitft_jax.methods import Method, skip
from vitft_jax.methods.skip import Skip, Split

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
OUTPUTS = np.array([2, 0])


def program_of(model, method=None):
    return step.Program(model, method or Method(), optax.sgd(0.1), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def plain():
    """Program and variables of a tiny model."""
    return program_of(tiny()), init(tiny())


def gradient(program, variables, pictures=PICTURES, outputs=OUTPUTS):
    return np.asarray(saliency.gradient(variables, pictures, outputs, program=program))


def test_equals_numerical_differences_of_the_logit(plain):
    program, variables = plain
    slopes = gradient(program, variables)

    @jax.jit
    def logits(pictures):
        return step.logits_of(program, variables, pictures)

    def chosen(pictures):
        return np.asarray(logits(pictures), np.float64)[[0, 1], OUTPUTS]

    rng, scale = np.random.default_rng(1), np.abs(slopes).sum(axis=(1, 2, 3)).max()
    for _ in range(5):  # all pixels at once, each by up to a grey level, up or down
        direction = rng.uniform(-1, 1, PICTURES.shape).astype(np.float32)
        numerical = (chosen(PICTURES + direction) - chosen(PICTURES - direction)) / 2
        assert np.abs(numerical).max() > 1e-2 * scale
        np.testing.assert_allclose((slopes * direction).sum(axis=(1, 2, 3)), numerical, atol=1e-4 * scale)


def test_without_noise_it_is_the_magnitude_of_the_slope_by_brightness(plain):
    program, variables = plain
    expected = np.abs(gradient(program, variables).sum(axis=-1))
    got = saliency.saliency(program, variables, PICTURES, OUTPUTS, samples=1, noise=0.0)
    assert got.shape == (2, 16, 16)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_more_noisy_copies_agree_better(plain):
    program, variables = plain
    many = saliency.saliency(program, variables, PICTURES, OUTPUTS, samples=64)
    few, one = (saliency.saliency(program, variables, PICTURES, OUTPUTS, samples=n) for n in (16, 1))
    assert np.abs(few - many).mean() < 0.6 * np.abs(one - many).mean()


def test_is_zero_where_the_patch_embedding_reads_nothing(plain):
    program, variables = plain
    kernel = variables["params"]["embed"]["patch"]["kernel"].reshape(4, 4, 3, -1)
    blind = jax.tree.map(jnp.array, variables)
    blind["params"]["embed"]["patch"]["kernel"] = kernel.at[:, 1:3].set(0).reshape(48, -1)
    seen = saliency.saliency(program, blind, PICTURES, OUTPUTS, samples=2).reshape(2, 4, 4, 4, 4)
    assert (seen[..., 1:3] == 0).all()
    assert (seen[..., [0, 3]] > 0).mean() > 0.99


def test_is_zero_at_patches_that_leave_before_any_token_saw_them(plain):
    _, variables = plain
    variables = jax.tree.map(jnp.array, variables)
    out = variables["params"]["blocks_0"]["attn"]["out"]
    out["kernel"] = jnp.zeros_like(out["kernel"])  # in the first block no token takes up another
    model = tiny(select=Skip((Split(0, 0.5),)))
    images = step.normalise(program_of(model), PICTURES)
    kept = np.asarray(skip.kept_patches(model, variables, images)[0]).reshape(2, 4, 4)
    slopes = np.abs(gradient(program_of(model), variables)).sum(axis=-1)
    by_patch = slopes.reshape(2, 4, 4, 4, 4).sum(axis=(2, 4))
    np.testing.assert_array_equal(by_patch > 0, kept)


def test_is_of_the_output_that_is_asked_for(plain):
    program, variables = plain
    variables = jax.tree.map(jnp.array, variables)
    head = variables["params"]["head"]
    head["kernel"] = head["kernel"].at[:, 1].set(0)  # a label that is the same for every image
    got = saliency.saliency(program, variables, PICTURES, np.array([1, 0]), samples=1)
    assert (got[0] == 0).all()
    assert (got[1] > 0).all()


@pytest.mark.parametrize("base", ["float", "int8"])
def test_through_int8_products_it_is_near_that_of_the_float_model(plain, base):
    """Straight-through: with rounding differentiated as it is, every slope would be 0."""
    program, variables = plain
    config = configs.default()
    config.methods, config.quant.base, config.quant.attention = ("quant",), base, True
    method = methods.load(config)
    model = tiny(dot_general_cls=method.dot_general_cls, attend=method.attend)
    empty = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rounded = dict(method.prepare({**empty, **variables}))
    exact, got = gradient(program, variables), gradient(program_of(model, method), rounded)
    assert np.corrcoef(exact.ravel(), got.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("part", ["head", "blocks_1"])
def test_other_weights_give_another_map(plain, part):
    """The check of Adebayo et al. 2018 (arXiv:1810.03292): a map that random weights leave alone tells nothing of a model."""
    program, variables = plain
    other = {**variables, "params": {**variables["params"], part: init(tiny(), seed=1)["params"][part]}}

    def map_of(variables, samples=16):
        return saliency.saliency(program, variables, PICTURES, OUTPUTS, samples=samples)

    before, again, after = map_of(variables), map_of(variables, 12), map_of(other)
    for b in range(2):
        same, changed = (spearmanr(before[b].ravel(), m[b].ravel()).statistic for m in (again, after))
        assert same > 0.8
        assert changed < 0.5
