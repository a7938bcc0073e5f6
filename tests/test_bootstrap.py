"""Bootstrap intervals: by group, paired, and as wide as they must be."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from vitft_jax import bootstrap, metrics


def mean_of(x):
    return lambda weights: {"mean": x @ weights / weights.sum(axis=0)}


def simulated(rng, groups):
    """Three classes, one to four images in a group, of one class, whose logits share most of their noise."""
    of_group = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
    labels = rng.integers(0, 3, groups)[of_group]
    logits = 0.55 * rng.normal(size=(len(labels), 3)) + 0.84 * rng.normal(size=(groups, 3))[of_group]
    logits[np.arange(len(labels)), labels] += 1.5
    return metrics.probabilities(logits, False), labels, of_group.astype(str)


def test_groups_and_not_images_are_what_varies():
    """95 % intervals of an accuracy by group hold the truth in 95 % of 400 sets, but for 3 standard errors; not so by image."""
    p, labels, _ = simulated(np.random.default_rng(1), 100_000)
    truth, held = np.mean(p.argmax(1) == labels), np.zeros(2)
    for trial in range(400):
        p, labels, groups = simulated(np.random.default_rng(1000 + trial), 60)
        accuracy = mean_of(p.argmax(1) == labels)
        for i, by in enumerate((groups, np.arange(len(labels)))):
            found = bootstrap.bootstrap(accuracy, by, 200)["mean"]
            held[i] += found["low"] <= truth <= found["high"]
    error = 3 * np.sqrt(0.95 * 0.05 / 400)
    assert abs(held[0] / 400 - 0.95) <= error
    assert held[1] / 400 < 0.95 - 2 * error


def test_the_interval_of_a_mean_is_students():
    """Normal data, one image a group: no skew to correct for, so the classical interval, for few groups too."""
    for n, tolerance in ((8, 0.12), (200, 0.04)):
        x = stats.norm.ppf((np.arange(n) + 0.5) / n)  # symmetric
        found = bootstrap.bootstrap(mean_of(x), np.arange(n), resamples=20_000)["mean"]
        half = stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / np.sqrt(n)
        np.testing.assert_allclose([found["low"], found["high"]], [-half, half], rtol=tolerance)


def test_an_interval_follows_the_skew():
    """Of the mean of exponential data: the upper arm is the longer one, by about as much as scipy's BCa interval says."""
    x = stats.expon.ppf((np.arange(100) + 0.5) / 100)
    ours = bootstrap.bootstrap(mean_of(x), np.arange(100), resamples=20_000)["mean"]
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="BCa", rng=0).confidence_interval
    np.testing.assert_allclose(ours["low"] - 1, (theirs.low - 1), rtol=0.06)  # ours has Student's width, 1.5 % more
    np.testing.assert_allclose(ours["high"] - 1, (theirs.high - 1), rtol=0.06)
    assert ours["high"] - 1 > 1.15 * (1 - ours["low"])


def test_groups_are_drawn_whole():
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = bootstrap.resamples_of(groups, 200)
    np.testing.assert_array_equal(weights[0], weights[2])
    np.testing.assert_array_equal(weights[1], weights[4])
    np.testing.assert_array_equal(weights[0] + weights[1] + weights[3], 3)  # three groups with replacement
    assert {0.0, 1.0, 2.0, 3.0} == set(weights[0])


def test_draws_are_the_statistics_of_resampled_rows():
    rng = np.random.default_rng(0)
    score, truth = rng.normal(size=40), np.arange(40) % 2
    p = metrics.probabilities(np.stack([-score, score], 1), False)
    weights = bootstrap.resamples_of(list(range(40)), 5)
    drawn = bootstrap.draws(lambda w: metrics.weighted(p, p.argmax(1), truth, w), list(range(40)), 5)["auroc"]
    for w, value in zip(weights.T, drawn, strict=True):
        rows = np.repeat(np.arange(40), w.astype(int))
        assert value == pytest.approx(roc_auc_score(truth[rows], score[rows]))


def test_large_data_in_pieces(monkeypatch):
    x, groups = np.random.default_rng(0).normal(size=50), np.arange(50) // 2
    whole = bootstrap.bootstrap(mean_of(x), groups, 4000)["mean"]
    monkeypatch.setattr(bootstrap, "_CHUNK", 50 * 7)
    pieces = bootstrap.bootstrap(mean_of(x), groups, 4000)["mean"]
    assert bootstrap.draws(mean_of(x), groups, 4001)["mean"].shape == (4001,)
    assert len(np.unique(bootstrap.draws(mean_of(x), groups, 4001)["mean"])) > 3900  # no piece repeats another
    np.testing.assert_allclose(pieces["low"], whole["low"], atol=0.02)
    np.testing.assert_allclose(pieces["high"], whole["high"], atol=0.02)


def test_a_rare_class_makes_the_interval_of_a_mean_over_classes_wide():
    """4 groups of 34 have the third class: Welch's degrees of freedom of means of 15, 15 and 4 are 9 (without the - 1)."""
    labels, groups = np.repeat([0, 1, 2], [15, 15, 4]), np.arange(34)
    units = metrics.groups_behind(labels, labels, groups, 3)
    share = 1 / np.array([15, 15, 4])
    assert units["balanced_accuracy"] == round((share.sum() ** 2) / (share**3).sum()) == 9
    np.testing.assert_array_equal(units["per_class/sensitivity"], [15, 15, 4])
    even = metrics.groups_behind(labels[:30], labels[:30], groups[:30], 2)
    assert even["balanced_accuracy"] == 30


