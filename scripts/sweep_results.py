"""What the runs of a sweep say: results.csv, results.md, figure.png and comparison.html in its folder.

A row of results.md, and a point or bar of the figure, is the mean over the seeds; its 95 % interval is that of the mean, over
other images, see `seeds`. The dots beside it are the seeds. The second table of results.md has paired differences, on the same
images seed by seed: from the first arm, or where there is one arm, from the first row. comparison.html has the first seed of
each row.
"""

import csv
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import seeds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from sweep_file import Job, Row, Sweep, check_metrics
from sweep_progress import results

from vitft_jax import metrics, report
from vitft_jax.errors import InputError
from vitft_jax.report import comparison, words

Values = Mapping[Row, Mapping[str, Mapping[str, float]]]
"""Of each row and metric: value, low and high."""


def write(sweep: Sweep, output: Path) -> None:
    """Writes the files; prints the tables.

    Raises:
        InputError: No run is done, or the task has no metric of such a name.
    """
    done = [(job, told) for job in sweep.jobs if (told := results(output, job))]
    if not done:
        raise InputError(f"{output}: no run of the sweep is done")
    known = list(done[0][1]["metrics"]["test"])
    _csv(output / "results.csv", sweep, done, known)
    check_metrics(sweep, done[0][1])
    shown = sweep.metrics or tuple(known[: metrics.HEADLINE])
    rows = {row: jobs for row in sweep.rows if (jobs := [job for job, _ in done if job.row == row])}
    pooled = {row: seeds.pooled([output / job.name for job in jobs]) for row, jobs in rows.items()}
    each = {job.name: {name: value["value"] for name, value in told["metrics"]["test"].items()} for job, told in done}
    lines = markdown(sweep, rows, pooled, shown, {job.name: told for job, told in done})
    lines += differences(sweep, rows, output, shown)
    report.write_text(output / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    _figure(sweep, rows, pooled, each, shown).savefig(output / "figure.png", dpi=110)
    compared = [output / jobs[0].name for jobs in rows.values()][: comparison.MOST]
    try:
        comparison.write(compared, output / "comparison.html")
    except InputError as error:
        print(f"no comparison.html: {error}")


def publish(output: Path, folder: Path) -> None:
    """Copies the tables and the figure of a sweep to NAME.csv, NAME.md and NAME.png, NAME being that of its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.csv", "results.md", "figure.png"):
        shutil.copyfile(output / name, folder / f"{output.absolute().name}{Path(name).suffix}")


def _csv(path: Path, sweep: Sweep, done: Sequence[tuple[Job, dict[str, Any]]], known: Sequence[str]) -> None:
    keys = list(sweep.jobs[0].values)
    head = ["run", "arm", *keys, *(f"{name}{part}" for name in known for part in ("", "_low", "_high"))]
    head += ["trainable_parameters", "trainable_percent", "megabytes", "seconds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for job, told in done:
            test = told["metrics"]["test"]
            numbers = [test.get(name, {}).get(part) for name in known for part in ("value", "low", "high")]
            p, seconds = told["parameters"], f"{told['timing']['seconds']:.1f}"
            sizes = (p["trainable"], f"{p['trainable_percent']:.2f}", f"{_bytes(told) / 1e6:.1f}")
            writer.writerow([job.name, job.arm, *job.values.values(), *numbers, *sizes, seconds])


def markdown(
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Values,
    shown: Sequence[str],
    told: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Lines of the table."""
    lines = [f"**{sweep.title}**, test split, mean over seeds (95 % CI)", ""]
    lines += _head(sweep, ["seeds", "trainable", "MB", *shown])
    for row, jobs in rows.items():
        first = told[jobs[0].name]
        cells = [str(len(jobs)), f"{first['parameters']['trainable_percent']:.2f} %", f"{_bytes(first) / 1e6:.1f}"]
        cells += [report.interval(pooled[row][name]) for name in shown]
        lines.append(_line(sweep, row, cells))
    return lines


def differences(sweep: Sweep, rows: Mapping[Row, Sequence[Job]], output: Path, shown: Sequence[str]) -> list[str]:
    """Lines of the table of paired differences; none where there is one row."""
    found, compared_with = [], set()
    for row, jobs in rows.items():
        first = _compared_with(row, rows)
        by_seed = {job.values.get("seed"): output / job.name for job in rows.get(first, ())}
        pairs = [(by_seed[s], output / job.name) for job in jobs if (s := job.values.get("seed")) in by_seed]
        if first == row or not pairs:
            continue
        compared_with.add(first)
        try:
            change = seeds.pooled_change(*zip(*pairs, strict=True))
            cells = [report.interval(change[name], sign="+") for name in shown]
        except InputError:
            cells = ["other images"] * len(shown)
        found.append(_line(sweep, row, [str(len(pairs)), *cells]))
    if not found:
        return []
    first = next(iter(compared_with))
    label = first[0][1] if len({row[0] for row in rows}) > 1 else _label(first, "")
    return [
        "",
        f"Difference from {label}, on the same images seed by seed, mean over seeds (95 % CI)",
        "",
        *_head(sweep, ["seeds", *shown]),
        *found,
    ]


def _compared_with(row: Row, rows: Mapping[Row, Sequence[Job]]) -> Row:
    """The same of the first arm; the first row where there is one arm."""
    arms = list(dict.fromkeys(row[0] for row in rows))
    return (arms[0], *row[1:]) if len(arms) > 1 else next(iter(rows))


def _head(sweep: Sweep, columns: Sequence[str]) -> list[str]:
    named = any(job.arm for job in sweep.jobs)
    head = [*["arm"] * named, *(key for key in sweep.jobs[0].values if key != "seed"), *columns]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]


