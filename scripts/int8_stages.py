"""What each stage of the int8 recipe is worth: quantises finished runs with the stages added in turn, and prints a table.

    python scripts/int8_stages.py runs/busi_lora_qkv_? --output runs/busi_int8
    python scripts/int8_stages.py runs/busi_qat_? --output runs/busi_qat_int8 --stages min-max --float runs/busi_lora_qkv_?

The runs are seeds of one row. A cell is the mean over them with their range; the change from the float runs, on the same
images, has a 95 % bootstrap interval of that mean, resampled by group, jointly in all seeds. What was quantised before, in
the folder of `--output`, is not quantised again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import seeds

from vitft_jax import cli, runtime
from vitft_jax.errors import InputError, nearest
from vitft_jax.ptq.recipe import Recipe
from vitft_jax.quantize import Options, quantize

RECIPE = Options(sensitivity_images=0)
STAGES = {
    "min-max": replace(RECIPE, recipe=Recipe(smooth=False, clip=False, correct=False)),
    "smoothing": replace(RECIPE, recipe=Recipe(clip=False, correct=False)),
    "smoothing, clipping": replace(RECIPE, recipe=Recipe(correct=False)),
    "smoothing, clipping, bias correction": RECIPE,
    "clipping, bias correction, static ranges": replace(RECIPE, recipe=Recipe(smooth=False, static="mse")),
    "all of them": replace(RECIPE, recipe=Recipe(static="mse")),
    "the default and int8 attention": replace(RECIPE, attention=True),
    "the default with 4-bit kernels": replace(RECIPE, bits=4),
    "the default, kernels only": replace(RECIPE, weight_only=True),
}
"""Rows of the table; the fourth is what vitft_jax.quantize does by default."""


def row(name: str, before: Sequence[Path], after: Sequence[Path]) -> str:
    """A line of the table: `after` against `before`, seed by seed."""
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in after]

    def cell(value: Callable[[dict[str, Any]], float], form: str) -> str:
        values = [value(summary) for summary in summaries]
        if len(values) == 1 or min(values) == max(values):
            return format(values[0], form)
        return f"{statistics.fmean(values):{form}} [{min(values):{form}} to {max(values):{form}}]"

    cells = [name, *(cell(lambda s, m=m: s["metrics"]["test"][m]["value"], ".3f") for m in ("accuracy", "auroc"))]
    if before == after:
        cells += ["", "", "", cell(lambda s: (s["bytes"]["trainable"] + s["bytes"]["frozen"]) / 1e6, ".1f")]
    else:
        moved = seeds.pooled_change(before, after)["accuracy"]
        cells += [
            f"{100 * moved['value']:+.1f} ({100 * moved['low']:+.1f} to {100 * moved['high']:+.1f})",
            cell(lambda s: 100 * s["method"]["compared"]["test"]["agreement"], ".1f"),
            cell(lambda s: s["method"]["compared"]["test"]["divergence"], ".1e"),
            cell(lambda s: s["bytes"]["arrays"] / 1e6, ".1f"),
        ]
    return f"| {' | '.join(cells)} |"


def table(runs: Sequence[Path], originals: Sequence[Path], output: Path, stages: Sequence[str]) -> list[str]:
    """Lines of the table; quantises what is not there yet.

    Raises:
        InputError: Whatever `quantize` refuses.
    """
    head = ("stages", "accuracy", "AUROC", "change of accuracy, points", "agreement, %", "divergence, nats", "MB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", row("float", originals, originals)]
    for stage in stages:
        made = []
        for run in runs:
            made.append(output / f"{run.name}_{stage.replace(', ', '_').replace(' ', '-')}")
            if not made[-1].exists():  # quantize moves it there when it is whole
                output.mkdir(parents=True, exist_ok=True)
                quantize(run, made[-1], STAGES[stage])
        lines.append(row(stage, originals, made))
    return lines


def main() -> None:
    """Command line."""
    runtime.start()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path, help="finished runs, one for each seed")
    arguments.add_argument("--output", required=True, type=Path, help="folder of the int8 runs")
    arguments.add_argument("--float", nargs="+", type=Path, help="runs to compare with (default: the same runs)")
    arguments.add_argument(
        "--stages", nargs="+", default=list(STAGES), help=f"rows: {'; '.join(STAGES)} (default: all)"
    )
    options = arguments.parse_args()
    for stage in options.stages:
        if stage not in STAGES:
            raise InputError(f"--stages {stage!r}; {nearest(stage, STAGES)}")
    originals = options.float or options.runs
    if len(originals) != len(options.runs):
        raise InputError(f"--float: {len(originals)} runs to compare {len(options.runs)} runs with; give one for each")
    print("\n".join(table(options.runs, originals, options.output, options.stages)))


if __name__ == "__main__":
    cli.main(main)
