"""Classification metrics with confidence intervals; the metrics themselves are scikit-learn's."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn import metrics as sk

MULTICLASS = ("accuracy", "balanced_accuracy", "f1_macro", "auroc")
MULTILABEL = ("subset_accuracy", "f1_macro", "f1_micro", "auroc")
RESAMPLES = 1000  # of the bootstrap; each end of a 95 % interval then rests on 25 draws


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


def decisions(p: np.ndarray, multilabel: bool) -> np.ndarray:
    """The most probable class `(n,)`, or each label at a threshold of 0.5 `(n, C)`."""
    return (p >= 0.5).astype(np.int32) if multilabel else p.argmax(axis=-1).astype(np.int32)


def compute(p: np.ndarray, labels: np.ndarray, multilabel: bool) -> dict[str, float]:
    """Metrics of probabilities `(n, C)` against labels `(n,)`, or `(n, C)` of 0/1.

    A metric that is not defined for these labels is NaN: AUROC is the mean over classes of one against the rest, so it needs
    every class to occur and not to be alone.
    """
    decided, truth = decisions(p, multilabel), labels.astype(np.int32)
    one_hot = truth if multilabel else np.eye(p.shape[1], dtype=np.int32)[truth]
    occurs = one_hot.any(axis=0) & ~one_hot.all(axis=0)
    auroc = sk.roc_auc_score(one_hot, p, average="macro") if occurs.all() else np.nan
    if multilabel:
        return {
            "subset_accuracy": sk.accuracy_score(truth, decided),
            "f1_macro": sk.f1_score(truth, decided, average="macro", zero_division=0.0),
            "f1_micro": sk.f1_score(truth, decided, average="micro", zero_division=0.0),
            "auroc": auroc,
        }
    with warnings.catch_warnings():  # a class that is decided but never true: recall averages over the true ones
        warnings.simplefilter("ignore", UserWarning)
        balanced = sk.balanced_accuracy_score(truth, decided)
    return {
        "accuracy": sk.accuracy_score(truth, decided),
        "balanced_accuracy": balanced,
        "f1_macro": sk.f1_score(truth, decided, average="macro", zero_division=0.0),
        "auroc": auroc,
    }


def intervals(
    p: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    multilabel: bool,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Metrics with percentile bootstrap intervals, resampled by group since images of a group are not independent.

    Returns:
        ``{metric: {value, low, high}}``; `low` and `high` span `level` of the resamples in which the metric is defined.
    """
    return bootstrap(lambda rows: compute(p[rows], labels[rows], multilabel), groups, resamples, level, seed)


def change(
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    multilabel: bool,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Metrics after minus before, of two models on the same images, with intervals as `intervals`: paired, so narrower."""

    def difference(rows: np.ndarray) -> dict[str, float]:
        old, new = (compute(p[rows], labels[rows], multilabel) for p in (before, after))
        return {name: new[name] - old[name] for name in old}

    return bootstrap(difference, groups, resamples, level, seed)


def bootstrap(
    function: Callable[[np.ndarray], dict[str, float]],
    groups: Sequence[str],
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Values of ``function(rows)`` on all rows, with percentile intervals over resamples of whole groups."""
    values = function(np.arange(len(groups)))
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(group_of == g) for g in range(group_of.max() + 1)]
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(resamples):
        chosen = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        for name, value in function(chosen).items():
            draws[name].append(value)
    tail = 100 * (1 - level) / 2
    result = {}
    for name, value in values.items():
        defined = np.asarray(draws[name])[~np.isnan(draws[name])]
        low, high = np.percentile(defined, [tail, 100 - tail]) if defined.size else (np.nan, np.nan)
        result[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return result