def _line(sweep: Sweep, row: Row, cells: Sequence[str]) -> str:
    named = any(job.arm for job in sweep.jobs)
    return f"| {' | '.join([*(str(value) for key, value in row if key != 'arm' or named), *cells])} |"


def _bytes(summary: Mapping[str, Any]) -> int:
    """Of the arrays that a model is."""
    size = summary["bytes"]
    return size["arrays"] if "arrays" in size else size["trainable"] + size["frozen"]


def _figure(
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Values,
    each: Mapping[str, Mapping[str, float | None]],
    shown: Sequence[str],
) -> Figure:
    """A panel for each metric with lines against `Sweep.x`; or one panel with a bar for each row in groups by metric."""
    columns = min(2, len(shown)) if sweep.x else 1
    height = math.ceil(len(shown) / columns) if sweep.x else 1
    size = (5.2 * columns, 3.4 * height) if sweep.x else (max(7, 1.5 + len(shown) * (0.5 + 0.25 * len(rows))), 4.6)
    figure = Figure(figsize=size, layout="constrained")
    told = "test split; mean over seeds with the 95 % interval over images; small dots are seeds"
    figure.suptitle(f"{sweep.title}\n{told}", x=0.01, ha="left", fontsize="medium")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    if not sweep.x:
        _bars(panels[0], rows, pooled, each, shown)
        return figure
    for panel in panels[len(shown) :]:
        panel.remove()
    for panel, name in zip(panels, shown, strict=False):
        of = {row: value[name] for row, value in pooled.items()}
        _lines(panel, sweep, rows, of, {job: value[name] for job, value in each.items()})
        panel.set_title(words.name(name), loc="left", fontsize="medium")
        _quiet(panel)
    return figure


def _quiet(panel: Axes) -> None:
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _label(row: Row, without: str) -> str:
    """Of a line or a bar: its arm, and what else it does not share with all others."""
    parts = [str(value) if key == "arm" else f"{key.split('.')[-1]} {value}" for key, value in row if key != without]
    return ", ".join(part for part in parts if part)


def _ends(value: Mapping[str, float]) -> tuple[float, float]:
    """How far the interval goes below and above; nothing where there is none."""
    ends = (value["value"] - value["low"], value["high"] - value["value"])
    return tuple(0.0 if math.isnan(end) else max(0.0, end) for end in ends)


def _lines(
    panel: Axes,
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Mapping[Row, Mapping[str, float]],
    each: Mapping[str, float | None],
) -> None:
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: dict(row)[sweep.x]):
        lines.setdefault(_label(row, sweep.x), []).append(row)
    ticks = sorted({float(dict(row)[sweep.x]) for row in rows})
    log = ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]
    for i, (label, of) in enumerate(lines.items()):  # each a little beside the others, whose intervals it would hide
        places = np.array([float(dict(row)[sweep.x]) for row in of])
        x = places * (1 + 0.02 * i) if log else places + 0.01 * i * (ticks[-1] - ticks[0])
        ends = np.transpose([_ends(pooled[row]) for row in of])
        values = [pooled[row]["value"] for row in of]
        drawn = panel.errorbar(x, values, ends, marker="o", capsize=3, label=label)
        for place, row in zip(x, of, strict=True):
            dots = [each[job.name] for job in rows[row]]
            panel.plot([place] * len(dots), _floats(dots), ".", c=drawn[0].get_color(), alpha=0.4)
    if log:
        panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(sweep.x)
    if len(lines) > 1:
        panel.legend(fontsize="small")


def _bars(
    panel: Axes,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Values,
    each: Mapping[str, Mapping[str, float | None]],
    shown: Sequence[str],
) -> None:
    width = 0.84 / len(rows)
    colours = matplotlib.colormaps["tab10" if len(rows) <= 10 else "tab20"].colors
    groups = np.arange(len(shown))
    for i, (row, jobs) in enumerate(rows.items()):
        x = groups + (i - (len(rows) - 1) / 2) * width
        values = [pooled[row][name]["value"] for name in shown]
        ends = np.transpose([_ends(pooled[row][name]) for name in shown])
        panel.bar(x, values, 0.9 * width, color=colours[i % len(colours)], alpha=0.75, label=_label(row, ""))
        panel.errorbar(x, values, ends, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
        for job in jobs:
            dots = _floats(each[job.name][name] for name in shown)
            panel.plot(x + 0.25 * width, dots, ".", color="black", markersize=3)
    panel.set_xticks(groups, [words.name(name).replace(", ", ",\n") for name in shown])
    _quiet(panel)
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _floats(values: Any) -> list[float]:
    """Numbers, nan in the place of those that are not defined."""
    return [math.nan if value is None else value for value in values]
