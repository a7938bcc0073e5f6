"""What runs of several seeds say together: means over the seeds, with an interval of that mean.

Groups of images are resampled jointly in all seeds, so an interval says how far the mean would vary with other images of
this kind; how far single seeds lie apart is another matter, for which stands their range.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitft_jax import bootstrap, metrics, report
from vitft_jax.errors import InputError
from vitft_jax.report import Predictions


def pooled(runs: Sequence[Path], split: str = "test") -> dict[str, dict[str, float]]:
    """Metrics of a split, mean over the seeds, each with its interval: ``{metric: {value, low, high}}``.

    Raises:
        InputError: The predictions of a run are missing or damaged.
    """
    read = [report.read_predictions(run / f"predictions_{split}.csv") for run in runs]

    def of(one: Predictions, weights: np.ndarray) -> Mapping[str, np.ndarray]:
        values = metrics.weighted(one.probabilities, one.decided, one.labels, weights)
        return {name: values[name] for name in metrics.names(one.multilabel)}

    return _bootstrap(read, lambda i, weights: of(read[i], weights), _units(read), biased=("ece",))


def pooled_change(before: Sequence[Path], after: Sequence[Path], split: str = "test") -> dict[str, dict[str, float]]:
    """Changes of metrics from runs to others on the same images, seed by seed: mean over the seeds, as `pooled`.

    Raises:
        InputError: There are not as many runs, those of a seed have other images or labels; or as `pooled`.
    """
    if len(before) != len(after):
        raise InputError(f"{len(before)} runs to compare {len(after)} runs with; give one for each, in the same order")
    read = [[report.read_predictions(run / f"predictions_{split}.csv") for run in runs] for runs in (before, after)]
    pairs = list(zip(*read, strict=True))
    for (old, new), there, here in zip(pairs, before, after, strict=True):
        if (old.names, old.classes) != (new.names, new.classes) or not np.array_equal(old.labels, new.labels):
            raise InputError(
                f"{here}: its {split} images or their labels are not those of {there}; give the runs in the same order"
            )

    def of(i: int, weights: np.ndarray) -> Mapping[str, np.ndarray]:
        old, new = pairs[i]
        return metrics.paired(old.probabilities, new.probabilities, old.labels, (old.decided, new.decided))(weights)

    units = [_units(side) for side in read]
    fewest = {name: np.minimum(units[0][name], units[1][name]) for name in units[0]}
    return _bootstrap(read[0], of, fewest, difference=True)


def _units(read: Sequence[Predictions]) -> dict[str, np.ndarray]:
    """How many groups a metric rests on, in all seeds together."""
    decided, labels = (np.concatenate([getattr(one, part) for one in read]) for part in ("decided", "labels"))
    groups = [group for one in read for group in one.groups]
    return metrics.groups_behind(decided, labels, groups, len(read[0].classes))


def _bootstrap(
    read: Sequence[Predictions],
    of: Callable[[int, np.ndarray], Mapping[str, np.ndarray]],
    units: Mapping[str, np.ndarray],
    **how: Any,
) -> dict[str, dict[str, float]]:
    """Means over seeds of what `of` says of a seed under weights of its images."""
    ends = np.cumsum([len(one.names) for one in read])

    def mean(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = [of(i, part) for i, part in enumerate(np.split(weights, ends[:-1]))]
        return {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}

    groups = [group for one in read for group in one.groups]
    shares = [name for name in metrics.names(read[0].multilabel) if name not in metrics.CALIBRATED]
    ranges = dict.fromkeys(shares, (-1.0, 1.0) if how.get("difference") else (0.0, 1.0))
    return bootstrap.bootstrap(mean, groups, metrics.RESAMPLES, units=units, ranges=ranges, **how)
