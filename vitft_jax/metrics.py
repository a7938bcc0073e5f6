"""Classification metrics with confidence intervals.

Their definitions, and their values wherever they are defined, are scikit-learn's; they are computed here for many weightings
of the images at once, which the bootstrap needs. A metric that is not defined for the labels at hand is NaN, not 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitft_jax import bootstrap, undefined

MULTICLASS = (
    "accuracy",
    "balanced_accuracy",
    "f1_macro",
    "auroc",
    "average_precision",
    "precision_macro",
    "recall_macro",
    "precision_weighted",
    "recall_weighted",
    "f1_weighted",
    "brier",
    "ece",
    "loss",
)
MULTILABEL = (
    "subset_accuracy",
    "f1_macro",
    "f1_micro",
    "auroc",
    "average_precision",
    "f1_samples",
    "jaccard",
    "hamming",
    "brier",
    "ece",
    "loss",
)
HEADLINE = 4  # of these names come first: what a line of progress or a table of runs has room for
PER_CLASS = ("precision", "sensitivity", "specificity", "f1", "auroc", "average_precision")
MEANS_OVER_CLASSES = {
    "balanced_accuracy": "sensitivity",
    "recall_macro": "sensitivity",
    "precision_macro": "precision",
    "f1_macro": "f1",
    "auroc": "auroc",
    "average_precision": "average_precision",
}
"""Of which metric of a class each is the mean."""
LOWER_IS_BETTER = ("hamming", "brier", "ece", "loss")
CALIBRATED = ("ece", "brier", "loss")  # what temperature scaling is for
RESAMPLES = 1000  # of the bootstrap; each end of a 95 % interval then rests on 25 draws
ECE_BINS = 15  # of equal width, as in Guo et al. 2017
_SMALLEST = 1e-12  # probability in a logarithm
_NO_NUMBER = "a probability is not a number"


def names(multilabel: bool) -> tuple[str, ...]:
    """Names of the metrics of a task."""
    return MULTILABEL if multilabel else MULTICLASS


def probabilities(logits: np.ndarray, multilabel: bool) -> np.ndarray:
    """Probabilities `(n, C)` of logits: a sigmoid per label, or a softmax over classes; float64."""
    z = logits.astype(np.float64)
    if multilabel:
        return np.exp(-np.logaddexp(0, -z))
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def decisions(p: np.ndarray, multilabel: bool, thresholds: float | Sequence[float] = 0.5) -> np.ndarray:
    """The most probable class `(n,)`, or each label at its threshold `(n, C)`."""
    return (p >= np.asarray(thresholds)).astype(np.int32) if multilabel else p.argmax(axis=-1).astype(np.int32)


def rank(name: str, value: float) -> float:
    """The value of a metric as a number of which the higher is the better; an undefined one is the worst."""
    if math.isnan(value):
        return -1e30  # finite, so that a checkpoint can hold it as JSON
    return -value if name in LOWER_IS_BETTER else value


def why_undefined(name: str, decided: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """What leaves a metric undefined, for decisions and labels of classes of these names."""
    return undefined.Reasons(decided, labels, classes, MEANS_OVER_CLASSES).of(name) or _NO_NUMBER


def compute(p: np.ndarray, labels: np.ndarray, multilabel: bool, decided: np.ndarray | None = None) -> dict[str, float]:
    """Metrics of probabilities `(n, C)` against labels `(n,)`, or `(n, C)` of 0/1; see `weighted`.

    Decisions are those of `decisions` unless given.
    """
    decided = decisions(p, multilabel) if decided is None else decided
    values = weighted(p, decided, labels, np.ones((len(p), 1)))
    return {name: float(values[name][0]) for name in names(multilabel)}


def weighted(p: np.ndarray, decided: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics under each of several weightings of the images.

    Averages over classes leave none out, but for balanced accuracy (the classes that occur) and the F1 of several classes
    (those that occur or are decided). An image that has no label and is given none counts 1 in `f1_samples` and `jaccard`,
    which are means over images. The Brier score of one class out of several sums over the classes, and of two classes is half
    of that, as is usual; of labels it is the mean over them. The calibration error (ECE) is that of the decided class's
    probability, or the mean over the labels; in small sets it is biased upwards. `loss` is the mean negative log-likelihood,
    without class weights or smoothing.

    Args:
        p: Probabilities `(n, C)`.
        decided: Classes `(n,)`, or 0/1 `(n, C)` where an image has several labels.
        labels: As `decided`.
        weights: `(n, R)`, at least 0.

    Returns:
        Arrays `(R,)` by the names of the task, and `(C, R)` by ``per_class/`` and a name of `PER_CLASS`.
    """
    multilabel = labels.ndim == 2
    classes = np.arange(p.shape[1])
    truth = labels.astype(np.float64) if multilabel else (labels[:, None] == classes).astype(np.float64)
    chosen = decided.astype(np.float64) if multilabel else (decided[:, None] == classes).astype(np.float64)
    total = weights.sum(axis=0)
    true, positive, hits = truth.T @ weights, chosen.T @ weights, (truth * chosen).T @ weights
    ranked = [_ranked(p[:, c], truth[:, c], weights) for c in classes]
    each = {
        "precision": _ratio(hits, positive),
        "sensitivity": _ratio(hits, true),
        "specificity": _ratio(total - true - positive + hits, total - true),
        "f1": _ratio(2 * hits, true + positive),
        "auroc": np.stack([auroc for auroc, _ in ranked]),
        "average_precision": np.stack([precision for _, precision in ranked]),
    }
    values = {name: each[name].mean(axis=0) for name in ("auroc", "average_precision")}
    if multilabel:
        images = _of_labels(p, truth, chosen)
        values["f1_macro"] = each["f1"].mean(axis=0)
        values["f1_micro"] = _ratio(2 * hits.sum(axis=0), (true + positive).sum(axis=0))
        values["ece"] = np.mean([_ece(p[:, c], truth[:, c], weights) for c in classes], axis=0)
    else:
        images = _of_classes(p, truth, chosen)
        values["balanced_accuracy"] = np.nanmean(each["sensitivity"], axis=0)
        values["f1_macro"] = np.nanmean(each["f1"], axis=0)
        values["precision_macro"] = each["precision"].mean(axis=0)
        values["recall_macro"] = each["sensitivity"].mean(axis=0)
        share = true / total
        for name, of in (("precision", "precision"), ("recall", "sensitivity"), ("f1", "f1")):
            values[f"{name}_weighted"] = np.where(share > 0, share * each[of], 0).sum(axis=0)
        values["ece"] = _ece(p[np.arange(len(p)), decided], images["accuracy"], weights)
    values |= {name: value @ weights / total for name, value in images.items()}
    return {name: values[name] for name in names(multilabel)} | {f"per_class/{name}": each[name] for name in PER_CLASS}


