"""What a command says on the screen: progress of training, tables of metrics."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vitft_jax.report import words

PLAIN_LINES = 40


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
        """Shows where training is; without a bar, `PLAIN_LINES` lines over the whole of it. NaN is not known yet."""
        numbers = {"loss {:.4f}": loss, "{:.1f} images/s": images_per_second, "{:.0f} s left": seconds_left}
        known = [text.format(number) for text, number in numbers.items() if words.defined(number)]
        self._bar.update(self._task, completed=done, text="  ".join(known[:2]))  # the bar tells the time itself
        if not self._console.is_terminal and done % max(1, self._total // PLAIN_LINES) == 0:
            print("  ".join([f"step {done}/{self._total}", *known]), flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_results(title: str, splits: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Prints a table of metrics with their intervals, a column per split."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for split in splits:
        table.add_column(f"{split} (95 % CI)", justify="right")
    for name in next(iter(splits.values())):
        table.add_row(name, *(Text(interval(values[name])) for values in splits.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_calibration(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what temperature scaling changed, a line per split, and the thresholds of labels."""
    for split, told in splits.items():
        changed = (f"{name} {told['before'][name]:.3f} -> {told['after'][name]:.3f}" for name in told["before"])
        print(f"{split}: temperature {told['temperature']:.2f}, {', '.join(changed)}")
    if thresholds := told.get("thresholds"):
        why = told.get("one_half", {})
        print(
            "thresholds: "
            + ", ".join(f"{c} {value:.2f}" + (f" ({why[c]})" if c in why else "") for c, value in thresholds.items())
        )


def interval(found: Mapping[str, Any], *, sign: str = "") -> str:
    """A metric with its interval, as text; says why, where there is none. `sign` '+' is for differences."""
    return "{} ({})".format(*words.shown(found, sign))


def line(values: Mapping[str, float], why: Callable[[str], str]) -> str:
    """Metrics on one line; `why` says why one is undefined."""
    shown = (
        (name, f"{value:.4f}" if words.defined(value) else f"undefined ({why(name)})") for name, value in values.items()
    )
    return "  ".join(f"{name} {value}" for name, value in shown)
