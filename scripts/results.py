"""Prints a Markdown table of finished runs; runs whose names differ only in a last number are seeds of one row.

    python scripts/results.py runs/busi_probe_0 runs/busi_lora_* runs/busi_full_0 --split test
    python scripts/results.py runs/busi_qlora_? runs/busi_qat_? --against runs/busi_lora_qkv_?

A cell is the value with its 95 % bootstrap interval for a single run, and the mean over seeds with their range for several.
With `--against`, the change of the first metric from the runs named there, seed by seed on the same images, mean over the
seeds with its 95 % bootstrap interval, resampled by group, jointly in all seeds.
"""

import argparse
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import seeds

from vitft_jax import cli, metrics, report
from vitft_jax.errors import InputError, nearest
from vitft_jax.folder import Folder


def summary_of(run: Path, split: str) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        InputError: There is none, it is damaged, or it has nothing of the split.
    """
    folder = Folder(run)
    if not folder.summary.exists():
        raise InputError(f"{run}: no summary.json, so no run, or one that is not finished; train it to its end first")
    summary = folder.results()
    if split not in summary["metrics"]:
        raise InputError(f"{run}: has no metrics of --split {split}, only of {', '.join(summary['metrics'])}")
    return summary


def cell(summaries: list[dict[str, Any]], split: str, metric: str) -> str:
    """One number with its spread."""
    found = [summary["metrics"][split].get(metric) for summary in summaries]
    if None in found:  # a run with several labels beside one with classes
        return ""
    if len(found) == 1:
        return report.interval(found[0])
    if undefined := [item for item in found if item["value"] is None]:
        return report.interval(undefined[0])
    values = [item["value"] for item in found]
    return f"{statistics.mean(values):.3f} [{min(values):.3f} to {max(values):.3f}]"


def change(before: Sequence[Path], after: Sequence[Path], split: str, metric: str) -> str:
    """The change of a metric in percentage points with its interval; '' where the runs are the same.

    Raises:
        InputError: The runs cannot be compared.
    """
    if list(before) == list(after):
        return ""
    found = seeds.pooled_change(before, after, split)[metric]
    if math.isnan(found["value"]):
        return "undefined"
    points = {key: 100 * found[key] for key in ("value", "low", "high")}
    if math.isnan(points["low"]):
        return f"{points['value']:+.1f} (only one group)"
    return f"{points['value']:+.1f} ({points['low']:+.1f} to {points['high']:+.1f})"


def table(
    runs: Sequence[Path], split: str = "test", against: Sequence[Path] = (), names: Sequence[str] = ()
) -> list[str]:
    """Lines of the table, with metrics of these names; () is the first four of the task.

    Raises:
        InputError: A run is not finished or has no such metric, or cannot be compared.
    """
    rows: dict[str, list[Path]] = {}
    for run in runs:
        rows.setdefault(re.sub(r"_?\d+$", "", run.name), []).append(run)
    for name, members in rows.items():
        if against and len(members) != len(against):
            raise InputError(
                f"--against: {len(against)} runs to compare the {len(members)} of the row {name} with; give one for each "
                "run of a row, in the same order"
            )
    summaries = {name: [summary_of(run, split) for run in members] for name, members in rows.items()}
    known = list(next(iter(summaries.values()))[0]["metrics"][split])
    shown = list(names) or known[: metrics.HEADLINE]
    if missing := [name for name in shown if name not in known]:
        raise InputError(f"--metrics {missing[0]}: {nearest(missing[0], known)}")
    head = ["run", "seeds", "trainable", "checkpoint", *shown, *([f"change of {shown[0]}, points"] if against else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, members in rows.items():
        first = summaries[name][0]
        cells = [
            name,
            str(len(members)),
            f"{first['parameters']['trainable']:,} ({first['parameters']['trainable_percent']:.2f} %)",
            f"{first['bytes']['checkpoint'] / 1e6:.1f} MB",
            *(cell(summaries[name], split, metric) for metric in shown),
            *([change(against, members, split, shown[0])] if against else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    arguments.add_argument("--split", default="test", help="train, val or test (default: test)")
    arguments.add_argument(
        "--metrics", nargs="+", metavar="NAME", default=(), help="default: the first four of the task"
    )
    arguments.add_argument(
        "--against", nargs="+", type=Path, default=(), help="runs to compare with, one for each run of a row, in order"
    )
    options = arguments.parse_args(argv)
    print(*table(options.runs, options.split, options.against, options.metrics), sep="\n")


if __name__ == "__main__":
    cli.main(main)