def _of_classes(p: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics that are means over images, of each image `(n,)`, from probabilities and 0/1 `(n, C)`."""
    return {
        "accuracy": (truth * chosen).sum(axis=1),
        "brier": ((p - truth) ** 2).sum(axis=1) / (2 if p.shape[1] == 2 else 1),
        "loss": -np.log(np.maximum((p * truth).sum(axis=1), _SMALLEST)),
    }


def _of_labels(p: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The same where an image has several labels."""
    both = truth.sum(axis=1) + chosen.sum(axis=1)
    common = (truth * chosen).sum(axis=1)
    none = both == 0
    return {
        "subset_accuracy": (truth == chosen).all(axis=1).astype(np.float64),
        "f1_samples": np.where(none, 1.0, 2 * common / np.where(none, 1, both)),
        "jaccard": np.where(none, 1.0, common / np.where(none, 1, both - common)),
        "hamming": (truth != chosen).mean(axis=1),
        "brier": ((p - truth) ** 2).mean(axis=1),
        "loss": -np.log(np.maximum(np.where(truth == 1, p, 1 - p), _SMALLEST)).mean(axis=1),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _ranked(score: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision `(R,)` of scores `(n,)` for a 0/1 truth `(n,)`."""
    order = np.argsort(score)
    first = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # images of equal score count together
    w, t = weights[order], truth[order][:, None]
    positive, negative = (np.add.reduceat(w * side, first, axis=0) for side in (t, 1 - t))
    positives, negatives = positive.sum(axis=0), negative.sum(axis=0)
    below = negative.cumsum(axis=0) - negative
    auroc = _ratio((positive * (below + negative / 2)).sum(axis=0), positives * negatives)
    found = positives - positive.cumsum(axis=0) + positive  # of this score or above
    alarms = negatives - below
    precision = np.divide(found, found + alarms, out=np.zeros_like(found), where=found > 0)
    return auroc, _ratio((positive * precision).sum(axis=0), positives)


def _ece(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error `(R,)`: mean over images of the gap in their bin of confidence `(n,)`."""
    place = np.minimum(np.floor(confidence * ECE_BINS), ECE_BINS - 1)
    member = place[:, None] == np.arange(ECE_BINS)
    return np.abs((member * (right - confidence)[:, None]).T @ weights).sum(axis=0) / weights.sum(axis=0)


def confusion(decided: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of images `(C, C)` by true class and decision; of labels `(C, 2, 2)`, each by truth and decision."""
    if labels.ndim == 2:
        truth, chosen = labels.astype(bool), decided.astype(bool)
        cells = [[(truth == t) & (chosen == d) for d in (False, True)] for t in (False, True)]
        return np.moveaxis(np.sum(cells, axis=2), -1, 0)
    return np.bincount(labels.astype(int) * classes + decided, minlength=classes**2).reshape(classes, classes)


def intervals(
    p: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    multilabel: bool,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Metrics with their bootstrap intervals, ``{metric: {value, low, high}}``, resampled by group."""
    classes = [str(c) for c in range(p.shape[1])]
    return assess(p, decisions(p, multilabel), labels, groups, classes, resamples, level, seed)["metrics"]


def assess(
    p: np.ndarray,
    decided: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    classes: Sequence[str],
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """What is to be said of a split, with bootstrap intervals by group.

    Returns:
        `metrics`: ``{metric: {value, low, high}}``, and `why`, where one of these is NaN. `per_class`:
        ``{class: {images, metric: {value, low, high}}}``, `images` being how many are of the class, and sensitivity what is
        also called recall. `confusion`: as `confusion` returns it.
    """
    multilabel = labels.ndim == 2
    reasons = undefined.Reasons(decided, labels, classes, MEANS_OVER_CLASSES)
    found = bootstrap.bootstrap(
        lambda w: weighted(p, decided, labels, w),
        groups,
        resamples,
        level,
        seed,
        units=groups_behind(decided, labels, groups, len(classes)),
        ranges={
            name: (0.0, 1.0)
            for name in (*names(multilabel), *(f"per_class/{m}" for m in PER_CLASS))
            if name not in CALIBRATED
        },
        biased=("ece",),
    )
    counts = confusion(decided, labels, len(classes))
    images = counts[:, 1].sum(axis=-1) if multilabel else counts.sum(axis=-1)
    return {
        "metrics": {name: _explained(found[name], reasons.of(name)) for name in names(multilabel)},
        "per_class": {
            c: {
                "images": int(images[i]),
                **{name: _explained(found[f"per_class/{name}"][i], reasons.of_class(name, i)) for name in PER_CLASS},
            }
            for i, c in enumerate(classes)
        },
        "confusion": counts.tolist(),
    }


def _explained(found: dict[str, Any], why: str) -> dict[str, Any]:
    return found | {"why": why or _NO_NUMBER} if math.isnan(found["value"]) else found


def groups_behind(
    decided: np.ndarray, labels: np.ndarray, groups: Sequence[str], classes: int
) -> dict[str, np.ndarray]:
    """How many groups the metrics of a class, `(C,)`, and their means over classes rest on.

    For a class these are the groups that have an image in the denominator; for the mean, its degrees of freedom by the
    approximation of Welch and Satterthwaite, if images of all classes vary alike. So a rare class makes them few.
    """
    number = np.unique(np.asarray(groups), return_inverse=True)[1]

    def count(member: np.ndarray) -> np.ndarray:
        return np.array([len(np.unique(number[column])) for column in member.T])

    truth, chosen = (x > 0 if x.ndim == 2 else x[:, None] == np.arange(classes) for x in (labels, decided))
    with_class, without = count(truth), count(~truth)
    each = {
        "precision": count(chosen),
        "sensitivity": with_class,
        "specificity": without,
        "f1": count(truth | chosen),
        "auroc": np.minimum(with_class, without),
        "average_precision": with_class,
    }
    behind = {f"per_class/{name}": value for name, value in each.items()}
    for mean, of in MEANS_OVER_CLASSES.items():
        share = 1 / each[of][each[of] > 0]
        freedom = share.sum() ** 2 / (share**3).sum() if share.size else 0
        behind[mean] = np.array(max(2, min(round(freedom), number.max() + 1)))
    return behind


def change(
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    decided: tuple[np.ndarray, np.ndarray],
    classes: Sequence[str],
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Metrics after minus before, of two models on the same images, with intervals as `assess`: paired, so narrower.

    `decided` has the decisions before and after.
    """
    units = [groups_behind(d, labels, groups, len(classes)) for d in decided]
    found = bootstrap.bootstrap(
        paired(before, after, labels, decided),
        groups,
        resamples,
        level,
        seed,
        units={name: np.minimum(units[0][name], units[1][name]) for name in units[0]},
        ranges={name: (-1.0, 1.0) for name in names(labels.ndim == 2) if name not in CALIBRATED},
        difference=True,
    )
    first, second = (undefined.Reasons(d, labels, classes, MEANS_OVER_CLASSES) for d in decided)
    return {name: _explained(value, first.of(name) or second.of(name)) for name, value in found.items()}


def paired(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, decided: tuple[np.ndarray, ...]
) -> bootstrap.Statistics:
    """Metrics after minus before as a statistic of weights."""

    def difference(weights: np.ndarray) -> Mapping[str, np.ndarray]:
        old, new = (weighted(p, d, labels, weights) for p, d in zip((before, after), decided, strict=True))
        return {name: new[name] - old[name] for name in names(labels.ndim == 2)}

    return difference
