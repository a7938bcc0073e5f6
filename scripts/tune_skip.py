"""Finds out where tokens can skip in a finished run: which splits are fastest and lose no more than a tolerance on validation.

    python scripts/tune_skip.py runs/lora --layers 3,6,9 6,8 --ratios 0.2 0.35 0.5 --rejoin never 11 --tolerance 0.01

Nothing is trained: the best checkpoint of a run is evaluated with every combination. Speed is that of the evaluation step
on one batch of images in memory; the contestants take turns, and the ratio to the run as it is is the median over rounds.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import contest
import jax
import numpy as np

from vitft_jax import cli, data, decision, flops, methods, metrics, run, runtime, step
from vitft_jax import config as configs
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.evaluate import outputs
from vitft_jax.folder import Folder


@dataclass
class Candidate:
    """Settings with what was measured of them."""

    overrides: list[str]
    program: step.Program
    metric: float
    flops: float
    seconds: list[float] = field(default_factory=list)

    @property
    def flags(self) -> str:
        """The settings as flags of the commands."""
        return " ".join(f"--config.{override}" for override in self.overrides) or "(as it is)"


def candidates(options: argparse.Namespace, names: Sequence[str]) -> list[list[str]]:
    """Overrides of every combination, after those of the run as it is: none."""
    with_skip = "methods=" + ",".join([*(name for name in names if name != "skip"), "skip"])
    found: list[list[str]] = [[]]
    for layers, ratio, rejoin in itertools.product(options.layers, options.ratios, options.rejoin):
        rejoins = "()" if rejoin == "never" else rejoin
        found.append([with_skip, f"skip.layers={layers}", f"skip.drop_ratio={ratio}", f"skip.rejoin={rejoins}"])
    return found


def measure(options: argparse.Namespace) -> list[Candidate]:
    """Evaluates and times every combination; the first is the run as it is.

    Raises:
        InputError: There is no run or no checkpoint, the run skips already or is in int8, or the metric is unknown or not
            defined on the validation split.
    """
    folder = Folder(options.run)
    if folder.whole() is not None:
        raise InputError(f"{options.run}: is quantised; the search starts from the run that it was made from")
    config, source = run.resolve(folder.config())
    dataset = folder.dataset(config)
    built = build(config, dataset, source)
    folder.open(config, dataset, built)
    if "skip" in config.methods:
        raise InputError(f"{options.run}: this run was trained with skipping; the search starts from a dense one")
    known = [name for name in metrics.names(dataset.multilabel) if name not in metrics.LOWER_IS_BETTER]
    if options.metric not in known:
        raise InputError(f"--metric {options.metric}: one of {', '.join(known)}")
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, _ = checkpoints.restore_best(built.trainable)

    found, size = [], config.data.image_size
    for overrides in candidates(options, config.methods):
        changed = config.copy_and_resolve_references()
        try:
            configs.override(changed, overrides, only=configs.AT_EVALUATION)
            method = methods.load(changed)
            method.check(built.program.model, (size // built.program.model.patch) ** 2)
        except InputError as error:
            print(f"left out: {' '.join(overrides)}: {error}", flush=True)
            continue
        program = replace(built.program, method=method, model=built.program.model.clone(select=method.select))
        out = outputs(program, trainable, built.frozen, dataset, "val", config)
        value = replace(out, decision=decision.read(folder.path)).metrics[options.metric]
        if math.isnan(value):
            raise InputError(f"--metric {options.metric}: is not defined on the validation split of {options.run}")
        found.append(Candidate(overrides, program, value, flops.report(program.model, size)["ratio"]))
        print(f"{options.metric} {value:.4f}  {found[-1].flags}", flush=True)

    indices = np.resize(dataset.indices("val"), options.batch)
    images = np.stack([data.resize(dataset.images[i], size, config.data.fit) for i in indices])
    _time(found, lambda program: step.eval_step(trainable, built.frozen, images, program=program), options.rounds)
    return found


def _time(found: list[Candidate], forward: Any, rounds: int) -> None:
    for candidate in found:
        jax.block_until_ready(forward(candidate.program))  # compiles
    for _ in range(rounds):
        for candidate in found:
            start = time.perf_counter()
            jax.block_until_ready(forward(candidate.program))
            candidate.seconds.append(time.perf_counter() - start)


def speed_up(candidate: Candidate, dense: Candidate) -> float:
    """Median over the rounds of the ratio of times."""
    return statistics.median(d / c for d, c in zip(dense.seconds, candidate.seconds, strict=True))


def choose(found: list[Candidate], tolerance: float) -> Candidate:
    """The fastest of those that lose no more than `tolerance` of the metric; the first, as it is, always is one."""
    dense = found[0]
    return max((c for c in found if c.metric >= dense.metric - tolerance), key=lambda c: speed_up(c, dense))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run", type=Path, help="folder of a run that was trained without skipping")
    arguments.add_argument("--layers", nargs="+", default=["3,6,9", "6,8"], help="blocks after which to split")
    arguments.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.35, 0.5, 0.7], help="shares that leave")
    arguments.add_argument("--rejoin", nargs="+", default=["never"], help="blocks before which to rejoin, or never")
    arguments.add_argument("--metric", default="accuracy", help="of the validation split")
    arguments.add_argument("--tolerance", type=float, default=0.01, help="how much of the metric may be lost")
    arguments.add_argument("--batch", type=int, default=8, help="images that are timed together")
    arguments.add_argument("--rounds", type=contest.count, default=9)
    options = arguments.parse_args(argv)
    if options.tolerance < 0:
        raise InputError(f"--tolerance {options.tolerance}: at least 0")
    found = measure(options)
    chosen = choose(found, options.tolerance)
    print(f"\n| settings | FLOPs | images/s | speed | val {options.metric} |\n|---|---|---|---|---|")
    for c in sorted(found, key=lambda c: speed_up(c, found[0]), reverse=True):
        mark, rate = ("**" if c is chosen else ""), options.batch / statistics.median(c.seconds)
        print(f"| {mark}{c.flags}{mark} | {c.flops:.3f} | {rate:.1f} | {speed_up(c, found[0]):.2f}x | {c.metric:.4f} |")
    print(f"\nfastest within {options.tolerance} of {found[0].metric:.4f}: {chosen.flags}")


if __name__ == "__main__":
    cli.main(main)
