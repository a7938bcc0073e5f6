"""Prints a Markdown table of finished runs; runs whose names differ only in a last number are seeds of one row.

    python scripts/results.py runs/busi_probe_0 runs/busi_lora_* runs/busi_full_0 --split test

A cell is the value with its 95 % bootstrap interval for a single run, and the mean over seeds with their range for several.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from vitft_jax import metrics, report


def cell(summaries: list[dict[str, Any]], split: str, metric: str) -> str:
    """One number with its spread."""
    found = [summary["metrics"][split][metric] for summary in summaries]
    if len(found) == 1:
        return report.interval(found[0])
    if undefined := [item for item in found if item["value"] is None]:
        return report.interval(undefined[0])
    values = [item["value"] for item in found]
    return f"{statistics.mean(values):.3f} [{min(values):.3f} to {max(values):.3f}]"


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path)
    arguments.add_argument("--split", default="test")
    arguments.add_argument("--metrics", nargs="+", metavar="NAME", help="default: the first four of the task")
    options = arguments.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in options.runs:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        rows.setdefault(re.sub(r"_?\d+$", "", run.name), []).append(summary)
    known = list(next(iter(rows.values()))[0]["metrics"][options.split])
    shown = options.metrics or known[: metrics.HEADLINE]
    if missing := [name for name in shown if name not in known]:
        arguments.error(f"--metrics {missing[0]}: none of {', '.join(known)}")
    print(f"| run | seeds | trainable | checkpoint | {' | '.join(shown)} |")
    print("|---" * (4 + len(shown)) + "|")
    for name, summaries in rows.items():
        first = summaries[0]
        cells = [
            name,
            str(len(summaries)),
            f"{first['parameters']['trainable']:,} ({first['parameters']['trainable_percent']:.2f} %)",
            f"{first['bytes']['checkpoint'] / 1e6:.1f} MB",
            *(cell(summaries, options.split, metric) for metric in shown),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
