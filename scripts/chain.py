"""The whole chain in one model, LoRA and token skipping and int8, against full fine-tuning in float32.

    python scripts/sweep.py configs/sweeps/chain.toml --output runs/chain --set data.path=IMAGES --set model.pretrained=WEIGHTS
    python scripts/chain.py runs/chain

Prints a table of the arms of that sweep, and what of the targets each reaches. Accuracy is the mean over the seeds with its
95 % interval, its change that from the first arm on the same images, seed by seed (see seeds.py); bytes are those of the arrays
of the model, FLOPs those of one image. For the speed the models of one seed and transformers, which runs the first arm's model
in float32, take turns on this machine (see contest.py): images per second, the median of the rounds with its quartiles, and
the ratio to transformers round by round. Needs the extra `interop`; --no-race leaves the speed out. With --publish FOLDER all
of it also goes to NAME_speed.md there, NAME being that of the folder of runs.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy_speed
import contest
import jax
import numpy as np
import seeds
from sweep_progress import STATUS

from vitft_jax import cli, report
from vitft_jax.errors import InputError
from vitft_jax.export import export

TARGETS = {"trainable": 1.0, "bytes": 0.27, "speed": 6.0}
"""Below so many percent of the parameters, at most so many times the bytes of the first arm, at least so many times the images
per second of transformers."""
PEER = "transformers"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        name: As in the names of their folders.
        runs: By seed.
        trainable: Percent of the parameters that trained, in the run that it was made from where it was quantised.
        bytes: Of the arrays of the model.
        flops: Of one image's forward pass.
    """

    name: str
    runs: dict[str, Path]
    trainable: float
    bytes: int
    flops: float


def arms_of(folder: Path) -> list[str]:
    """Beginnings of the names of a sweep's runs, in its order.

    Raises:
        InputError: No sweep was started there.
    """
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{folder}: no sweep was started there; scripts/sweep.py makes one, or give --arms") from None
    return list(dict.fromkeys(name.rpartition("_seed")[0] for name in status["runs"]))


def read(folder: Path, name: str) -> Arm:
    """Reads the finished runs of an arm.

    Raises:
        InputError: There is none.
    """
    runs = {path.name.rpartition("_")[2]: path for path in sorted(folder.glob(f"{name}_seed*/")) if path.is_dir()}
    runs = {seed: path for seed, path in runs.items() if (path / "summary.json").is_file()}
    if not runs:
        raise InputError(
            f"{folder}: no finished run {name}_seed0 there; make them by scripts/sweep.py, or give other --arms"
        )
    first = next(iter(runs.values()))
    summary = trained = _summary(first)
    while "source" in trained["method"]:
        source = Path(trained["method"]["source"])
        trained = _summary(source if source.is_dir() else folder / source.name)  # the folder may have been moved
    size = summary["bytes"]
    return Arm(
        name,
        runs,
        trained["parameters"]["trainable_percent"],
        size["arrays"] if "arrays" in size else size["trainable"] + size["frozen"],
        accuracy_speed.read(first).flops,
    )


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def race(folder: Path, arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of transformers and of each arm, by round."""
    first = next(iter(arms[0].runs.values()))
    exported, work = folder / f"transformers_{first.name}", f"inference {options.batch}"
    if not exported.exists():
        export(first, exported, "hf")
    passed = ["--batch", str(options.batch), "--steps", str(options.steps)]
    contestants = [contest.Contestant(PEER, [__file__, str(exported), "--serve", *passed])]
    for arm in arms:
        run = next(iter(arm.runs.values()))
        contestants.append(
            contest.Contestant(arm.name, [accuracy_speed.__file__, str(run), "--serve", "--no-train", *passed])
        )
    contest.race(contestants, options.rounds)
    return {c.name: [options.batch / seconds for seconds in c.seconds[work]] for c in contestants}


def serve(exported: Path, options: argparse.Namespace) -> None:
    """A contestant's process: transformers on normalised images in memory."""
    import torch
    from transformers import AutoModelForImageClassification

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForImageClassification.from_pretrained(exported).eval()
    size = model.config.image_size
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((options.batch, 3, size, size), np.float32))

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    contest.serve({f"inference {options.batch}": forward}, steps=options.steps, lean=True)


