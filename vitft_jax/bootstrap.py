"""Bootstrap intervals of statistics of a data set, resampled by group: images of a group are not independent.

A statistic is a function of weights, not of rows: a resample of whole groups is the number of times that each image is in it.
So all resamples are computed at once, and a paired difference is the difference of two statistics under the same weights.

Intervals are BCa intervals (Efron 1987, doi:10.1080/01621459.1987.10478410): percentiles of the resamples, corrected for the
bias of these and for the change of their spread with the truth. The level is that at which a normal interval with the plain
standard deviation has the width of Student's (Hesterberg 2015, arXiv:1411.5279, section 5.3), as a resample of few groups
varies too little. Those of paired differences are Student's intervals with the standard deviation of the resamples.

How often 95 % intervals as runs report them hold the truth, in % of 200 simulated sets of three classes, for values and for
differences of two models; standard errors are 1 to 2 points, of the calibration error 3. By `scripts/interval_coverage.py
--sets 200`, which has the other metrics, labels and a rare class as well:

| | 15 groups | difference | 30 groups | difference | 60 groups | difference |
|---|---|---|---|---|---|---|
| accuracy | 93.5 | 95.0 | 95.0 | 94.5 | 97.5 | 95.0 |
| balanced accuracy | 98.0 | 96.5 | 94.5 | 94.5 | 96.5 | 95.5 |
| F1 | 97.5 | 97.5 | 95.0 | 95.0 | 97.5 | 95.0 |
| AUROC | 89.8 | 93.9 | 94.0 | 97.5 | 95.0 | 94.5 |
| average precision | 95.9 | 95.4 | 95.0 | 96.0 | 93.0 | 94.0 |
| Brier score | 92.5 | 95.5 | 95.0 | 96.0 | 95.0 | 94.0 |
| log loss | 90.0 | 95.5 | 93.0 | 96.0 | 93.5 | 94.5 |
| calibration error | 78.5 | 94.0 | 83.5 | 97.0 | 79.0 | 94.0 |
| sensitivity of a class | 98.0 to 99.0 | | 95.5 to 99.5 | | 95.5 to 98.5 | |
| specificity of a class | 99.0 to 100 | | 95.5 to 97.0 | | 95.5 | |

So of 15 groups those of AUROC and log loss are too narrow; those of one class, which has a third of the groups, are rather too
wide; and that of a calibration error is a hint, no more. Where the third class has a tenth of the groups, and there are 30 of
them, means over classes hold the truth in 91 to 98 % (15 groups: 71 to 97 %), and the AUROC of that class in 89 % (60 groups:
90 %).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Takes weights `(n, R)`; returns arrays `(..., R)` by name, NaN where a statistic is not defined under these weights."""
_Method = Callable[[float, np.ndarray, np.ndarray, float], tuple[float, float]]
"""An interval of a value, from draws `(R,)`, values without some of the groups `(B,)` and its half-width (`_deviations`)."""

_CHUNK = 2**21  # weights at a time: 16 MB, so that large splits need no more memory than small ones
_SAME = 1e-12  # difference of a resample from the value that is only rounding
_BLOCKS = 200  # at most so many parts of the groups are left out in turn to see how the spread changes
_MOST_BIAS, _MOST_ACCELERATION, _FARTHEST = 1.0, 0.2, 4.0  # beyond, the formula of BCa nears its pole


def resamples_of(groups: Sequence[str], resamples: int, seed: int = 0) -> np.ndarray:
    """Weights `(n, resamples)` of resamples of whole groups with replacement."""
    group_of = _numbers(groups)
    count = int(group_of.max()) + 1
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.ascontiguousarray(times.T[group_of], np.float64)


def once(function: Statistics, images: int) -> dict[str, np.ndarray]:
    """The statistics of the data as they are, `(...)`."""
    return {name: value[..., 0] for name, value in function(np.ones((images, 1))).items()}


