import math

import numpy as np
import pytest
from PIL import Image

from vitft_jax.data.augment import augment, check_augment, warp
from vitft_jax.data.images import FITS, resize
from vitft_jax.errors import InputError

GENERAL = {"crop": 0.4, "flip": 0.5, "rotate": 25.0, "gain": 0.3, "contrast": 0.3}
ALL = GENERAL | {"speckle": 0.3, "tgc": 0.3}


def noise(shape=(40, 56), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def many(image, config, count=50, size=32, fit="squash"):
    return [augment(image, np.random.default_rng(seed), config, size, fit) for seed in range(count)]


def centroid(image):
    """Where the light of an image is, in pixels from its top left corner: x, y."""
    values = np.asarray(image, float)
    y, x = np.mgrid[: values.shape[0], : values.shape[1]] + 0.5
    return np.array([(x * values).sum(), (y * values).sum()]) / values.sum()


def dot(x, y, size=64):
    values = np.zeros((size, size), np.uint8)
    values[y - 1 : y + 2, x - 1 : x + 2] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(40, 56), (40, 56, 3), (16, 16)])
def test_everything_off_is_resize(fit, shape, knobs):
    for out in many(noise(shape), knobs(), 3, fit=fit):
        np.testing.assert_array_equal(out, resize(noise(shape), 32, fit))


def without_ultrasound(image, rng, config, size, fit):
    """What `augment` was before it knew of speckle and time gain; runs then must give the same images now."""
    draws = rng.random(8)
    area = config.crop + (1 - config.crop) * draws[0]
    log_aspect = min(math.log(1.25), -math.log(area)) * (2 * draws[1] - 1)
    width, height = math.sqrt(area * math.exp(log_aspect)), math.sqrt(area * math.exp(-log_aspect))
    box = ((1 - width) * draws[2], (1 - height) * draws[3], width, height)
    degrees = config.rotate * (2 * draws[5] - 1)
    values = np.asarray(warp(image, size, fit, box=box, flip=draws[4] < config.flip, degrees=degrees))
    gain, contrast = 1 + config.gain * (2 * draws[6] - 1), 1 + config.contrast * (2 * draws[7] - 1)
    values = np.clip(np.rint(gain * (contrast * (values - values.mean()) + values.mean())), 0, 255).astype(np.uint8)
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, -1)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(40, 56), (40, 56, 3)])
def test_without_ultrasound_images_are_what_they_were(fit, shape, knobs):
    for seed, out in enumerate(many(noise(shape), knobs(**GENERAL), 20, fit=fit)):
        expected = without_ultrasound(noise(shape), np.random.default_rng(seed), knobs(**GENERAL), 32, fit)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("fit", FITS)
def test_flip_is_an_exact_mirror(fit, knobs):
    still = resize(noise(), 32, fit)
    for out in many(noise(), knobs(flip=1.0), 3, fit=fit):
        np.testing.assert_array_equal(out, still[:, ::-1])
    flipped = [np.array_equal(out, still[:, ::-1]) for out in many(noise(), knobs(flip=0.5), 200, fit=fit)]
    assert 70 < sum(flipped) < 130  # 100 +- 4 standard deviations


@pytest.mark.parametrize("degrees", [0, 30, -45, 90])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_moves_a_dot_to_the_computed_place(degrees, flip):
    out = warp(dot(44, 20), 64, "squash", flip=flip, degrees=degrees)
    x, y = 44.5 - 32, 20.5 - 32
    x = -x if flip else x
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    np.testing.assert_allclose(centroid(out), [32 + x * cos - y * sin, 32 + x * sin + y * cos], atol=0.1)


def test_rotate_stays_within_its_bound(knobs):
    angles = []
    for out in many(dot(52, 32), knobs(rotate=20.0), 100, size=64):
        x, y = centroid(out[..., 0]) - 32
        angles.append(math.degrees(math.atan2(y - 0.5, x)))
    assert -21 < min(angles) < -15
    assert 15 < max(angles) < 21


def test_crop_shows_the_chosen_box():
    out = warp(dot(40, 24), 64, "squash", box=(0.5, 0.25, 0.25, 0.25))
    np.testing.assert_allclose(centroid(out), [(40.5 / 64 - 0.5) * 4 * 64, (24.5 / 64 - 0.25) * 4 * 64], atol=0.1)


@pytest.mark.parametrize(("fit", "expected"), [("squash", (24.5, 25)), ("crop", (17, 25)), ("pad", (24.5, 28.5))])
@pytest.mark.parametrize("degrees", [0, 1e-9])  # the second goes through the affine step
def test_resize_and_affine_put_things_in_the_same_place(fit, expected, degrees):
    values = np.zeros((64, 128), np.uint8)
    values[20:30, 44:54] = 255
    np.testing.assert_allclose(centroid(warp(Image.fromarray(values), 64, fit, degrees=degrees)), expected, atol=0.1)


def test_crop_keeps_area_and_aspect_within_bounds(knobs):
    # On a ramp in x and y, the corner values tell which part of the image is seen.
    y, x = np.mgrid[:200, :200]
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    areas, aspects, lefts = [], [], []
    for out in many(image, knobs(crop=0.3), 200):
        width = (float(out[16, -1, 0]) - float(out[16, 0, 0])) * 32 / 31 / 200
        height = (float(out[-1, 16, 1]) - float(out[0, 16, 1])) * 32 / 31 / 200
        areas.append(width * height)
        aspects.append(width / height)
        lefts.append(out[16, 0, 0] / 200)
    assert 0.28 < min(areas) < 0.36
    assert 0.9 < max(areas) < 1.02
    assert 0.78 < min(aspects) < 0.9
    assert 1.1 < max(aspects) < 1.28
    assert max(lefts) > 0.3


