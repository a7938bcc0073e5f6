"""Accuracy against measured speed of finished runs: a Markdown table, and a picture.

    python scripts/accuracy_speed.py runs/busi_lora_0 runs/busi_skip_* --batch 1 32 --plot accuracy_speed.png

Runs take turns on this machine (see contest.py): an evaluation step at each `--batch`, and a training step at the batch size
of the run or at each `--train_batch`, on images in memory. A speed is the median of the rounds with its quartiles; a ratio is
that to the first run, taken round by round. FLOPs are those of a forward pass, over those of the first run. Metrics and their
95 % intervals are those in `summary.json`. A run whose checkpoint was quantised afterwards has no training step.
"""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contest
import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from vitft_jax import cli, flops, report, run, runtime, step
from vitft_jax.build import Built, build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.methods.skip import selector

MARKERS = {  # told apart by shape and filling, so that a print in grey will do
    "all tokens": {"marker": "s", "markerfacecolor": "black"},
    "skipped tokens leave for good": {"marker": "o", "markerfacecolor": "0.6"},
    "skipped tokens come back": {"marker": "^", "markerfacecolor": "white"},
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its folder.
        config: Its config.
        metrics: Of the test split, `{metric: {value, low, high}}`.
        flops: Of one image's forward pass.
    """

    path: Path
    config: Config
    metrics: dict[str, dict[str, float]]
    flops: float

    @property
    def kind(self) -> str:
        """Key of `MARKERS`."""
        if "skip" not in self.config.methods:
            return "all tokens"
        back = any(split.rejoin is not None for split in selector(self.config.skip).splits)
        return "skipped tokens come back" if back else "skipped tokens leave for good"

    @property
    def skips(self) -> str:
        """Its setting of token skipping, such as '30 % after 3, 6, 9; back before 11'."""
        if "skip" not in self.config.methods:
            return "all tokens"
        select = selector(self.config.skip)
        amounts = [f"all but {s.keep}" if s.keep else f"{100 * s.drop_ratio:g} %" for s in select.splits]
        backs = ["-" if s.rejoin is None else str(s.rejoin) for s in select.splits]
        text = f"{_short(amounts)} after {', '.join(str(s.after) for s in select.splits)}"
        text += f"; back before {_short(backs)}" if set(backs) != {"-"} else ""
        text += "; fused" if select.fuse else ""
        return text + (f"; {select.mode} mode" if select.mode != "gather" else "")


def _short(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def read(path: Path) -> Run:
    """Reads a run.

    Raises:
        InputError: There is no run, or it is not finished.
    """
    folder = Folder(path)
    config = folder.config()
    if not folder.summary.exists():
        raise InputError(f"{path}: no summary.json, so this run is not finished; train it to its end first")
    summary = folder.results()
    if "flops" in summary:
        return Run(path, config, summary["metrics"]["test"], summary["flops"]["forward"])
    _, built = opened(path)  # of an earlier version
    return Run(path, config, summary["metrics"]["test"], flops.forward(built.program.model, config.data.image_size))


def opened(path: Path) -> tuple[Config, Built]:
    """Builds what a run computes, as `vitft_jax.evaluate` does.

    Raises:
        InputError: Its data or weights are not what they were.
    """
    folder = Folder(path)
    whole = folder.whole()
    config, source = run.resolve(folder.config(), whole)
    dataset = folder.dataset(config)
    built = build(config, dataset, source, whole)
    folder.open(config, dataset, built)
    return config, built


def works(path: Path, options: argparse.Namespace) -> dict[str, contest.Work]:
    """What is timed of a run, by name: 'inference 32', 'training 8', or 'training' at its own batch size."""
    config, built = opened(path)
    with Checkpoints(Folder(path).checkpoints, read_only=True) as checkpoints:
        trainable, _ = checkpoints.restore_best(built.trainable)
    program, frozen, size = built.program, built.frozen, config.data.image_size
    rng = np.random.default_rng(0)

    def inference(batch: int) -> contest.Work:
        images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
        return lambda: jax.block_until_ready(step.eval_step(trainable, frozen, images, program=program))

    def training(batch: int) -> contest.Work:
        if batch % program.accumulate:
            raise InputError(
                f"--train_batch {batch}: {path} cuts a batch into train.accumulate={program.accumulate} "
                "micro-batches; give a multiple of it"
            )
        classes = program.model.classes
        labels = rng.integers(0, 2, (batch, classes)) if program.multilabel else rng.integers(0, classes, batch)
        images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
        holder = [step.init_state(program, trainable)]

        def one() -> None:
            holder[0], _ = step.train_step(holder[0], frozen, {"image": images, "label": labels}, program=program)
            jax.block_until_ready(holder[0])

        return one

    found = {f"inference {batch}": inference(batch) for batch in options.batch}
    if options.train and built.whole is None:
        found |= {f"training {batch}": training(batch) for batch in options.train_batch}
        if not options.train_batch:
            found["training"] = training(config.train.batch_size)
    return found


def speeds(runs: Sequence[Run], options: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Images per second of each run, by work and round."""
    passed = ["--steps", str(options.steps), "--batch", *map(str, options.batch)]
    passed += ["--train_batch", *map(str, options.train_batch)] if options.train_batch else []
    passed += [] if options.train else ["--no-train"]
    contestants = [contest.Contestant(r.path.name, [__file__, str(r.path), "--serve", *passed]) for r in runs]
    contest.race(contestants, options.rounds)
    return [
        {work: [_batch(r, work) / s for s in seconds] for work, seconds in c.seconds.items()}
        for r, c in zip(runs, contestants, strict=True)
    ]


def _batch(r: Run, work: str) -> int:
    return int(work.split()[1]) if " " in work else r.config.train.batch_size


def table(runs: Sequence[Run], found: Sequence[dict[str, list[float]]], metrics: Sequence[str]) -> list[str]:
    """Lines of the table."""
    columns = list(dict.fromkeys(work for by_work in found for work in by_work))
    head = ["run", "tokens that skip", "FLOPs", *(f"test {metric}" for metric in metrics)]
    for work in columns:
        sizes = sorted({_batch(r, work) for r in runs})
        head += [f"{work.split()[0]}, batch {' or '.join(map(str, sizes))}: images/s", "ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r, by_work in zip(runs, found, strict=True):
        cells = [r.path.name, r.skips, f"{r.flops / runs[0].flops:.3f}"]
        cells += [report.interval(r.metrics[name]) for name in metrics]
        for work in columns:
            first, ours = found[0].get(work), by_work.get(work)
            compared = ours and first and r is not runs[0]
            cells.append(contest.spread(ours, digits=1) if ours else "")
            cells.append(contest.spread((a / b for a, b in zip(ours, first, strict=True)), "x") if compared else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def picture(runs: Sequence[Run], found: Sequence[dict[str, list[float]]], batch: int, metric: str) -> Figure:
    """A metric with its interval over the speed of inference with its quartiles."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    unique = len({r.skips for r in runs}) == len(runs)
    points, bars, names = [], [], []
    for r, by_work in zip(runs, found, strict=True):
        low, x, high = contest.quartiles(by_work[f"inference {batch}"])
        y = r.metrics[metric]
        y = {key: y["value"] if number is None else number for key, number in y.items()}  # of one group: no interval
        axes.errorbar(
            x, y["value"], yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]], xerr=[[x - low], [high - x]],
            color="0.55", linewidth=1, capsize=3, markersize=8, markeredgecolor="black", label=r.kind, **MARKERS[r.kind],
        )  # fmt: skip
        points.append((x, y["value"]))
        bars += [((x, y["low"]), (x, y["high"])), ((low, y["value"]), (high, y["value"]))]
        names.append(r.skips.replace("; ", "\n") if unique else r.path.name)
    axes.margins(x=0.15)
    axes.set_xlabel(f"inference, images per second in batches of {batch} (median and quartiles)")
    axes.set_ylabel(f"test {metric} (95 % interval)")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        [handles[kind][0] for kind in MARKERS if kind in handles], [kind for kind in MARKERS if kind in handles],
        loc="outside upper center", ncols=len(MARKERS), frameon=False, title_fontsize=8,
        title="beside a point: share of the patch tokens that skip, and after which blocks" if unique else None,
    )  # fmt: skip
    figure.draw_without_rendering()  # fixes the layout, in which labels then find room
    _label(axes, points, bars, names)
    return figure


def _label(axes: Any, points: Sequence[Any], bars: Sequence[Any], names: Sequence[str]) -> None:
    """Writes names beside points: each where it covers least of the points, bars and names that are there already."""
    seen = axes.transData.transform
    taken = [Bbox.from_extents(*(seen(p) - 9), *(seen(p) + 9)) for p in points]
    thin = [Bbox.from_extents(*(seen(a) - 2), *(seen(b) + 2)) for a, b in bars]
    frame = axes.get_window_extent()
    for point, name in zip(points, names, strict=True):
        best, text = None, axes.annotate(
            name, point, xytext=(0, 0), textcoords="offset points", fontsize=8, va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
        for up in sorted(range(-90, 91, 6), key=abs):
            for side, align in ((9, "left"), (-9, "right")):
                text.set(position=(side, up), ha=align)
                box = text.get_window_extent()
                cost = 10 * sum(box.overlaps(other) for other in taken) + 3 * sum(box.overlaps(bar) for bar in thin)
                cost += 20 * (Bbox.intersection(box, frame) is None or box.x0 < frame.x0 or box.x1 > frame.x1)
                cost += abs(up) / 15
                if best is None or cost < best[0]:
                    best = cost, side, up, align, box
        _, side, up, align, box = best
        text.set(position=(side, up), ha=align)
        taken.append(box)
        if abs(up) > 10:
            axes.annotate(
                "", point, xytext=(side, up), textcoords="offset points", arrowprops={"arrowstyle": "-", "color": "0.6"}
            )


def parser() -> argparse.ArgumentParser:
    """The flags; those of a contestant's process are the same with `--serve`."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path, help="folders of finished runs; the first is compared with")
    arguments.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="images of an evaluation step")
    arguments.add_argument(
        "--train_batch", nargs="+", type=int, default=[], help="of a training step (default: the run's)"
    )
    arguments.add_argument("--no-train", dest="train", action="store_false", help="leave training steps out")
    arguments.add_argument(
        "--metric", default="accuracy", help="of the test split; stands before AUROC, and in the picture"
    )
    arguments.add_argument("--rounds", type=contest.count, default=9)
    arguments.add_argument("--steps", type=int, default=3, help="timed in a turn; the round counts their median")
    arguments.add_argument("--plot", type=Path, help="write the picture to this file")
    arguments.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parser().parse_args(argv)
    if options.serve:
        runtime.start()
        offered = works(options.runs[0], options)
        return contest.serve(offered, steps=options.steps, tidy=runtime.release, lean=True)

    runs = [read(path) for path in options.runs]
    for r in runs:
        if options.metric not in r.metrics:
            raise InputError(f"--metric {options.metric}: {r.path} has {', '.join(r.metrics)}")
        if options.plot and r.metrics[options.metric]["value"] is None:
            raise InputError(
                f"--plot: {options.metric} of {r.path} is {report.interval(r.metrics[options.metric])}; choose another "
                "--metric, or leave --plot out for a table that says so"
            )
    found = speeds(runs, options)
    print(f"{report.cpu()}; Python {platform.python_version()}, jax {jax.__version__}; {options.rounds} rounds\n")
    print(*table(runs, found, list(dict.fromkeys((options.metric, "auroc")))), sep="\n")
    if options.plot:
        picture(runs, found, max(options.batch), options.metric).savefig(options.plot)
    return None


if __name__ == "__main__":
    cli.main(main)
