"""What each stage of the int8 recipe is worth: quantises finished runs with the stages added in turn, and prints a table.

    python scripts/int8_stages.py runs/busi_lora_qkv_? --output runs/busi_int8
    python scripts/int8_stages.py runs/busi_qat_? --output runs/busi_qat_int8 --stages min-max --float runs/busi_lora_qkv_?

The runs are seeds of one row. A cell is the mean over them with their range; the change from the float runs, on the same
images, has a 95 % bootstrap interval of that mean, resampled by group, jointly in all seeds. MB are the arrays of the
weights, and the whole checkpoint. What was quantised before, in the folder of `--output`, is not quantised again. For speeds
give the runs that it makes to scripts/accuracy_speed.py, which times them side by side.

Rows that begin with "planted" are of the same runs with outliers planted in every LayerNorm. In float these change nothing,
as the first of the rows shows; the others say what becomes of them in int8.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import compare_smoothing
import seeds

from vitft_jax import cli, runtime
from vitft_jax.errors import InputError, nearest
from vitft_jax.ptq.options import Options
from vitft_jax.ptq.recipe import Recipe
from vitft_jax.quantize import quantize

FACTORS = (1024.0, 512.0, 256.0)
"""Of the planted outliers: powers of two, so that planting them is exact in any float."""
planted = partial(compare_smoothing.planted, factors=FACTORS)


@dataclass(frozen=True)
class Stage:
    """What a row does: options of `quantize`, and whether outliers are planted before."""

    options: Options
    planted: bool = False


RECIPE = Options(sensitivity_images=0)
MIN_MAX = replace(RECIPE, recipe=Recipe(smooth=False, clip=False, correct=False))
STATIC_MIN_MAX = replace(MIN_MAX, recipe=replace(MIN_MAX.recipe, static="max"))
STAGES = {
    "min-max": Stage(MIN_MAX),
    "smoothing": Stage(replace(RECIPE, recipe=Recipe(clip=False, correct=False))),
    "smoothing, clipping": Stage(replace(RECIPE, recipe=Recipe(correct=False))),
    "smoothing, clipping, bias correction": Stage(RECIPE),
    "min-max, static ranges": Stage(STATIC_MIN_MAX),
    "clipping, bias correction, static ranges": Stage(replace(RECIPE, recipe=Recipe(smooth=False, static="mse"))),
    "all of them": Stage(replace(RECIPE, recipe=Recipe(static="mse"))),
    "the default and int8 attention": Stage(replace(RECIPE, attention=True)),
    "the default with 4-bit kernels": Stage(replace(RECIPE, bits=4)),
    "the default, kernels only": Stage(replace(RECIPE, weight_only=True)),
    "planted: min-max, static ranges": Stage(STATIC_MIN_MAX, planted=True),
    "planted: min-max": Stage(MIN_MAX, planted=True),
    "planted: smoothing, clipping, bias correction": Stage(RECIPE, planted=True),
}
"""Rows of the table; the fourth is what vitft_jax.quantize does by default. Ranges are per token where they are not static."""
HEAD = (
    "stages", "accuracy", "AUROC", "change of accuracy, points", "agreement, %", "divergence, nats", "MB", "MB on disk",
)  # fmt: skip


def _summaries(runs: Sequence[Path]) -> list[dict[str, Any]]:
    if missing := [run for run in runs if not (run / "summary.json").is_file()]:
        raise InputError(f"{missing[0]}: no summary.json, so there is no run or it is not finished")
    return [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join((name, *cells, *[''] * (len(HEAD) - 1 - len(cells))))} |"


def _cell(summaries: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], form: str) -> str:
    values = [value(summary) for summary in summaries]
    if len(values) == 1 or min(values) == max(values):
        return format(values[0], form)
    return f"{statistics.fmean(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


def float_row(runs: Sequence[Path]) -> str:
    """The line of the float runs."""
    cell = partial(_cell, _summaries(runs))
    metrics = (cell(lambda s, m=m: s["metrics"]["test"][m]["value"], ".3f") for m in ("accuracy", "auroc"))
    return _line(
        "float", [*metrics, *[""] * 3, cell(lambda s: (s["bytes"]["trainable"] + s["bytes"]["frozen"]) / 1e6, ".1f")]
    )


def planted_float_row(before: Sequence[Path], after: Sequence[Path]) -> str:
    """The line of the float models with planted outliers, of which `after` were made; `before` are the runs without."""
    summaries = _summaries(after)
    cell = partial(_cell, summaries)
    now = [s["method"]["compared"]["test"]["float"]["accuracy"]["value"] for s in summaries]
    was = [s["metrics"]["test"]["accuracy"]["value"] for s in _summaries(before)]
    moved = 100 * statistics.fmean(b - a for a, b in zip(was, now, strict=True))
    metrics = (
        cell(lambda s, m=m: s["method"]["compared"]["test"]["float"][m]["value"], ".3f") for m in ("accuracy", "auroc")
    )
    return _line("planted: float", [*metrics, f"{moved:+.1f}"])


def row(name: str, before: Sequence[Path], after: Sequence[Path]) -> str:
    """A line of the table: `after` against `before`, seed by seed."""
    cell = partial(_cell, _summaries(after))
    moved = seeds.pooled_change(before, after)["accuracy"]
    return _line(
        name,
        [
            *(cell(lambda s, m=m: s["metrics"]["test"][m]["value"], ".3f") for m in ("accuracy", "auroc")),
            f"{100 * moved['value']:+.1f} ({100 * moved['low']:+.1f} to {100 * moved['high']:+.1f})",
            cell(lambda s: 100 * s["method"]["compared"]["test"]["agreement"], ".1f"),
            cell(lambda s: s["method"]["compared"]["test"]["divergence"], ".1e"),
            cell(lambda s: s["bytes"]["arrays"] / 1e6, ".1f"),
            cell(lambda s: s["bytes"]["checkpoint"] / 1e6, ".1f"),
        ],
    )


def table(runs: Sequence[Path], originals: Sequence[Path], output: Path, stages: Sequence[str]) -> list[str]:
    """Lines of the table; quantises what is not there yet.

    Raises:
        InputError: A run is not finished, two have the same name, what is there was made from others, or whatever `quantize`
            refuses.
    """
    if len({run.absolute().name for run in runs}) < len(runs):
        raise InputError(
            f"{', '.join(map(str, runs))}: each needs a name of its own, since its int8 run is named after it"
        )
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", float_row(originals)]
    of_planted = False
    for name in stages:
        stage, made = STAGES[name], []
        for run in runs:
            made.append(
                output / f"{run.absolute().name}_{name.replace(': ', '_').replace(', ', '_').replace(' ', '-')}"
            )
            if not made[-1].exists():  # quantize moves it there when it is whole
                output.mkdir(parents=True, exist_ok=True)
                quantize(run, made[-1], stage.options, planted if stage.planted else None)
            source = Path(_summaries(made[-1:])[0]["method"]["source"])
            if source.absolute() != run.absolute():
                raise InputError(
                    f"{made[-1]}: was made from {source}, not from {run}; choose another --output, or delete it"
                )
        if stage.planted and not of_planted:
            lines.append(planted_float_row(originals, made))
            of_planted = True
        lines.append(row(name, originals, made))
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