def table(arms: Sequence[Arm], speeds: dict[str, list[float]], metric: str) -> list[str]:
    """Lines of the table, and of what each arm reaches."""
    full = arms[0]
    known = seeds.pooled(list(full.runs.values()))
    if metric not in known:
        raise InputError(f"--metric {metric}: the task has {', '.join(known)}")
    lowest = known[metric]["low"]
    head = ["model", "seeds", "trains", "bytes", "FLOPs", f"test {metric}", f"change from {full.name}"]
    head += ["images/s", f"ratio to {PEER}"] if speeds else []
    lines, reached = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    if speeds:
        cells = [f"{PEER}, float32", *[""] * 6, contest.spread(speeds[PEER], digits=1), ""]
        lines.append(f"| {' | '.join(cells)} |")
    for arm in arms:
        value, change = seeds.pooled(list(arm.runs.values()))[metric], None
        shared = [seed for seed in arm.runs if seed in full.runs]
        if arm is not full and shared:
            change = seeds.pooled_change([full.runs[s] for s in shared], [arm.runs[s] for s in shared])[metric]
        cells = [
            arm.name,
            str(len(arm.runs)),
            f"{arm.trainable:.2f} %",
            f"{arm.bytes / 1e6:.1f} MB ({arm.bytes / full.bytes:.3f}x)",
        ]
        cells += [f"{arm.flops / full.flops:.3f}x"]
        cells.append(report.interval(value))
        cells.append(report.interval(change, sign="+") if change else "")
        found = {"trainable": arm.trainable < TARGETS["trainable"], "bytes": arm.bytes <= TARGETS["bytes"] * full.bytes}
        found[f"{metric} not below the interval of {full.name}"] = value["value"] >= lowest
        if speeds:
            ratios = [ours / theirs for ours, theirs in zip(speeds[arm.name], speeds[PEER], strict=True)]
            cells += [contest.spread(speeds[arm.name], digits=1), contest.spread(ratios, "x")]
            found["speed"] = contest.quartiles(ratios)[1] >= TARGETS["speed"]
        lines.append(f"| {' | '.join(cells)} |")
        if arm is not full:
            reached.append(
                f"- {arm.name}: " + ", ".join(f"{name} {'yes' if is_so else 'no'}" for name, is_so in found.items())
            )
    targets = (
        f"Targets: trains below {TARGETS['trainable']:g} %, at most {TARGETS['bytes']:g}x the bytes of {full.name}, "
    )
    return [*lines, "", targets + f"at least {TARGETS['speed']:g}x the images/s of {PEER}.", "", *reached]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="of the sweep's runs")
    arguments.add_argument(
        "--arms", nargs="+", help="beginnings of the runs' names (default: all); the first is compared with"
    )
    arguments.add_argument("--metric", default="accuracy")
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--rounds", type=contest.count, default=9)
    arguments.add_argument("--steps", type=int, default=3, help="timed in a turn; the round counts their median")
    arguments.add_argument("--no-race", dest="race", action="store_false", help="leave the speed out")
    arguments.add_argument("--publish", type=Path, metavar="FOLDER", help="write what is printed there too")
    arguments.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args(argv)
    if options.serve:
        return serve(options.folder, options)
    arms = [read(options.folder, name) for name in options.arms or arms_of(options.folder)]
    speeds = race(options.folder, arms, options) if options.race else {}
    lines = table(arms, speeds, options.metric)
    if speeds:
        where = f"{report.cpu()}; Python {platform.python_version()}, jax {jax.__version__}"
        lines += ["", f"Batch {options.batch}, {options.rounds} rounds; {where}."]
    print(*lines, sep="\n")
    if options.publish:
        options.publish.mkdir(parents=True, exist_ok=True)
        report.write_text(options.publish / f"{options.folder.absolute().name}_speed.md", "\n".join(lines) + "\n")
    return None


if __name__ == "__main__":
    cli.main(main)