def draws(function: Statistics, groups: Sequence[str], resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The statistics of resamples, `(..., resamples)`."""
    size = max(1, _CHUNK // len(groups))
    starts = range(0, resamples, size)
    parts = [function(resamples_of(groups, min(size, resamples - start), seed + i)) for i, start in enumerate(starts)]
    return _joined(parts)


def bootstrap(
    function: Statistics,
    groups: Sequence[str],
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
    units: Mapping[str, np.ndarray] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    biased: Sequence[str] = (),
    difference: bool = False,
) -> dict[str, Any]:
    """Values of statistics with their intervals.

    Args:
        function: The statistics.
        groups: Of the images, `(n,)`.
        resamples: Number of them.
        level: Of the intervals.
        seed: Of the resamples.
        units: For some statistics, how many groups they rest on, `(...)`, such as those that have a class; others rest on
            all of them.
        ranges: Of the statistics that are like a share of images, such as accuracy (0 to 1) or a change of it (-1 to 1), the
            lowest and the highest value. Where no resample differs from the value, as where there is no error, or where two
            models decide alike, a share of the groups that is small enough may still be otherwise: its exact
            (Clopper-Pearson) bound of none in as many trials as there are groups. The ends are the values with this share of
            the groups at the lowest and at the highest.
        biased: Names of the statistics that are biased in small samples, as a mean of absolute values is. Their resamples have
            the same bias once more, so their intervals are mirrored at the value ("basic"), and cover less than they should.
        difference: The statistics are differences of two models. Then all intervals are Student's with the standard deviation
            of the resamples: such differences are about symmetric, and BCa's corrections, estimated from few groups on which
            the models differ, add more noise than they mend.

    Returns:
        ``{name: {value, low, high}}``, or a list of such where a statistic has another dimension than the weightings.
        `low` and `high` rest on the resamples in which the statistic is defined. They are NaN, and `why` says so, where there
        is only one group, and where no resample differs from the value of a statistic without a range.
    """
    count = int(_numbers(groups).max()) + 1
    values, drawn = once(function, len(groups)), draws(function, groups, resamples, seed)
    left_out = _left_out(function, groups) if count > 1 else {}
    result = {}
    for name, value in values.items():
        behind = np.broadcast_to(count if units is None else units.get(name, count), value.shape)
        span = (ranges or {}).get(name)
        found = []
        for i in np.ndindex(value.shape):
            ends, why = (math.nan, math.nan), "only one group"
            if count > 1:
                method = _student if difference else _basic if name in biased else _bca
                ends, why = _ends(
                    method, float(value[i]), drawn[name][i], left_out[name][i], int(behind[i]), level, span
                )
            told = {"value": float(value[i]), "low": float(ends[0]), "high": float(ends[1])}
            found.append(told | {"why": why} if why else told)
        result[name] = found if value.ndim else found[0]
    return result


def _ends(
    method: _Method,
    value: float,
    drawn: np.ndarray,
    left_out: np.ndarray,
    groups: int,
    level: float,
    span: tuple[float, float] | None,
) -> tuple[tuple[float, float], str]:
    """The ends of one interval, and why there are none."""
    drawn, none = drawn[~np.isnan(drawn)], (math.nan, math.nan)
    if math.isnan(value):
        return none, "not defined for these images"
    if not drawn.size:
        return none, "not defined in any resample"
    if np.abs(drawn - value).max() <= _SAME:
        return (_exact(value, *span, groups, level), "") if span else (none, "the same in every resample")
    if groups < 2:
        return none, "only one group"
    return method(value, drawn, left_out, _deviations(groups, level)), ""


def _deviations(groups: int, level: float) -> float:
    """How many standard deviations of the resamples are as wide as Student's interval to either side."""
    return math.sqrt(groups / (groups - 1)) * float(special.stdtrit(groups - 1, (1 + level) / 2))


def _exact(value: float, lowest: float, highest: float, trials: int, level: float) -> tuple[float, float]:
    otherwise = 1 - ((1 - level) / 2) ** (1 / trials)
    return value - otherwise * (value - lowest), value + otherwise * (highest - value)


def _student(value: float, drawn: np.ndarray, _: np.ndarray, deviations: float) -> tuple[float, float]:
    half = deviations * float(drawn.std())
    return value - half, value + half


def _basic(value: float, drawn: np.ndarray, _: np.ndarray, deviations: float) -> tuple[float, float]:
    """The basic interval of a value that is at least 0, widened to hold it."""
    low, high = np.quantile(drawn, special.ndtr([-deviations, deviations]))
    return min(max(0.0, 2 * value - high), value), max(2 * value - low, value)


def _bca(value: float, drawn: np.ndarray, left_out: np.ndarray, deviations: float) -> tuple[float, float]:
    below = np.mean(drawn < value) + np.mean(drawn == value) / 2
    bias = float(np.clip(special.ndtri(below), -_MOST_BIAS, _MOST_BIAS))
    change = np.nanmean(left_out) - left_out[~np.isnan(left_out)] if (~np.isnan(left_out)).any() else np.zeros(1)
    squares = float((change**2).sum())
    acceleration = float((change**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    acceleration = min(max(acceleration, -_MOST_ACCELERATION), _MOST_ACCELERATION)
    ends = np.clip(bias + np.array([-deviations, deviations]), -_FARTHEST, _FARTHEST)
    low, high = np.quantile(drawn, special.ndtr(bias + ends / (1 - acceleration * ends)))
    return min(low, value), max(high, value)


def _left_out(function: Statistics, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """The statistics without one part of the groups after the other, `(..., parts)`."""
    part = _numbers(groups) % _BLOCKS
    numbers = np.arange(part.max() + 1)
    size = max(1, _CHUNK // len(part))
    cuts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return _joined([function((part[:, None] != cut).astype(np.float64)) for cut in cuts])


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}


def _numbers(groups: Sequence[str]) -> np.ndarray:
    return np.unique(np.asarray(groups), return_inverse=True)[1]
