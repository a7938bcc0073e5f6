"""Compares two runs on the same images: every metric of both, and the difference with its 95 % bootstrap interval.

Reads `predictions_<split>.csv` of both. The bootstrap resamples groups and takes the difference of the two runs within each
resample, so what makes images hard for both cancels: such an interval is narrower than what two separate intervals suggest.
Where both decide alike on all images it is not zero wide: on other images they may not, see `bootstrap.bootstrap`. It says how
far the difference would vary with other images of this kind; not with other seeds of the training, for which each run should be
repeated.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from vitft_jax import bootstrap, cli, data, metrics, report
from vitft_jax.errors import InputError


def compare(a: Path, b: Path, split: str = "test") -> dict[str, Any]:
    """Compares the predictions of two runs on a split.

    Returns:
        `images` and `groups`: how many. `same`: on how many of the images both decide alike. `metrics`:
        ``{metric: {a, b, value, low, high, share_better}}``, where `value` is b minus a with its interval, see
        `metrics.change`, and `share_better` the share of the resamples of groups in which b is the better run, ties
        counting one half. `mcnemar`: of accuracy, see `mcnemar`; None where images have several labels or groups
        several images: they are not independent then, which the test presumes.

    Raises:
        InputError: The predictions are missing or damaged, or not of the same images, labels and classes.
    """
    first, second = (report.read_predictions(run / f"predictions_{split}.csv") for run in (a, b))
    for run, found in ((a, first), (b, second)):
        if twice := [name for name, times in Counter(found.names).items() if times > 1]:
            raise InputError(
                f"{run}: {twice[0]!r} is in its table of predictions more than once; evaluate the run again"
            )
    second = _in_order(first, second, b)
    decided = (first.decided, second.decided)
    both = (first.probabilities, second.probabilities)
    changes = metrics.change(*both, first.labels, first.groups, decided, first.classes, metrics.RESAMPLES)
    drawn = bootstrap.draws(metrics.paired(*both, first.labels, decided), first.groups, metrics.RESAMPLES)
    each = [metrics.compute(p.probabilities, p.labels, p.multilabel, p.decided) for p in (first, second)]
    groups = len(set(first.groups))
    alike = decided[0] == decided[1]
    single = groups == len(first.names) and not first.multilabel
    return {
        "images": len(first.names),
        "groups": groups,
        "same": int((alike if alike.ndim == 1 else alike.all(axis=1)).sum()),
        "metrics": {
            name: {"a": each[0][name], "b": each[1][name], **change, "share_better": _share(name, drawn[name])}
            for name, change in changes.items()
        },
        "mcnemar": mcnemar(*(d == first.labels for d in decided)) if single else None,
    }


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The exact McNemar test of whether two models are right equally often, on independent images.

    Args:
        a: Whether the first model is right, bool `(n,)`.
        b: Whether the second one is.

    Returns:
        `only_a`, `only_b`: images on which one alone is right. `p`: two-sided probability of so uneven a division of these,
        or a more uneven one, if each fell to either model by the toss of a coin.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": float(p)}


def _share(name: str, drawn: np.ndarray) -> float:
    defined = drawn[~np.isnan(drawn)]
    if not defined.size:
        return float("nan")
    better = -defined if name in metrics.LOWER_IS_BETTER else defined
    return float((better > 0).mean() + (better == 0).mean() / 2)


def _in_order(first: report.Predictions, second: report.Predictions, run: Path) -> report.Predictions:
    """The second predictions in the order of the first.

    Raises:
        InputError: They are not of the same images, groups, labels and classes.
    """
    if first.classes != second.classes or first.multilabel != second.multilabel:
        raise InputError(
            f"{run}: its classes are {', '.join(second.classes)}, those of the other run {', '.join(first.classes)}; "
            "only runs with the same classes can be compared"
        )
    if set(first.names) != set(second.names):
        other = sorted(set(first.names) ^ set(second.names))
        raise InputError(
            f"{run}: {len(other)} images, such as {other[0]!r}, are in the split of one run only; "
            "only runs on the same images can be compared: give both the same data.table with a column split"
        )
    place = {name: i for i, name in enumerate(second.names)}
    order = np.array([place[name] for name in first.names])
    ordered = report.Predictions(
        first.names,
        tuple(second.groups[i] for i in order),
        second.labels[order],
        second.decided[order],
        second.probabilities[order],
        second.classes,
    )
    for what, here, there in (("group", first.groups, ordered.groups), ("label", first.labels, ordered.labels)):
        for name, x, y in zip(first.names, here, there, strict=True):
            if np.any(x != y):
                raise InputError(f"{run}: the {what} of {name!r} is {y} there and {x} in the other run")
    return ordered


def show(a: Path, b: Path, split: str, result: dict[str, Any]) -> None:
    """Prints what `compare` returned."""
    table = Table(
        title=f"{split} split, {result['images']} images in {result['groups']} groups; A = {a}, B = {b}",
        title_justify="left",
    )
    for column in ("metric", "A", "B", "B - A (95 % CI)", "B better in"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, m in result["metrics"].items():
        values = [f"{m[run]:.3f}" if m[run] == m[run] else "undefined" for run in "ab"]
        share = f"{100 * m['share_better']:.1f} %" if m["share_better"] == m["share_better"] else ""
        lower = " (lower is better)" if name in metrics.LOWER_IS_BETTER else ""
        table.add_row(name + lower, *values, Text(report.interval(m, sign="+")), share)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print("'B better in': share of the resamples of groups in which B is better; ties count one half.")
    print(f"Both runs decide alike on {result['same']} of the {result['images']} images.")
    if (test := result["mcnemar"]) is not None:
        print(
            f"Exact McNemar test of accuracy: {test['only_a']} images right in A only, {test['only_b']} in B only, "
            f"p = {test['p']:.3g}."
        )
    elif result["groups"] < result["images"]:
        print("No McNemar test: it presumes independent images, and groups have several here.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = cli.parser(__doc__, "python -m vitft_jax.compare runs/probe runs/lora --split test")
    arguments.add_argument("a", type=Path, metavar="RUN_A", help="folder of a run, or one of its evaluations/")
    arguments.add_argument("b", type=Path, metavar="RUN_B", help="another, on the same images")
    arguments.add_argument("--split", default="test", choices=data.SPLITS, help="default: test")
    flags = arguments.parse_args(argv)
    show(flags.a, flags.b, flags.split, compare(flags.a, flags.b, flags.split))


if __name__ == "__main__":
    cli.main(main)
