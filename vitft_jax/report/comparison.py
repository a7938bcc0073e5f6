"""Several runs on one page: results, paired differences from the first, settings that differ, cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from vitft_jax import compare, metrics
from vitft_jax.errors import InputError
from vitft_jax.report import charts, conduct, page, record, results, words
from vitft_jax.report.files import write_text
from vitft_jax.report.markup import Html, folded, join, outside, table, tag
from vitft_jax.report.record import Record
from vitft_jax.report.style import SERIES

MOST = len(ascii_uppercase)


def write(runs: Sequence[Path], output: Path, images: bool = True) -> None:
    """Writes the page of several runs; `images` is whether it may name any, and paths of the machine.

    Raises:
        InputError: There are too many, a folder holds no run that was evaluated on its test split, or classes differ.
    """
    write_text(output, render([record.read(path) for path in runs], images))


def render(found: Sequence[Record], images: bool = True) -> str:
    """The page of several runs; as `write`."""
    _check(found)
    found = found if images else [one.to_pass_on for one in found]
    letters = ascii_uppercase[: len(found)]
    runs = [_run(letter, one) for letter, one in zip(letters, found, strict=True)]
    names = ", ".join(one.name for one in found)
    head = join(
        tag("h1", f"{len(found)} runs compared"),
        tag("p", "Test split; differences are those from run A.", class_="lead"),
        tag("div", tag("p", page.NOT_A_DEVICE), class_="box"),
        _warnings(found, letters),
    )
    sections = {
        "Runs": join(table(["", "run", "methods", "test images", "groups"], runs, left=3), _headline(found, letters)),
        "Differences": [
            _difference(found[0], one, letter, images) for letter, one in zip(letters[1:], found[1:], strict=True)
        ],
        "Training": _training(found, letters),
        "Cost": _cost(found, letters),
        "Configuration": _config(found, letters),
    }
    return page.document(names, head, {name: join(content) for name, content in sections.items() if content})


def _check(found: Sequence[Record]) -> None:
    if len(found) > MOST:
        raise InputError(f"{len(found)} runs: at most {MOST} fit on one page")
    first = found[0]
    for one in found:
        if not one.of("metrics", "test"):
            raise InputError(f"{one.path}: has no results on its test split yet; wait for its end, or leave it out")
        if (one.classes, one.multilabel) != (first.classes, first.multilabel):
            raise InputError(
                f"{one.path}: its classes are {', '.join(one.classes)}, those of {first.path} {', '.join(first.classes)}; "
                "only runs with the same classes can be compared"
            )


def _run(letter: str, one: Record) -> list[Any]:
    p = one.predictions.get("test")
    counts = [f"{len(p.names):,}", f"{len(set(p.groups)):,}"] if p else ["not recorded"] * 2
    differs = join(tag("br"), outside("; ".join(one.differs))) if one.differs else None
    return [tag("b", letter), join(outside(one.name), differs), " + ".join(one.config.methods) or "none", *counts]


def _warnings(found: Sequence[Record], letters: str) -> Html:
    """What makes results look better than they are, each with the runs of which it is known."""
    doubted: dict[str, list[str]] = {}
    for letter, one in zip(letters, found, strict=True):
        for said in conduct.doubts(one):
            doubted.setdefault(said, []).append(letter)
    return join(
        tag(
            "div",
            tag("p", tag("b", f"Run {whose[0]}: " if len(whose) == 1 else f"Runs {', '.join(whose)}: "), said),
            class_="box warn",
        )
        for said, whose in doubted.items()
    )


def _headline(found: Sequence[Record], letters: str) -> Html:
    """The first metrics of all runs, as a chart and as a table."""
    names = metrics.names(found[0].multilabel)
    shown = []
    for name in names[: metrics.HEADLINE]:
        rows = [
            (letter, *_numbers(one.of("metrics", "test").get(name))) for letter, one in zip(letters, found, strict=True)
        ]
        if any(math.isfinite(row[1]) for row in rows):
            described = f"{words.name(name)} of the runs with 95 % intervals; the table has the numbers"
            shown.append(tag("figure", tag("h3", words.name(name)), charts.forest(rows, described)))
    rows = [
        [words.name(name), *(results.value(one.of("metrics", "test").get(name, {})) for one in found)] for name in names
    ]
    return join(
        tag("div", shown, class_="charts"),
        tag(
            "p",
            results.HOW_TO_READ,
            " Intervals of two runs that overlap say little: the same images are hard for both. The differences below "
            "are what tells the runs apart.",
            class_="note",
        ),
        table(["Metric", *letters], rows, "Test split: value, and its 95 % interval"),
    )


def _numbers(value: Mapping[str, float | None] | None) -> tuple[float, float, float]:
    numbers = ((value or {}).get(key) for key in ("value", "low", "high"))
    return tuple(math.nan if number is None else number for number in numbers)


def _difference(first: Record, other: Record, letter: str, images: bool) -> Html:
    """A run minus the first, paired; says why not, where their images differ."""
    title = tag("h3", f"{letter} \u2212 A: ", outside(other.name), " minus ", outside(first.name))
    try:
        told = compare.compare(first.path, other.path)
    except InputError as error:
        unpaired = "No differences: these runs cannot be paired, so compare their results above with care. "
        return join(title, tag("div", tag("p", unpaired, outside(error) if images else None), class_="box warn"))
    rows = [
        [
            words.name(name),
            *(words.number(m[run]) for run in "ab"),
            results.value(m, sign="+"),
            f"{100 * m['share_better']:.1f} %" if words.defined(m["share_better"]) else "",
        ]
        for name, m in told["metrics"].items()
    ]
    few = list(told["metrics"])[: metrics.HEADLINE]
    drawn = [(words.NAMES[name], *_numbers(told["metrics"][name])) for name in few]
    described = (
        f"{letter} minus A in {', '.join(words.NAMES[name] for name in few)}, with 95 % intervals; numbers in the table"
    )
    return join(
        title,
        tag("div", tag("figure", charts.forest(drawn, described, zero=True)), class_="charts"),
        table(
            ["Metric", "A", letter, f"{letter} \u2212 A", f"{letter} better in"],
            rows,
            f"{told['images']:,} test images in {told['groups']:,} groups; paired",
        ),
        tag(
            "p",
            f"'{letter} better in': share of the resamples of groups in which it is the better run, ties counting one half. An "
            "interval that holds 0 does not show that the runs are alike. Other seeds of the training are not in it.",
            class_="note",
        ),
        _mcnemar(told["mcnemar"], letter),
    )


def _mcnemar(test: Mapping[str, float] | None, letter: str) -> Html | None:
    if test is None:
        return None
    return tag(
        "p",
        f"Exact McNemar test of accuracy: {test['only_a']} images right in A only, {test['only_b']} in {letter} only, "
        f"p = {test['p']:.3g}.",
        class_="note",
    )


def _training(found: Sequence[Record], letters: str) -> Html | None:
    """The metric that chose the checkpoints, by step."""
    name = found[0].config.train.best_metric
    drawn = []
    for letter, one in zip(letters, found, strict=True):
        mine = [(e["step"], e[name]) for e in one.log if e.get("split") == "val" and name in e]
        if mine:
            x, y = zip(*mine, strict=True)
            label = join(f"{letter}: ", outside(one.name))
            drawn.append(charts.Line(label, np.array(x), np.array(y, float), points=True))
    if not drawn:
        return None
    shown = charts.lines(
        drawn[:SERIES], "optimiser step", words.name(name), f"{words.name(name)} on validation by step"
    )
    left_out = tag("p", f"The first {SERIES} runs are drawn.", class_="note") if len(drawn) > SERIES else None
    return join(tag("div", tag("figure", tag("h3", "Validation"), shown), class_="charts"), left_out)


def _cost(found: Sequence[Record], letters: str) -> Html:
    rows = []
    for letter, one in zip(letters, found, strict=True):
        parameters, flops, timing, size = (one.summary.get(k, {}) for k in ("parameters", "flops", "timing", "bytes"))
        rows.append(
            [
                letter,
                words.whole(parameters.get("total")),
                words.whole(parameters.get("trainable")),
                words.operations(flops.get("forward")),
                words.speed(timing.get("train_images_per_second")),
                words.speed(timing.get("eval_images_per_second")),
                words.size(size.get("checkpoint")),
                words.duration(timing.get("seconds")),
            ]
        )
    head = ["", "parameters", "trained", "forward pass", "training", "evaluation", "checkpoint", "time in all"]
    machines = {conduct.machine(one) for one in found}
    return join(
        table(head, rows, "One image, one forward pass; speeds with reading of images"),
        tag("p", f"Measured on {machines.pop()}.", class_="note")
        if len(machines) == 1
        else tag("p", "The runs were measured on different machines: do not compare their speeds.", class_="box warn"),
    )


def _config(found: Sequence[Record], letters: str) -> Html:
    """Keys in which the runs differ, and per run what differs from the defaults."""
    each = [{key: now for key, now, _ in one.changed} for one in found]
    defaults = {key: was for one in found for key, _, was in one.changed}
    rows = [
        [tag("code", key), *(tag("code", conduct.shown(mine.get(key, default))) for mine in each)]
        for key, default in sorted(defaults.items())
        if len({repr(mine.get(key, default)) for mine in each}) > 1
    ]
    return join(
        table(["Key", *letters], rows, "Settings in which the runs differ", left=1 + len(letters))
        if rows
        else tag("p", "All settings are the same."),
        [
            folded(join(f"{letter}: ", outside(one.name)), conduct.config(one), conduct.origin(one))
            for letter, one in zip(letters, found, strict=True)
        ],
    )
