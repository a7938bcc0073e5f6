"""How often 95 % intervals hold the truth, in simulated sets of images with groups, as Markdown tables on the screen.

    python scripts/interval_coverage.py --sets 400 --groups 15 30 60

Every set goes the way of a run's results: `metrics.assess` for the values of a model, `metrics.change` for the difference to
a second one, which is a little better and errs on much the same images. The truth is what the same metrics say of 200,000
other groups. A group has one to four images of one class (or the same labels), whose logits share most of their noise.
"""

import argparse
import functools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from vitft_jax import metrics

TASKS = {
    "classes": "three classes, equally frequent",
    "labels": "three labels; half, a third and a fifth of the groups have them",
    "rare": "three classes, the third in a tenth of the groups",
}
_CLASSES = ("a", "b", "c")
_POPULATION = 200_000
_SHARED = 0.84  # of a noise of variance 1, what the images of a group have in common
_ALIKE = 0.8  # correlation of the noise of both models


def simulated(rng: np.random.Generator, groups: int, task: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Probabilities of two models, labels, and numbers of the groups."""
    of_group = np.repeat(np.arange(groups), rng.integers(1, 5, groups))

    def noise() -> np.ndarray:
        own, shared = rng.normal(size=(len(of_group), 3)), rng.normal(size=(groups, 3))
        return math.sqrt(1 - _SHARED**2) * own + _SHARED * shared[of_group]

    first, other = noise(), noise()
    second = _ALIKE * first + math.sqrt(1 - _ALIKE**2) * other
    if task == "labels":
        labels = (rng.random((groups, 3)) < [1 / 2, 1 / 3, 1 / 5])[of_group].astype(np.float64)
        truth, strength = 2 * labels - 1, (1.0, 1.1)
    else:
        labels = rng.choice(3, groups, p=[0.45, 0.45, 0.1] if task == "rare" else None)[of_group]
        truth, strength = np.eye(3)[labels], (1.5, 1.7)
    p = [metrics.probabilities(z + s * truth, task == "labels") for z, s in zip((first, second), strength, strict=True)]
    return p, labels, of_group


def _values(told: dict) -> Iterator[tuple[str, dict]]:
    yield from told["metrics"].items()
    for c in _CLASSES:
        yield from ((f"{name} of {c}", told["per_class"][c][name]) for name in metrics.PER_CLASS)


@functools.cache
def truth(task: str) -> tuple[dict[str, float], dict[str, float]]:
    """Values of the first model, and differences of the second to it, by name, in the population."""
    p, labels, _ = simulated(np.random.default_rng(0), _POPULATION, task)
    found = []
    for q in p:
        values = metrics.weighted(q, metrics.decisions(q, labels.ndim == 2), labels, np.ones((len(labels), 1)))
        each = {
            f"{m} of {c}": values[f"per_class/{m}"][i, 0] for i, c in enumerate(_CLASSES) for m in metrics.PER_CLASS
        }
        found.append({name: values[name][0] for name in metrics.names(labels.ndim == 2)} | each)
    return found[0], {name: found[1][name] - found[0][name] for name in metrics.names(labels.ndim == 2)}


def covered(task: str, groups: int, seeds: range, resamples: int = metrics.RESAMPLES) -> Counter:
    """Of sets of these seeds: how many `(kind, name, what)` there are, `what` being 'sets', with an interval, or 'held'."""
    found: Counter = Counter()
    values, differences = truth(task)
    for seed in seeds:
        p, labels, of_group = simulated(np.random.default_rng(1 + seed), groups, task)
        decided = tuple(metrics.decisions(q, labels.ndim == 2) for q in p)
        of_value = metrics.assess(p[0], decided[0], labels, of_group, _CLASSES, resamples, seed=seed)
        change = metrics.change(*p, labels, of_group, decided, _CLASSES, resamples, seed=seed)
        for kind, told, true in (("value", _values(of_value), values), ("difference", change.items(), differences)):
            for name, interval in told:
                if not math.isnan(interval["low"]):
                    found[kind, name, "sets"] += 1
                    found[kind, name, "held"] += bool(interval["low"] <= true[name] <= interval["high"])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=400, help="of each kind (default: %(default)s)")
    parser.add_argument("--groups", type=int, nargs="+", default=[15, 30, 60], help="of each set (default: 15 30 60)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="default: all")
    flags = parser.parse_args()
    for task in flags.tasks:
        _print(task, {groups: covered(task, groups, range(flags.sets)) for groups in flags.groups})


def _print(task: str, found: dict[int, Counter]) -> None:
    print(f"\n{TASKS[task]}: % of the 95 % intervals that hold the truth, with its standard error\n")
    print(f"| | {' | '.join(f'{groups} groups | difference' for groups in found)} |")
    print("|---" * (1 + 2 * len(found)) + "|")
    for name in truth(task)[0]:
        cells = [_cell(counts, kind, name) for counts in found.values() for kind in ("value", "difference")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _cell(counts: Counter, kind: str, name: str) -> str:
    if not (sets := counts[kind, name, "sets"]):
        return ""
    share = counts[kind, name, "held"] / sets
    return f"{100 * share:.1f} \u00b1 {100 * math.sqrt(share * (1 - share) / sets):.1f}"


if __name__ == "__main__":
    main()
