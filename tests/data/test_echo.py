import math

import numpy as np
import pytest

from vitft_jax.data.echo import speckle, time_gain

SIDE = 400
LENGTHS = (1.8, 3.6)  # pixels over which the autocorrelation falls to 1/e, in depth and across
# The sums of the autocorrelation and of its square over all shifts say how many independent values a field is worth.
INDEPENDENT = SIDE**2 / math.prod(math.sqrt(math.pi) * length for length in LENGTHS)
INDEPENDENT_SQUARES = SIDE**2 / math.prod(math.sqrt(math.pi / 2) * length for length in LENGTHS)


def flat(level, shape=(SIDE, SIDE)):
    return np.full(shape, level, np.float32)


def noise(contrast, level=128, seed=0):
    return speckle(flat(level), contrast, np.random.default_rng(seed)) - level


def decibels(contrast):
    """Standard deviation, in dB, of a log-normal amplitude of this contrast."""
    return 20 / math.log(10) * math.sqrt(math.log(1 + contrast**2))


def test_no_contrast_changes_and_draws_nothing():
    rng = np.random.default_rng(0)
    values = flat(90)
    assert speckle(values, 0.0, rng) is values
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("contrast", [0.1, 0.3, 0.5])
def test_mean_is_kept_and_deviation_follows_the_contrast(contrast):
    levels = decibels(contrast) * 255 / 60  # the grey scale shows 60 dB
    out = noise(contrast)
    assert out.dtype == np.float32
    assert abs(out.mean()) < 4 * levels / math.sqrt(INDEPENDENT)
    assert abs(out.var() / levels**2 - 1) < 4 * math.sqrt(2 / INDEPENDENT_SQUARES)


def test_undoing_the_log_compression_gives_the_contrast():
    echo = 10 ** (noise(0.3).astype(float) * 60 / 255 / 20)
    assert echo.std() / echo.mean() == pytest.approx(0.3, rel=4 / math.sqrt(INDEPENDENT_SQUARES))


@pytest.mark.parametrize("axis", [0, 1])
def test_correlation_is_gaussian_of_the_stated_length(axis):
    field = np.moveaxis(noise(0.2), axis, 0)
    field = field / field.std()
    for d in range(1, 9):
        expected = math.exp(-((d / LENGTHS[axis]) ** 2))
        assert (field[:-d] * field[d:]).mean() == pytest.approx(expected, abs=4 / math.sqrt(INDEPENDENT))


def test_the_edges_are_as_noisy_as_the_middle():
    fields = np.stack([speckle(flat(128, (24, 24)), 0.2, np.random.default_rng(seed)) for seed in range(2000)])
    deviations = fields.std(0)
    # A standard deviation from n values is uncertain by 1 / sqrt(2 n); 5 of these hold for 576 pixels.
    np.testing.assert_allclose(deviations, decibels(0.2) * 255 / 60, rtol=5 / math.sqrt(2 * 2000))


def test_noise_adds_to_the_logarithm_so_it_does_not_depend_on_the_grey_level():
    np.testing.assert_allclose(noise(0.2, level=40), noise(0.2, level=180), atol=1e-4)


def test_noise_fades_towards_black_and_black_stays_black():
    whole = noise(0.2)
    np.testing.assert_allclose(noise(0.2, level=16), whole / 2, atol=1e-4)
    assert not noise(0.2, level=0).any()
    sector = flat(128)
    sector[:, :100] = 0
    out = speckle(sector, 0.5, np.random.default_rng(0))
    assert not out[:, :100].any()
    np.testing.assert_allclose(out[:, 100:] - 128, noise(0.5)[:, 100:], atol=1e-4)


def test_channels_get_the_same_noise():
    grey = speckle(flat(100, (20, 30)), 0.2, np.random.default_rng(0))
    colour = speckle(flat(100, (20, 30, 3)), 0.2, np.random.default_rng(0))
    np.testing.assert_array_equal(colour, np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize("shape", [(41, 7), (41, 7, 3)])
def test_time_gain_scales_each_row_as_a_whole(shape):
    values = np.random.default_rng(0).uniform(1, 255, shape).astype(np.float32)
    changes = [0.2, -0.1, 0.0, 0.3, -0.3]
    out = time_gain(values, changes)
    assert (out.shape, out.dtype) == (shape, np.float32)
    curve = time_gain(flat(1, (41, 1)), changes)[:, 0]
    np.testing.assert_allclose(out, values * curve.reshape(-1, *(1,) * (len(shape) - 1)), rtol=1e-6)
    np.testing.assert_allclose(curve[::10], 1 + np.array(changes), rtol=1e-6)


def test_time_gain_is_smooth_and_within_its_sliders():
    changes = np.random.default_rng(0).uniform(-0.4, 0.4, 5)
    curve = time_gain(flat(1, (401, 1)), changes)[:, 0].astype(float) - 1
    assert changes.min() - 1e-6 <= curve.min() < curve.max() <= changes.max() + 1e-6
    # A half cosine of height h over n rows is nowhere steeper than pi h / (2 n), and bends by (pi / n)^2 h / 2.
    height, rows = np.abs(np.diff(changes)).max(), 100
    assert np.abs(np.diff(curve)).max() < math.pi * height / (2 * rows) + 1e-6
    assert np.abs(np.diff(curve, 2)).max() < (math.pi / rows) ** 2 * height / 2 + 1e-6


def test_no_time_gain_changes_nothing():
    values = np.random.default_rng(0).uniform(0, 255, (9, 9)).astype(np.float32)
    np.testing.assert_array_equal(time_gain(values, [0.0] * 5), values)
