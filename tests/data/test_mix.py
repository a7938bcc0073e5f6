import math

import numpy as np
import pytest

from vitft_jax.data.mix import cutmix, mix, mixes, mixup

SIZE = 16


def batch(rows=6, classes=3, seed=0, multilabel=False):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)
    label = (
        rng.integers(0, 2, (rows, classes)).astype(np.float32)
        if multilabel
        else rng.integers(0, classes, rows).astype(np.int32)
    )
    return {"image": image, "label": label, "index": np.arange(rows, dtype=np.int32)}


def shares(config, count):
    """Shares that `count` batches of two images of different classes are mixed by."""
    two = {"image": np.zeros((2, 1, 1, 3), np.uint8), "label": np.array([0, 1], np.int32)}
    return np.array([mix(two, np.random.default_rng(seed), config, 2)["label"][0, 0] for seed in range(count)])


def swapped(rows):
    """Each row's neighbour."""
    return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def test_mixes(knobs):
    assert not mixes(knobs())
    assert mixes(knobs(mixup=0.2))
    assert mixes(knobs(cutmix=1.0))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_mixup_is_a_rounded_convex_combination(share):
    images = batch()["image"]
    images[0], images[1] = 0, 255  # the largest difference
    out = mixup(images, share)
    assert out.dtype == np.uint8
    exact = share * images.astype(float) + (1 - share) * swapped(images)
    assert np.abs(out - exact).max() <= 0.5 + 1e-4  # 1e-4: float32 of values up to 255
    np.testing.assert_array_equal(out.astype(int) + swapped(out), images.astype(int) + swapped(images))


@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.0, 0.9), (0.2, 0.0), (0.999, 0.999)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_cutmix_exchanges_a_box_of_exactly_the_share_that_it_returns(share, centre):
    images = np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in (10, 20, 30, 40)])
    out, kept = cutmix(images, share, centre)
    np.testing.assert_array_equal(out.astype(int) + swapped(out), images.astype(int) + swapped(images))
    for before, after in zip(images, out, strict=True):
        assert (before == after).all(-1).mean() == kept
    box = (out[0] != images[0])[..., 0]
    if kept < 1:
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        for at, found in zip(centre, (rows, columns), strict=True):  # it is where it was asked for, and as large
            half = math.sqrt(1 - share) / 2
            assert abs(found[0] - SIZE * max(0, at - half)) <= 0.5
            assert abs(found[-1] + 1 - SIZE * min(1, at + half)) <= 0.5
    else:
        assert not box.any()


def test_inputs_are_left_alone(knobs):
    whole = batch()
    before = {key: value.copy() for key, value in whole.items()}
    for config in (knobs(mixup=1.0), knobs(cutmix=1.0)):
        out = mix(whole, np.random.default_rng(1), config, 3)
        assert not np.array_equal(out["image"], whole["image"])
        np.testing.assert_array_equal(out["index"], before["index"])
    for key in before:
        np.testing.assert_array_equal(whole[key], before[key])


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("on", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_labels_are_weighed_as_the_images_are(knobs, on, multilabel):
    for seed in range(30):
        plain = batch(seed=seed, multilabel=multilabel)
        plain["image"][::2], plain["image"][1::2] = 0, 255
        out = mix(plain, np.random.default_rng(seed), knobs(**on), 3)
        assert out["label"].dtype == np.float32
        assert out["label"].shape == (6, 3)
        own = plain["label"] if multilabel else np.eye(3, dtype=np.float32)[plain["label"]]
        share = 1 - out["image"][0].astype(float).mean() / 255
        # Pixels of a mixup are rounded to 1/255; the box of a cutmix is exact, so only float32 remains.
        bound = 0.5 / 255 + 1e-6 if "mixup" in on else 1e-6
        np.testing.assert_allclose(out["label"], share * own + (1 - share) * swapped(own), atol=bound)
        if not multilabel:
            np.testing.assert_allclose(out["label"].sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_moments_of_the_beta_distribution(knobs, alpha):
    n = 4000
    found = shares(knobs(mixup=alpha), n).astype(float)
    variance = 1 / (4 * (2 * alpha + 1))
    kurtosis = 3 - 6 / (2 * alpha + 3)
    assert abs(found.mean() - 0.5) < 4 * math.sqrt(variance / n)
    assert abs(found.var() - variance) < 4 * variance * math.sqrt((kurtosis - 1) / n)


def test_box_of_cutmix_has_a_beta_distributed_area_before_it_is_cut_off(knobs, monkeypatch):
    asked = []

    def spy(images, share, centre):
        asked.append((share, *centre))
        return images, share

    monkeypatch.setattr("vitft_jax.data.mix.cutmix", spy)
    n = 4000
    shares(knobs(cutmix=1.0), n)
    for values in np.array(asked).T:  # Beta(1, 1), and the centre too, is uniform
        assert abs(values.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
        assert abs(values.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / n)
    assert np.abs(np.corrcoef(np.array(asked).T) - np.eye(3)).max() < 4 / math.sqrt(n)


def test_with_both_on_half_of_the_batches_get_each_as_if_it_were_alone(knobs):
    n, blends = 400, 0
    blend, cut = {"mixup": 50.0}, {"cutmix": 1.0}  # shares of a blend are near 1/2, so that it is never mistaken
    for seed in range(n):
        both, blended, boxed = (
            mix(batch(2), np.random.default_rng(seed), knobs(**on), 3) for on in (blend | cut, blend, cut)
        )
        is_blend = np.array_equal(both["image"], blended["image"])
        blends += is_blend
        for key in both:
            np.testing.assert_array_equal(both[key], (blended if is_blend else boxed)[key])
    assert abs(blends - n / 2) < 4 * math.sqrt(n / 4)
