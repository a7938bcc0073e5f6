"""Trains a grid of runs, one after the other, and tabulates what they say.

    python scripts/sweep.py configs/sweeps/rank_attention_vit.toml --output runs/rank_attention_vit
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --set data.path=IMAGES --set train.epochs=2
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --table     # of what is done so far

Started again, the same command skips what is done and goes on with what was begun. A run that fails is named and does not
stop the others; its output is beside it in NAME.log. At the end, and with --table, the folder gets results.csv (a line a run),
results.md (a line a row of seeds) and figure.png; see `sweep_results`.

A sweep is a TOML file:

    title = "LoRA: rank"                # of the table and the figure
    metrics = ["accuracy", "f1_macro"]  # default: the headline metrics of the task
    x = "lora.rank"                     # draws metrics against this key; without it, a point for each arm

    [base]                              # of every run: the file of its config, and keys of it
    config = "configs/lora.py"
    "train.epochs" = 8

    [grid]                              # every combination
    "lora.rank" = [2, 4, 8]
    seed = [0, 1, 2]

    [[arms]]                            # alternatives, each with the whole grid; the keys of an arm are put over those of base
    name = "LoRA"

    [[arms]]
    name = "QAT"
    config = "configs/qat.py"
    "model.pretrained" = "@LoRA"        # the run of that arm with the same values of the grid

    [[arms]]
    name = "PTQ"
    quantize = "LoRA"                   # made from the run of that arm by vitft_jax.quantize
    options = ["--static", "mse"]       # of its command line
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vitft_jax import cli
from vitft_jax.errors import InputError, nearest

KEYS = ("title", "metrics", "x", "base", "grid", "arms")
OF_ARM = ("name", "quantize", "options")


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        arm: Name of its arm.
        values: Of the grid, by key.
        name: Of its folder.
        command: Arguments of Python that make it; folders of runs in them begin with '@/'.
        after: Name of the run that it is made from; '' for none.
    """

    arm: str
    values: Mapping[str, Any]
    name: str
    command: tuple[str, ...]
    after: str = ""

    @property
    def row(self) -> tuple[tuple[str, Any], ...]:
        """What it has in common with other seeds: its arm and its other values."""
        return (("arm", self.arm), *((key, value) for key, value in self.values.items() if key != "seed"))


@dataclass(frozen=True)
class Sweep:
    """What a file says.

    Attributes:
        title: Of tables and figure.
        metrics: To show; () = the headline metrics of the task.
        x: Key of the grid that the figure has along its axis; '' = a point for each arm.
        jobs: In the order in which they run.
    """

    title: str
    metrics: tuple[str, ...]
    x: str
    jobs: tuple[Job, ...]


