"""What a run says: lines in `metrics.jsonl`, `summary.json`, predictions, figures, and its progress on the screen.

Of several processes the first alone writes.
"""

import csv
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vitft_jax import metrics, processes
from vitft_jax.data import Dataset
from vitft_jax.errors import InputError

PACKAGES = ("vitft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")
PLAIN_LINES = 40


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a reader never sees half of it."""
    if not processes.first():
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, ``{step, split, ...values}``."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log to go on after `step`; later lines of an interrupted run are dropped."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    continue
                if entry["step"] <= step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._path = path

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if not processes.first():
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite({"step": step, "split": split, **values})) + "\n")


class Screen:
    """Progress of training: a bar on a terminal, plain lines elsewhere; a context manager."""

    def __init__(self, total_steps: int, done: int) -> None:
        self._console = Console()
        self._total = total_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=done, text="")

    def __enter__(self) -> "Screen":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def step(self, done: int, loss: float, images_per_second: float, seconds_left: float) -> None:
        """Shows where training is; without a bar, `PLAIN_LINES` lines over the whole of it."""
        text = f"loss {loss:.4f}  {images_per_second:.1f} images/s"
        self._bar.update(self._task, completed=done, text=text)
        if not self._console.is_terminal and done % max(1, self._total // PLAIN_LINES) == 0:
            print(f"step {done}/{self._total}  {text}  {seconds_left:.0f} s left", flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_predictions(path: Path, dataset: Dataset, indices: np.ndarray, p: np.ndarray, decided: np.ndarray) -> None:
    """Writes a CSV: path, group, true label(s), decision(s), and the probability of each class."""
    if not processes.first():
        return
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        many = dataset.multilabel
        writer.writerow(
            ["path", "group"]
            + ([f"true:{c}" for c in dataset.classes] if many else ["true"])
            + ([f"predicted:{c}" for c in dataset.classes] if many else ["predicted"])
            + [f"p:{c}" for c in dataset.classes]
        )
        for i, probabilities, decision in zip(indices, p, decided, strict=True):
            true = dataset.labels[i]
            writer.writerow(
                [dataset.names[i], dataset.groups[i]]
                + (true.astype(int).tolist() if many else [dataset.classes[true]])
                + (decision.tolist() if many else [dataset.classes[decision]])
                + [f"{x:.6f}" for x in probabilities]
            )
    os.replace(part, path)


@dataclass(frozen=True)
class Predictions:
    """What a model said about a split, as `write_predictions` wrote it.

    Attributes:
        names: Of the images.
        groups: Of the images.
        labels: `(n,)`, or `(n, C)` of 0 and 1.
        decided: As `labels`.
        probabilities: `(n, C)`, to six digits.
        classes: Names of the columns.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    decided: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @property
    def multilabel(self) -> bool:
        """Whether an image has several labels."""
        return self.labels.ndim == 2


def read_predictions(path: Path) -> Predictions:
    """Inverse of `write_predictions`.

    Raises:
        InputError: The file is not there, or is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        classes = tuple(column.removeprefix("p:") for column in rows[0] if column.startswith("p:"))
        if "true" in rows[0]:
            labels, decided = (np.array([classes.index(row[k]) for row in rows]) for k in ("true", "predicted"))
        else:
            labels, decided = (
                np.array([[int(row[f"{k}:{c}"]) for c in classes] for row in rows]) for k in ("true", "predicted")
            )
        return Predictions(
            tuple(row["path"] for row in rows),
            tuple(row["group"] for row in rows),
            labels,
            decided,
            np.array([[float(row[f"p:{c}"]) for c in classes] for row in rows]),
            classes,
        )
    except (OSError, IndexError, KeyError, ValueError) as error:
        raise InputError(f"{path}: no table of predictions as train and evaluate write them: {error!r}") from None


def environment() -> dict[str, Any]:
    """Versions and devices."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "versions": {name: _version(name) for name in PACKAGES},
    }


def cpu() -> str:
    """Number and name of the processors that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the standard library knows
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores} x {names[0] if names else platform.processor() or platform.machine()}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def heat_map(path: Path, values: Mapping[str, float], title: str) -> None:
    """Draws a number per layer as a PNG: a row per block, a column per matrix; `values` is by path of a layer."""
    if not processes.first():
        return
    from matplotlib.figure import Figure  # slow to import, and few runs draw

    cells = {tuple(name.split("/", 1)): value for name, value in values.items()}
    number = re.compile(r"\d+")
    rows = sorted({row for row, _ in cells}, key=lambda row: [int(n) for n in number.findall(row)])
    columns = list(dict.fromkeys(column for _, column in cells))
    grid = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows], float)
    figure = Figure(figsize=(2 + 0.9 * len(columns), 1.5 + 0.35 * len(rows)), layout="constrained", dpi=150)
    axes = figure.subplots()
    top = np.nanmax(grid)
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            axes.text(j, i, f"{value:g}", ha="center", va="center", color="white" if value > 0.6 * top else "black")
    figure.colorbar(image)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def print_results(title: str, splits: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Prints a table of metrics with their intervals, a column per split."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for split in splits:
        table.add_column(f"{split} (95 % CI)", justify="right")
    for name in next(iter(splits.values())):
        table.add_row(name, *(interval(values[name], name) for values in splits.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_calibration(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what temperature scaling changed, a line per split, and the thresholds of labels."""
    for split, told in splits.items():
        changed = (f"{name} {told['before'][name]:.3f} -> {told['after'][name]:.3f}" for name in told["before"])
        print(f"{split}: temperature {told['temperature']:.2f}, {', '.join(changed)}")
    if thresholds := told.get("thresholds"):
        print(f"thresholds: {', '.join(f'{label} {value:.2f}' for label, value in thresholds.items())}")


def interval(value: Mapping[str, float | None], name: str, sign: str = "") -> str:
    """A metric with its interval, as text; says why, where there is none. `sign` '+' is for differences."""
    number, low, high = (math.nan if value[key] is None else value[key] for key in ("value", "low", "high"))
    if math.isnan(number):
        return f"undefined: {metrics.why_undefined(name)}"
    if math.isnan(low):
        return f"{number:{sign}.3f} (only one group)"
    return f"{number:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
