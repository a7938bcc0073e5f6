"""What the runs of a sweep say: results.csv, results.md and figure.png in its folder.

A row of results.md, and a point of the figure, is the mean over the seeds; its 95 % interval is that of the mean, over
other images, see `seeds`. The dots beside it are the seeds.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seeds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from sweep import Job, Sweep, results

from vitft_jax import metrics, report
from vitft_jax.errors import InputError

Row = tuple[tuple[str, Any], ...]


def write(sweep: Sweep, output: Path) -> None:
    """Writes the files; prints the table.

    Raises:
        InputError: No run is done, or the task has no metric of such a name.
    """
    done = [(job, told) for job in sweep.jobs if (told := results(output, job))]
    if not done:
        raise InputError(f"{output}: no run of the sweep is done")
    known = list(done[0][1]["metrics"]["test"])
    shown = sweep.metrics or tuple(known[: metrics.HEADLINE])
    if missing := [name for name in shown if name not in known]:
        raise InputError(f"metrics = {list(sweep.metrics)}: no {missing[0]!r}; the task has {', '.join(known)}")
    _csv(output / "results.csv", sweep, done, known)
    rows: dict[Row, list[Job]] = {}
    for job, _ in done:
        rows.setdefault(job.row, []).append(job)
    pooled = {row: seeds.pooled([output / job.name for job in jobs]) for row, jobs in rows.items()}
    each = {job.name: {name: value["value"] for name, value in told["metrics"]["test"].items()} for job, told in done}
    lines = markdown(sweep, rows, pooled, shown, {job.name: told for job, told in done})
    report.write_text(output / "results.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    _figure(sweep, rows, pooled, each, shown).savefig(output / "figure.png", dpi=150)


def _csv(path: Path, sweep: Sweep, done: Sequence[tuple[Job, dict[str, Any]]], known: Sequence[str]) -> None:
    keys = list(sweep.jobs[0].values)
    head = ["run", "arm", *keys, *(f"{name}{part}" for name in known for part in ("", "_low", "_high"))]
    head += ["trainable_parameters", "seconds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for job, told in done:
            test = told["metrics"]["test"]
            numbers = [test[name][part] for name in known for part in ("value", "low", "high")]
            trained = (told["parameters"]["trainable"], f"{told['timing']['seconds']:.1f}")
            writer.writerow([job.name, job.arm, *job.values.values(), *numbers, *trained])


def markdown(
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Mapping[Row, Mapping[str, Mapping[str, float]]],
    shown: Sequence[str],
    told: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Lines of the table."""
    named = any(job.arm for job in sweep.jobs)
    keys = [key for key in sweep.jobs[0].values if key != "seed"]
    head = [*["arm"] * named, *keys, "seeds", "trainable", "MB", *shown]
    lines = [f"**{sweep.title}**, test split, mean over seeds (95 % CI)", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, jobs in rows.items():
        values, first = dict(row), told[jobs[0].name]
        cells = [values["arm"]] * named + [str(values[key]) for key in keys]
        cells += [str(len(jobs)), f"{first['parameters']['trainable_percent']:.2f} %", f"{_bytes(first) / 1e6:.1f}"]
        cells += [report.interval(pooled[row][name]) for name in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bytes(summary: Mapping[str, Any]) -> int:
    """Of the arrays that a model is."""
    size = summary["bytes"]
    return size["arrays"] if "arrays" in size else size["trainable"] + size["frozen"]


def _figure(
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Mapping[Row, Mapping[str, Mapping[str, float]]],
    each: Mapping[str, Mapping[str, float | None]],
    shown: Sequence[str],
) -> Figure:
    """A panel for each metric: lines against `Sweep.x`, or a point for each row."""
    columns = min(2, len(shown))
    figure = Figure(figsize=(5.2 * columns, 3.4 * math.ceil(len(shown) / columns)), layout="constrained")
    told = "test split; mean over seeds with the 95 % interval over images; small dots are seeds"
    figure.suptitle(f"{sweep.title}\n{told}", x=0.01, ha="left", fontsize="medium")
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).ravel()
    for panel in panels[len(shown) :]:
        panel.remove()
    for panel, name in zip(panels, shown, strict=False):
        draw = _lines if sweep.x else _points
        draw(
            panel,
            sweep,
            rows,
            {row: value[name] for row, value in pooled.items()},
            {k: v[name] for k, v in each.items()},
        )
        panel.set_title(name.replace("_", " "), loc="left", fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _label(row: Row, without: str) -> str:
    """Of a line or a bar: its arm, and what else it does not share with all others."""
    parts = [str(value) if key == "arm" else f"{key.split('.')[-1]} {value}" for key, value in row if key != without]
    return ", ".join(part for part in parts if part)


def _ends(value: Mapping[str, float]) -> tuple[float, float]:
    """How far the interval goes below and above; nothing where there is none."""
    ends = (value["value"] - value["low"], value["high"] - value["value"])
    return tuple(0.0 if math.isnan(end) else end for end in ends)


def _lines(
    panel: Axes,
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Mapping[Row, Mapping[str, float]],
    each: Mapping[str, float | None],
) -> None:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_label(row, sweep.x), []).append(row)
    for i, (label, of) in enumerate(lines.items()):
        x = np.array([float(dict(row)[sweep.x]) for row in of]) * (
            1 + 0.02 * i
        )  # so that intervals do not hide each other
        ends = np.transpose([_ends(pooled[row]) for row in of])
        values = [pooled[row]["value"] for row in of]
        drawn = panel.errorbar(x, values, ends, marker="o", capsize=3, label=label)
        for place, row in zip(x, of, strict=True):
            panel.plot(
                [place] * len(rows[row]), [each[job.name] for job in rows[row]], ".", c=drawn[0].get_color(), alpha=0.4
            )
    panel.set_xscale("log", base=2)
    ticks = sorted({float(dict(row)[sweep.x]) for row in rows})
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(sweep.x)
    if len(lines) > 1:
        panel.legend(fontsize="small")


def _points(
    panel: Axes,
    sweep: Sweep,
    rows: Mapping[Row, Sequence[Job]],
    pooled: Mapping[Row, Mapping[str, float]],
    each: Mapping[str, float | None],
) -> None:
    for i, (row, jobs) in enumerate(rows.items()):
        panel.errorbar(i, pooled[row]["value"], np.transpose([_ends(pooled[row])]), marker="o", capsize=4, color="C0")
        panel.plot([i + 0.15] * len(jobs), [each[job.name] for job in jobs], ".", color="C0", alpha=0.4)
    panel.set_xticks(range(len(rows)), [_label(row, "") for row in rows], rotation=30, ha="right", fontsize="small")
    panel.set_xlim(-0.5, len(rows) - 0.5)