def test_crops_of_large_images_do_not_alias(knobs):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    for out in many(Image.fromarray(stripes), knobs(crop=0.8), 10):
        assert np.ptp(out[:, 2:-2].astype(int)) < 12


def test_gain_multiplies_the_mean(knobs):
    image = Image.fromarray(np.random.default_rng(0).integers(60, 120, (32, 32), np.uint8))
    ratios = [out.mean() / np.asarray(image).mean() for out in many(image, knobs(gain=0.4), 100)]
    assert 0.59 < min(ratios) < 0.65
    assert 1.35 < max(ratios) < 1.41


def test_contrast_keeps_the_mean_and_scales_the_spread(knobs):
    values = np.random.default_rng(0).integers(90, 150, (32, 32), np.uint8)
    spreads = []
    for out in many(Image.fromarray(values), knobs(contrast=0.5), 100):
        assert abs(out.mean() - values.mean()) < 0.6
        spreads.append(out.std() / values.std())
    assert 0.49 < min(spreads) < 0.55
    assert 1.45 < max(spreads) < 1.51


def test_levels_are_clipped_not_wrapped(knobs):
    image = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (32, 16)))
    for out in many(image, knobs(gain=1.0, contrast=1.0), 30):
        assert (out[:, 1::2].astype(int) >= out[:, ::2].astype(int)).all()


@pytest.mark.parametrize("knob", ["gain", "speckle", "tgc"])
def test_knobs_do_not_disturb_each_other(knob, knobs):
    still, bright = (many(noise(), knobs(flip=0.5, **{knob: value}), 40) for value in (0.0, 0.2))
    assert not np.array_equal(still, bright)
    left = [out[:, :16].mean() > out[:, 16:].mean() for out in still]
    assert left == [out[:, :16].mean() > out[:, 16:].mean() for out in bright]
    assert 5 < sum(left) < 35


def test_speckle_does_not_disturb_time_gain(knobs):
    grey = Image.new("L", (32, 32), 120)
    for plain, noisy in zip(
        many(grey, knobs(tgc=0.4)), many(grey, knobs(tgc=0.4, speckle=1e-3)), strict=True
    ):  # so little speckle that only rounding is left of it
        assert np.abs(plain.astype(int) - noisy).max() <= 1


def test_speckle_is_drawn_up_to_its_bound(knobs):
    grey = Image.new("L", (224, 224), 128)
    deviations = [out[..., 0].std() for out in many(grey, knobs(speckle=0.2), 100, size=224)]
    largest = math.sqrt(math.log(1 + 0.2**2)) * 20 / math.log(10) * 255 / 60
    assert min(deviations) < 0.06 * largest
    assert 0.94 * largest < max(deviations) < 1.06 * largest  # of one field the deviation is known to 2 %


def test_time_gain_scales_rows_within_its_bound(knobs):
    grey = Image.new("L", (64, 64), 100)
    curves = []
    for out in many(grey, knobs(tgc=0.3), 100, size=64):
        assert (out == out[:, :1]).all()
        curves.append(out[:, 0, 0] / 100)
    assert 0.7 <= np.min(curves) < 0.72
    assert 1.28 < np.max(curves) <= 1.3
    assert np.ptp(np.mean(curves, 0)) < 8 * 0.3 / math.sqrt(3 * 100)  # no depth is favoured: 4 standard errors each way


def test_what_is_black_stays_black(knobs):
    image = noise((64, 64)).point(lambda level: 40 + level // 2)
    image.paste(0, (0, 0, 20, 64))
    shapes = {"rotate": 30.0, "crop": 0.6}
    plain, noisy = many(image, knobs(**shapes), 20), many(image, knobs(**shapes, speckle=1.0, tgc=1.0), 20)
    for before, after in zip(plain, noisy, strict=True):
        assert (before == 0).any()
        assert not after[before == 0].any()
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("fit", FITS)
def test_same_rng_same_image(fit, knobs):
    first, again = (many(noise(), knobs(**ALL), 5, fit=fit) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_grey_stays_grey_and_equals_its_colour_copy(knobs):
    for grey, colour in zip(
        many(noise(), knobs(**ALL), 10), many(noise().convert("RGB"), knobs(**ALL), 10), strict=True
    ):
        assert grey.dtype == np.uint8
        assert (grey == grey[..., :1]).all()
        np.testing.assert_array_equal(grey, colour)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop", 0.0),
        ("crop", 1.5),
        ("flip", 2),
        ("rotate", -1),
        ("gain", 1.1),
        ("contrast", -0.1),
        ("speckle", 1.5),
        ("tgc", -0.2),
        ("mixup", -1),
        ("mixup", float("nan")),
        ("cutmix", float("inf")),
    ],
)
def test_values_out_of_range_are_named(key, value, knobs):
    with pytest.raises(InputError, match=rf"augment\.{key} = {value}"):
        check_augment(knobs(**{key: value}))
    check_augment(knobs(**ALL))


def test_unknown_fit(knobs):
    with pytest.raises(InputError, match="squash, crop, pad"):
        augment(noise(), np.random.default_rng(0), knobs(crop=0.5), 8, "stretch")
