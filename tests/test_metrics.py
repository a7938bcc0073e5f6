"""Metrics against scikit-learn, and by hand where that has no say."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from vitft_jax import metrics

P = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])


def multiclass(n=60, classes=3, digits=1, seed=0):
    """Probabilities, many of them equal, and classes that hang together with them."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    p = metrics.probabilities(np.round(rng.normal(size=(n, classes)) + np.eye(classes)[labels], digits), False)
    return p, p.argmax(axis=1), labels


def multilabel(n=60, labels=4, seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, labels)) < [0.5, 0.3, 0.2, 0.1]).astype(float)
    p = np.round(metrics.probabilities(rng.normal(size=truth.shape) + 2 * truth - 1, True), 2)
    return p, metrics.decisions(p, True, [0.5, 0.4, 0.3, 0.2]), truth


def weightings(n, seed=0):
    """1 for every image, then resamples in which images are missing and others come several times."""
    rng = np.random.default_rng(seed)
    return np.column_stack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=20).T])


def averages(truth, decided, w, average):
    found = sk.precision_recall_fscore_support(
        truth, decided, average=average, sample_weight=w, zero_division=np.nan if average is None else 0
    )
    return found[:3]


def test_several_classes_against_scikit_learn_for_any_weights():
    p, decided, truth = multiclass()
    one_hot, weights = np.eye(3)[truth], weightings(60)
    values = metrics.weighted(p, decided, truth, weights)
    assert set(values) == set(metrics.MULTICLASS) | {f"per_class/{name}" for name in metrics.PER_CLASS}
    for i, w in enumerate(weights.T):
        expected = {
            "accuracy": sk.accuracy_score(truth, decided, sample_weight=w),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, decided, sample_weight=w),
            "auroc": sk.roc_auc_score(truth, p, multi_class="ovr", average="macro", sample_weight=w),
            "average_precision": sk.average_precision_score(one_hot, p, average="macro", sample_weight=w),
            "brier": sk.brier_score_loss(truth, p, sample_weight=w),
            "loss": sk.log_loss(truth, p, sample_weight=w),
            "per_class/auroc": sk.roc_auc_score(one_hot, p, average=None, sample_weight=w),
            "per_class/average_precision": sk.average_precision_score(one_hot, p, average=None, sample_weight=w),
        }
        for average in ("macro", "weighted"):
            for name, value in zip(("precision", "recall", "f1"), averages(truth, decided, w, average), strict=True):
                expected[f"{name}_{average}"] = value
        for name, value in zip(("precision", "sensitivity", "f1"), averages(truth, decided, w, None), strict=True):
            expected[f"per_class/{name}"] = value
        (tn, fp), _ = np.moveaxis(sk.multilabel_confusion_matrix(truth, decided, sample_weight=w), 0, -1)
        expected["per_class/specificity"] = tn / (tn + fp)
        assert set(values) - set(expected) == {"ece"}
        for name, value in expected.items():
            np.testing.assert_allclose(values[name][..., i], value, atol=1e-12, err_msg=name)


