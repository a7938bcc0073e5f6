"""Thresholds of labels, chosen on the validation split.

The threshold of the best F1 on a few dozen positives is largely chance. So it is chosen in resamples of whole groups, and the
mean is taken, of logits; and where a label has too few groups even for that, its threshold stays at a probability of one half,
and the run says so.
"""

from collections.abc import Sequence

import numpy as np

from vitft_jax import bootstrap

FEWEST = {"f1": 10, "youden": 5, "half": 0}
"""Rules, with the number of groups with a label, and without it, that each needs: with fewer, one half is the safer choice."""
_RESAMPLES = 200


def choose(logits: np.ndarray, labels: np.ndarray, groups: Sequence[str], rule: str) -> np.ndarray:
    """The thresholds `(C,)` of logits at which labels are decided.

    Args:
        logits: `(n, C)`.
        labels: `(n, C)` of 0/1.
        groups: Of the images, `(n,)`.
        rule: 'f1': the highest F1 of a label. 'youden': the highest sensitivity + specificity - 1 (Youden 1950), which does not
            depend on how frequent the label is. 'half': 0 for all labels, a probability of one half.
    """
    found = np.zeros(logits.shape[1])
    if rule == "half":
        return found
    weights, few = bootstrap.resamples_of(groups, _RESAMPLES), too_few(labels, groups, rule)
    for c, (score, truth) in enumerate(zip(logits.T.astype(np.float64), labels.T > 0, strict=True)):
        if not few[c]:
            found[c] = _mean_best(score, truth, weights, rule)
    return found


def too_few(labels: np.ndarray, groups: Sequence[str], rule: str) -> list[str]:
    """For each label `(C,)`, why the validation split tells too little for a threshold, in words; '' where it does not."""
    names = np.asarray(groups)

    def why(truth: np.ndarray) -> str:
        for where, side in (("in", truth), ("missing in", ~truth)):
            if (count := len(set(names[side]))) < FEWEST[rule]:
                return f"{where} {count} validation group{'s' * (count != 1)}, {FEWEST[rule]} are needed"
        return ""

    return [why(truth) for truth in labels.T > 0]


def _mean_best(score: np.ndarray, truth: np.ndarray, weights: np.ndarray, rule: str) -> float:
    """Mean over the weightings `(n, R)` of the threshold that is best under each, half-way between two scores `(n,)`."""
    order = np.argsort(score)
    first = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    values = score[order][first]
    cuts = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    # Decided at each cut: all of that score and above.
    hits, alarms = (
        np.add.reduceat(weights[order] * side[order][:, None], first, axis=0)[::-1].cumsum(axis=0)[::-1]
        for side in (truth, ~truth)
    )
    positives, negatives = hits[0], alarms[0]
    if rule == "f1":
        quality = 2 * hits / np.maximum(hits + alarms + positives, 1)
    else:
        quality = hits / np.maximum(positives, 1) - alarms / np.maximum(negatives, 1)
    usable = (positives > 0) & (negatives > 0)
    return float(cuts[quality[:, usable].argmax(axis=0)].mean())
