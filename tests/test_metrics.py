import numpy as np
import pytest

from vitft_jax import metrics

P = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])


def test_multiclass_by_hand():
    """Decisions 0, 1, 1, 2 against 0, 1, 2, 2."""
    values = metrics.compute(P, np.array([0, 1, 2, 2]), multilabel=False)
    assert values["accuracy"] == 0.75
    assert values["balanced_accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert values["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert values["auroc"] == pytest.approx((1 + 1 + 1) / 3)  # each class outranks the rest in its column


def test_auroc_counts_pairs_out_of_order():
    p = np.array([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [0.4, 0.6]])
    assert metrics.compute(p, np.array([0, 0, 1, 1]), multilabel=False)["auroc"] == pytest.approx(1 / 4)


def test_multilabel_by_hand():
    p = np.array([[0.9, 0.2], [0.6, 0.7], [0.1, 0.6]])
    values = metrics.compute(p, np.array([[1, 0], [0, 1], [0, 1]]), multilabel=True)
    assert values["subset_accuracy"] == pytest.approx(2 / 3)
    assert values["f1_micro"] == pytest.approx(2 * 3 / (4 + 3))
    assert values["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["auroc"] == 1


def test_auroc_without_a_class_is_undefined_not_zero():
    values = metrics.compute(P, np.array([0, 1, 1, 0]), multilabel=False)
    assert np.isnan(values["auroc"])
    assert values["accuracy"] == 0.75
    interval = metrics.intervals(P, np.array([0, 1, 1, 0]), list("abcd"), multilabel=False, resamples=5)["auroc"]
    assert all(np.isnan(v) for v in interval.values())


def test_probabilities_survive_large_logits():
    z = np.array([[1000.0, 0.0, -1000.0]])
    np.testing.assert_allclose(metrics.probabilities(z, False), [[1, 0, 0]])
    np.testing.assert_allclose(metrics.probabilities(z, True), [[1, 0.5, 0]])
    np.testing.assert_allclose(metrics.probabilities(P, False).sum(1), 1)


def simulated(rng, groups, per_group):
    """Binary task where all images of a group are right or wrong together, with probability 0.8."""
    right = np.repeat(rng.random(groups) < 0.8, per_group)
    labels = np.repeat(rng.integers(0, 2, groups), per_group)
    p = np.where(right == labels, 0.9, 0.1)
    return np.stack([1 - p, p], 1), labels, np.repeat(np.arange(groups), per_group).astype(str)


def test_intervals_cover_the_truth_when_images_of_a_group_hang_together(monkeypatch):
    """95 % intervals of 100 groups cover 0.8 in at least 90 % of 120 trials (4 standard errors); by image they do not."""
    monkeypatch.setattr(
        metrics, "compute", lambda p, y, _: {"accuracy": np.mean(p.argmax(1) == y)}
    )  # the others are slow
    rng = np.random.default_rng(0)
    covered = {"group": 0, "image": 0}
    for _ in range(120):
        p, labels, groups = simulated(rng, 100, 5)
        for unit, by in (("group", groups), ("image", [str(i) for i in range(len(labels))])):
            interval = metrics.intervals(p, labels, by, False, resamples=200)["accuracy"]
            covered[unit] += interval["low"] <= 0.8 <= interval["high"]
    assert covered["group"] / 120 >= 0.9
    assert covered["image"] / 120 < 0.8


def test_intervals_hold_the_value_and_repeat_by_seed():
    p, labels, groups = simulated(np.random.default_rng(1), 40, 2)
    first = metrics.intervals(p, labels, groups, False, resamples=50)
    assert first == metrics.intervals(p, labels, groups, False, resamples=50)
    for name, value in first.items():
        assert value["low"] <= value["value"] <= value["high"], name
        assert value["low"] < value["high"], name