def read(path: Path, changes: Sequence[str] = ()) -> Sweep:
    """Reads a sweep; `changes` are ``KEY=VALUE`` put over the keys of `base`, and under those of arms and grid.

    Raises:
        InputError: The file is missing or no sweep.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: no sweep: {error}") from None
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; {nearest(key, KEYS)}")
    base, grid, arms = (content.get(key, default) for key, default in (("base", {}), ("grid", {}), ("arms", [{}])))
    if wrong := [change for change in changes if "=" not in change]:
        raise InputError(f"--set {wrong[0]}: give KEY=VALUE, such as train.epochs=2")
    base = base | dict(change.split("=", 1) for change in changes)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: grid.{key} = {values!r}: a list of values")
    names = [arm.get("name", "") for arm in arms]
    if len(set(names)) < len(names) or (len(names) > 1 and "" in names):
        raise InputError(f"{path}: arms: each needs a name of its own; they are {names}")
    if (x := content.get("x", "")) and x not in grid:
        raise InputError(f"{path}: x = {x!r}: not a key of the grid, which has {', '.join(grid) or 'none'}")
    jobs = tuple(
        job
        for arm in arms
        for values in itertools.product(*grid.values())
        for job in [_job(path, base, arm, dict(zip(grid, values, strict=True)), names)]
    )
    if len({job.name for job in jobs}) < len(jobs):
        raise InputError(f"{path}: two runs of one name; name the arms so that they differ in letters and digits")
    return Sweep(content.get("title", path.stem), tuple(content.get("metrics", ())), x, tuple(_in_order(path, jobs)))


def _job(path: Path, base: dict[str, Any], arm: dict[str, Any], values: dict[str, Any], arms: list[str]) -> Job:
    def other(name: Any) -> str:
        if name not in arms:
            raise InputError(f"{path}: arm {arm['name']!r} is made from {name!r}; {nearest(str(name), arms)}")
        return _name(name, values)

    if "quantize" in arm:
        if extra := set(arm) - set(OF_ARM):
            raise InputError(f"{path}: arm {arm['name']!r} quantises, so it has no {min(extra)!r}; only {OF_ARM}")
        source, name = other(arm["quantize"]), _name(arm["name"], values)
        options = tuple(map(str, arm.get("options", ())))
        command = ("-m", "vitft_jax.quantize", "--workdir", f"@/{source}", "--output", f"@/{name}", *options)
        return Job(arm["name"], values, name, command, source)
    settings = {**base, **{key: value for key, value in arm.items() if key != "name"}, **values}
    if "options" in settings or "config" not in settings:
        raise InputError(f"{path}: arm {arm.get('name', '')!r}: 'config' names its file; 'options' are of 'quantize'")
    config, after = settings.pop("config"), ""
    for key, value in settings.items():
        if isinstance(value, str) and value.startswith("@"):
            after = other(value[1:])
            settings[key] = f"@/{after}"
    name = _name(arm.get("name", ""), values)
    flags = [f"--config.{key}={_text(value)}" for key, value in settings.items()]
    command = ("-m", "vitft_jax.train", "--config", config, "--workdir", f"@/{name}", *flags)
    return Job(arm.get("name", ""), values, name, command, after)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _name(arm: str, values: Mapping[str, Any]) -> str:
    parts = [arm, *(f"{key.split('.')[-1]}{_text(value)}" for key, value in values.items())]
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-") for part in parts if part) or "run"


def _in_order(path: Path, jobs: Sequence[Job]) -> Iterator[Job]:
    """Jobs in the order of the file, each after the one that it is made from."""
    waiting, done = list(jobs), {""}
    while waiting:
        ready = next((job for job in waiting if job.after in done), None)
        if ready is None:
            raise InputError(f"{path}: arm {waiting[0].arm!r} is made from itself, by way of others")
        waiting.remove(ready)
        done.add(ready.name)
        yield ready


def results(output: Path, job: Job) -> dict[str, Any] | None:
    """The summary of a run that is done; None of others."""
    path = output / job.name / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run(sweep: Sweep, output: Path) -> dict[str, str]:
    """Makes the runs that are not done yet; returns what came of each: 'done', 'failed: ...' or 'left out: ...'."""
    output.mkdir(parents=True, exist_ok=True)
    state = {job.name: "done" if results(output, job) else "waits" for job in sweep.jobs}
    console = Console()
    with Live(console=console, auto_refresh=False) as live:

        def show(name: str, value: str) -> None:
            state[name] = value
            if console.is_terminal:
                live.update(_progress(sweep, state, output), refresh=True)
            else:
                print(f"{sum(v == 'done' for v in state.values())}/{len(state)} done; {name}: {value}", flush=True)

        for job in sweep.jobs:
            if state[job.name] == "done":
                continue
            if job.after and state[job.after] != "done":
                show(job.name, f"left out: {job.after} is not there")
                continue
            show(job.name, "runs")
            log = output / f"{job.name}.log"
            command = [sys.executable, *(_placed(part, output) for part in job.command)]
            with log.open("w", encoding="utf-8") as file:
                code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
            if code in (75, 130) or code < 0:
                raise KeyboardInterrupt  # ended from outside, as the whole sweep then is
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            show(job.name, "done" if not code else f"failed: {last}")
    return state


def _placed(part: str, output: Path) -> str:
    """An argument with '@/' for the folder of the sweep."""
    flag, equals, value = part.rpartition("=")
    return f"{flag}{equals}{output / value[2:]}" if value.startswith("@/") else part


def _progress(sweep: Sweep, state: Mapping[str, str], output: Path) -> Table:
    """The newest lines around the run that goes on, as high as the terminal."""
    table = Table(
        title=f"{sweep.title}: {sum(v == 'done' for v in state.values())} of {len(state)}", title_justify="left"
    )
    for column in ("run", "state", "test"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    now = next((i for i, job in enumerate(sweep.jobs) if state[job.name] == "runs"), len(sweep.jobs) - 1)
    room = max(3, os.get_terminal_size().lines - 6)
    for job in sweep.jobs[max(0, now - room + 3) :][:room]:
        told = results(output, job)
        first = next(iter(told["metrics"]["test"].items()), None) if told else None
        table.add_row(job.name, state[job.name], f"{first[0]} {first[1]['value']:.3f}" if first else "")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sweep", type=Path, help="a TOML file, such as configs/sweeps/methods.toml")
    arguments.add_argument("--output", required=True, type=Path, help="folder of the runs")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="put over the keys of [base]"
    )
    arguments.add_argument("--table", action="store_true", help="train nothing: tables and figure of what is done")
    options = arguments.parse_args(argv)
    sweep = read(options.sweep, options.set)
    state = {} if options.table else run(sweep, options.output.absolute())

    import sweep_results  # slow to import, and after hours of training first

    sweep_results.write(sweep, options.output)
    if failed := {name: text for name, text in state.items() if text != "done"}:
        raise InputError(
            f"{len(failed)} of {len(state)} runs are missing: "
            + "; ".join(f"{name} {text}" for name, text in list(failed.items())[:5])
            + f". See {options.output}/NAME.log; the same command tries them again"
        )


if __name__ == "__main__":
    cli.main(main)