def test_no_error_is_no_certainty():
    """12 of 12 images right in 4 groups: as if 4 of 4 trials had succeeded, 0.398 to 1 (Clopper-Pearson)."""
    groups = list("aaabbbcccddd")
    p, labels = np.tile([0.9, 0.1], (12, 1)), np.zeros(12, int)
    labels[9:], p[9:] = 1, [0.1, 0.9]
    found = metrics.assess(p, labels, labels, groups, ["x", "y"], 50)
    exact = stats.binomtest(4, 4).proportion_ci(0.95, method="exact")
    assert found["metrics"]["accuracy"]["high"] == 1
    assert found["metrics"]["accuracy"]["low"] == pytest.approx(exact.low)
    of_three = stats.binomtest(3, 3).proportion_ci(0.95, method="exact")
    assert found["per_class"]["x"]["sensitivity"]["low"] == pytest.approx(of_three.low)
    assert found["per_class"]["y"]["sensitivity"]["low"] == pytest.approx(0.025)  # one group
    for name in ("auroc", "f1_macro", "balanced_accuracy", "average_precision"):
        assert found["metrics"][name]["value"] == found["metrics"][name]["high"] == 1
        assert 0.1 < found["metrics"][name]["low"] < 0.6, name
    none = bootstrap.bootstrap(mean_of(np.zeros(12)), groups, 50, ranges={"mean": (0, 1)})["mean"]
    assert (none["low"], none["high"]) == (0, pytest.approx(1 - exact.low))


def test_one_group_says_nothing_of_others():
    found = bootstrap.bootstrap(mean_of(np.array([0.0, 1.0, 1.0])), ["a"] * 3, 50)["mean"]
    assert found["value"] == pytest.approx(2 / 3)
    assert np.isnan([found["low"], found["high"]]).all()
    assert found["why"] == "only one group"


def test_intervals_hold_the_value_and_repeat_by_seed():
    p, labels, groups = simulated(np.random.default_rng(1), 40)
    first = metrics.intervals(p, labels, groups, False, resamples=50)
    assert first == metrics.intervals(p, labels, groups, False, resamples=50)
    assert first != metrics.intervals(p, labels, groups, False, resamples=50, seed=1)
    for name, value in first.items():
        assert value["low"] <= value["value"] <= value["high"], name
        assert value["low"] < value["high"], name


def test_a_paired_change_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    p, labels, groups = simulated(rng, 60)
    other = metrics.probabilities(np.log(p) + 0.2 * rng.normal(size=p.shape), False)
    decided = (p.argmax(1), other.argmax(1))
    change = metrics.change(p, other, labels, groups, decided, "abc", 500)
    before, after = (metrics.intervals(q, labels, groups, False, 500) for q in (p, other))
    for name, value in change.items():
        assert value["value"] == after[name]["value"] - before[name]["value"], name
    for name in ("accuracy", "auroc", "loss"):
        width = change[name]["high"] - change[name]["low"]
        assert 0 < width < 0.6 * (before[name]["high"] - before[name]["low"]), name


def test_the_interval_of_a_difference_is_symmetric_and_students():
    """As wide as Student's of the differences of independent images, and the opposite where the models change places."""
    rng = np.random.default_rng(0)
    p, labels, groups = simulated(rng, 200)
    first = np.unique(groups, return_index=True)[1]
    p, labels, groups = p[first], labels[first], groups[first]
    q = metrics.probabilities(np.log(p) + rng.normal(size=p.shape), False)
    decided = (p.argmax(1), q.argmax(1))
    there = metrics.change(p, q, labels, groups, decided, "abc", 4000)
    back = metrics.change(q, p, labels, groups, decided[::-1], "abc", 4000)
    for name, found in there.items():
        assert found["high"] - found["value"] == pytest.approx(found["value"] - found["low"]), name
        assert [found["low"], found["high"]] == pytest.approx([-back[name]["high"], -back[name]["low"]]), name
    gained = (decided[1] == labels).astype(float) - (decided[0] == labels)
    half = stats.t.ppf(0.975, 199) * gained.std(ddof=1) / np.sqrt(200)
    assert there["accuracy"]["high"] - there["accuracy"]["value"] == pytest.approx(half, rel=0.05)


def test_no_change_is_no_certainty():
    """Models that decide alike on all of 60 groups: the share of groups on which they do not is 0 to 0.0596, either way."""
    p, labels, groups = simulated(np.random.default_rng(2), 60)
    sure = metrics.probabilities(2 * np.log(p), False)
    found = metrics.change(p, sure, labels, groups, (p.argmax(1),) * 2, "abc", 50)
    bound = stats.binomtest(0, 60).proportion_ci(0.95, method="exact").high
    for name in ("accuracy", "precision_weighted", "f1_weighted"):
        assert [found[name][key] for key in ("low", "value", "high")] == pytest.approx([-bound, 0, bound]), name
    assert found["f1_macro"]["high"] >= 0.999 * bound
    for name in metrics.CALIBRATED:  # which do change
        assert found[name]["low"] < found[name]["high"], name
    same = metrics.change(p, p, labels, groups, (p.argmax(1),) * 2, "abc", 50)
    assert same["auroc"]["low"] == -same["auroc"]["high"] < -bound / 2
    assert same["brier"]["why"] == "the same in every resample"
    assert np.isnan([same["brier"]["low"], same["brier"]["high"]]).all()