def test_several_labels_against_scikit_learn_for_any_weights():
    p, decided, truth = multilabel()
    weights = weightings(60)
    values = metrics.weighted(p, decided, truth, weights)
    assert set(values) == set(metrics.MULTILABEL) | {f"per_class/{name}" for name in metrics.PER_CLASS}
    for i, w in enumerate(weights.T):
        with_label = [
            [f(truth[:, c], score[:, c], sample_weight=w) for c in range(4)]
            for f, score in (
                (sk.brier_score_loss, p), (sk.log_loss, p), (sk.roc_auc_score, p), (sk.average_precision_score, p),
            )
        ]  # fmt: skip
        f1 = {a: sk.f1_score(truth, decided, average=a, sample_weight=w, zero_division=1) for a in ("micro", "samples")}
        expected = {
            "subset_accuracy": sk.accuracy_score(truth, decided, sample_weight=w),
            "f1_macro": sk.f1_score(truth, decided, average="macro", sample_weight=w),
            "f1_micro": f1["micro"],
            "f1_samples": f1["samples"],
            "jaccard": sk.jaccard_score(truth, decided, average="samples", sample_weight=w, zero_division=1),
            "hamming": sk.hamming_loss(truth, decided, sample_weight=w),
            "brier": np.mean(with_label[0]),
            "loss": np.mean(with_label[1]),
            "auroc": np.mean(with_label[2]),
            "average_precision": np.mean(with_label[3]),
            "per_class/auroc": with_label[2],
            "per_class/average_precision": with_label[3],
        }
        of_label = averages(truth, decided, w, None)
        expected |= {
            f"per_class/{name}": value for name, value in zip(("precision", "sensitivity", "f1"), of_label, strict=True)
        }
        (tn, fp), _ = np.moveaxis(sk.multilabel_confusion_matrix(truth, decided, sample_weight=w), 0, -1)
        expected["per_class/specificity"] = tn / (tn + fp)
        assert set(values) - set(expected) == {"ece"}
        for name, value in expected.items():
            np.testing.assert_allclose(values[name][..., i], value, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("task", [multiclass, multilabel])
def test_weights_are_repetitions(task):
    p, decided, truth = task()
    weights = weightings(60)
    values = metrics.weighted(p, decided, truth, weights)
    for i in range(3):
        rows = np.repeat(np.arange(60), weights[:, i].astype(int))
        alone = metrics.compute(p[rows], truth[rows], truth.ndim == 2, decided[rows])
        for name, value in alone.items():
            assert values[name][i] == pytest.approx(value, abs=1e-12), name


def test_multiclass_by_hand():
    """Decisions 0, 1, 1, 2 against 0, 1, 2, 2."""
    values = metrics.compute(P, np.array([0, 1, 2, 2]), multilabel=False)
    assert values["accuracy"] == 0.75
    assert values["balanced_accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert values["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert values["precision_macro"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert values["auroc"] == 1  # each class outranks the rest in its column
    brier = [0.2**2 + 2 * 0.1**2, 0.3**2 + 0.4**2 + 0.1**2, 0.2**2 + 0.5**2 + 0.7**2, 0.1**2 + 0.2**2 + 0.3**2]
    assert values["brier"] == pytest.approx(np.mean(brier))
    assert values["loss"] == pytest.approx(-np.mean(np.log([0.8, 0.6, 0.3, 0.7])))


def test_calibration_error_by_hand():
    """Probabilities 0.8, 0.6, 0.5, 0.7 of what was decided, right but for the third, each alone in its fifteenth."""
    assert metrics.compute(P, np.array([0, 1, 2, 2]), False)["ece"] == pytest.approx((0.2 + 0.4 + 0.5 + 0.3) / 4)
    together = np.array([[0.82, 0.18], [0.84, 0.16], [0.86, 0.14], [0.81, 0.19]])  # all in 12/15 .. 13/15
    assert metrics.compute(together, np.array([0, 0, 1, 0]), False)["ece"] == pytest.approx(abs(0.75 - 0.8325))
    labels = metrics.compute(np.array([[1.0, 0.1], [0.9, 0.1]]), np.array([[1, 0], [0, 1]]), True)
    assert labels["ece"] == pytest.approx(((0 + 0.9) / 2 + (0.5 - 0.1)) / 2)


def test_calibration_error_of_a_calibrated_model_vanishes_with_more_images():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 100_000)
    labels = (rng.random((100_000, 1)) > p.cumsum(axis=1)).sum(axis=1)
    assert metrics.compute(p, labels, False)["ece"] < 0.01
    assert metrics.compute(p**2 / (p**2).sum(1, keepdims=True), labels, False)["ece"] > 0.1


def test_auroc_counts_pairs_out_of_order():
    p = np.array([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [0.4, 0.6]])
    assert metrics.compute(p, np.array([0, 0, 1, 1]), multilabel=False)["auroc"] == pytest.approx(1 / 4)


def test_an_image_without_labels_rightly_given_none_is_right():
    p = np.array([[0.9, 0.2], [0.1, 0.2], [0.1, 0.6]])
    values = metrics.compute(p, np.array([[1, 1], [0, 0], [0, 0]]), multilabel=True)
    assert values["f1_samples"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert values["jaccard"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert values["hamming"] == pytest.approx(2 / 6)
    assert values["subset_accuracy"] == pytest.approx(1 / 3)


def test_thresholds_of_labels():
    p = np.array([[0.3, 0.6], [0.2, 0.7]])
    np.testing.assert_array_equal(metrics.decisions(p, True, [0.3, 0.65]), [[1, 0], [0, 1]])
    np.testing.assert_array_equal(metrics.decisions(p, True), [[0, 1], [0, 1]])


UNDEFINED = {
    "a class that never occurs": (
        False, [0, 1, 1, 0], dict.fromkeys(("auroc", "average_precision", "recall_macro"), "no image is 'cyst'"),
        dict.fromkeys(("2/sensitivity", "2/auroc", "2/average_precision"), "no image is 'cyst'"),
    ),
    "one class alone": (
        False, [1, 1, 1, 1],
        {"auroc": "no image is 'fluid' or 'cyst'; every image is 'mass'"}
        | dict.fromkeys(("average_precision", "recall_macro"), "no image is 'fluid' or 'cyst'"),
        {f"0/{m}": "no image is 'fluid'" for m in ("sensitivity", "auroc", "average_precision")}
        | {f"2/{m}": "no image is 'cyst'" for m in ("sensitivity", "auroc", "average_precision")}
        | dict.fromkeys(("1/specificity", "1/auroc"), "every image is 'mass'"),
    ),
    "a label that no image has": (
        True, [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]],
        dict.fromkeys(("auroc", "average_precision"), "no image has 'cyst'"),
        dict.fromkeys(("2/sensitivity", "2/auroc", "2/average_precision"), "no image has 'cyst'"),
    ),
    "a label that every image has": (
        True, [[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], {"auroc": "every image has 'cyst'"},
        dict.fromkeys(("2/specificity", "2/auroc"), "every image has 'cyst'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDEFINED)
def test_what_is_undefined_is_said_and_not_zeroed(case):
    many, labels, scalars, of_class = UNDEFINED[case]
    labels = np.array(labels)
    decided, classes = metrics.decisions(P, many), ["fluid", "mass", "cyst"]
    found = metrics.assess(P, decided, labels, list("abcd"), classes, resamples=20)
    whole = found["metrics"]
    each = {f"{i}/{name}": found["per_class"][c][name] for i, c in enumerate(classes) for name in metrics.PER_CLASS}
    for values, why in ((whole, scalars), (each, of_class)):
        undefined = {name: v for name, v in values.items() if math.isnan(v["value"])}
        assert {name: v["why"] for name, v in undefined.items()} == why
        assert all(math.isnan(v[end]) for v in undefined.values() for end in ("low", "high"))
    change = metrics.change(P, P, labels, list("abcd"), (decided, decided), classes, resamples=20)
    assert {name: v["why"] for name, v in change.items() if math.isnan(v["value"])} == scalars
    for name, why in scalars.items():
        assert metrics.why_undefined(name, decided, labels, classes) == why


def test_precision_of_a_class_that_is_never_decided_is_undefined():
    p = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
    values = metrics.compute(p, np.array([0, 1, 2]), False)
    assert {name for name, value in values.items() if math.isnan(value)} == {"precision_macro", "precision_weighted"}
    classes = ["a", "b", "c", "d"]

    def why(name, decided, labels):
        return metrics.why_undefined(name, np.array(decided), np.array(labels), classes)

    assert why("precision_macro", [0, 0, 1], [0, 1, 2]) == "'c' and 'd' are never decided"
    assert why("precision_weighted", [0, 0, 1], [0, 1, 2]) == "'c' is never decided"  # 'd' has no weight
    assert why("precision_macro", [0, 0, 0], [0, 1, 2]) == "'b', 'c' and 'd' are never decided"
    truth = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    labels = metrics.compute(p, truth, True)
    assert math.isnan(labels["f1_macro"])
    decided = metrics.decisions(p, True)
    assert metrics.why_undefined("f1_macro", decided, truth, list("abc")) == "no image has 'c', nor is 'c' ever decided"
    assert labels["f1_micro"] > 0
    none = metrics.compute(p / 2, 0 * truth, True)
    assert math.isnan(none["f1_micro"])
    assert "none is decided" in metrics.why_undefined("f1_micro", 0 * truth, 0 * truth, list("abc"))


def test_of_many_classes_two_are_named():
    classes = [f"c{i}" for i in range(9)]
    why = metrics.why_undefined("auroc", np.zeros(4, int), np.array([0, 1, 1, 0]), classes)
    assert why == "no image is 'c2', 'c3' or 5 others"


def test_a_probability_that_is_no_number_is_the_reason_of_last_resort():
    p = np.array([[0.6, 0.4], [np.nan, np.nan]])
    assert math.isnan(metrics.compute(p, np.array([0, 1]), False)["loss"])
    assert "not a number" in metrics.why_undefined("loss", np.array([0, 0]), np.array([0, 1]), ["a", "b"])


@pytest.mark.parametrize("task", [multiclass, multilabel])
def test_ranks_put_the_better_model_first(task):
    p, decided, truth = task()
    perfect = np.eye(3)[truth] if truth.ndim == 1 else truth
    worse = metrics.compute(p, truth, truth.ndim == 2, decided)
    for name, best in metrics.compute(perfect, truth, truth.ndim == 2).items():
        assert metrics.rank(name, best) > metrics.rank(name, worse[name]) > metrics.rank(name, math.nan), name


@pytest.mark.parametrize("task", [multiclass, multilabel])
def test_confusion(task):
    p, decided, truth = task()
    found = metrics.assess(p, decided, truth, [str(i) for i in range(60)], list("abcd")[: p.shape[1]], 5)
    if truth.ndim == 2:
        np.testing.assert_array_equal(found["confusion"], sk.multilabel_confusion_matrix(truth, decided))
        counts = truth.sum(axis=0)
    else:
        np.testing.assert_array_equal(found["confusion"], sk.confusion_matrix(truth, decided))
        counts = np.bincount(truth)
    assert [c["images"] for c in found["per_class"].values()] == counts.tolist()


def test_probabilities_survive_large_logits():
    z = np.array([[1000.0, 0.0, -1000.0]])
    np.testing.assert_allclose(metrics.probabilities(z, False), [[1, 0, 0]])
    np.testing.assert_allclose(metrics.probabilities(z, True), [[1, 0.5, 0]])
    np.testing.assert_allclose(metrics.probabilities(P, False).sum(1), 1)
    sure = metrics.compute(metrics.probabilities(z, False), np.array([2]), False)
    assert math.isfinite(sure["loss"])
