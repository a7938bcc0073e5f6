"""Trains a grid of runs, one after the other, and tabulates what they say.

    python scripts/sweep.py configs/sweeps/rank_attention_vit.toml --output runs/rank_attention_vit
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --set data.path=IMAGES --set seed=0
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --table     # of what is done so far

In the background, and what it does from another terminal:

    nohup python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods > methods.log 2>&1 &
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --status

Runs of one seed come before those of the next, so that a sweep that ends early has whole rows. Started again, the same command
skips what is done and goes on with what was begun; with other settings it says so and does nothing. A run that fails is named
and does not stop the others; its output is beside it in NAME.log. At the end, and with --table, the folder gets results.csv (a
line a run), results.md (a line a row of seeds), figure.png and comparison.html; see `sweep_results`.

A sweep is a TOML file:

    title = "LoRA: rank"                # of the table and the figure
    metrics = ["accuracy", "f1_macro"]  # default: the headline metrics of the task
    x = "lora.rank"                     # draws metrics against this key; without it, bars for each arm

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

--set KEY=VALUE puts a key over those of base, or other values (seed=0,1) in the place of those of the grid. Where an arm has
the key itself, --set ARM:KEY=VALUE must say what it gets there, unless that is the run of another arm. The file of a config is
looked for from the working directory, then from the folder of the repository.
"""

import argparse
import ast
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vitft_jax import cli, metrics, report, tree
from vitft_jax import config as configs
from vitft_jax import run as runs
from vitft_jax.errors import InputError, nearest

KEYS = {"title": str, "metrics": list, "x": str, "base": dict, "grid": dict, "arms": list}
OF_ARM = ("name", "quantize", "options")
ROOT = Path(__file__).resolve().parent.parent
STATUS = "status.json"
ENDED = (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""How a run ends that was ended from outside, as the whole sweep then is; what kills one run, such as a lack of memory, is not
among them."""
POLL = 1.0  # seconds between looks at the run that goes on

Row = tuple[tuple[str, Any], ...]
"""What runs have in common that differ in their seed alone: ``('arm', name)``, then keys of the grid with their values."""


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        arm: Name of its arm.
        values: Of the grid, by key.
        name: Of its folder.
        command: Arguments of Python that make it; folders of runs in them begin with '@/'.
        made: What makes the run what it is, as JSON: the keys of its config, or the options of quantize.
        after: Name of the run that it is made from; '' for none.
    """

    arm: str
    values: Mapping[str, Any]
    name: str
    command: tuple[str, ...]
    made: Mapping[str, Any]
    after: str = ""

    @property
    def row(self) -> Row:
        """What it has in common with other seeds: its arm and its other values."""
        return (("arm", self.arm), *((key, value) for key, value in self.values.items() if key != "seed"))


@dataclass(frozen=True)
class Sweep:
    """What a file says.

    Attributes:
        title: Of tables and figure.
        metrics: To show; () = the headline metrics of the task.
        x: Key of the grid that the figure has along its axis; '' = bars for each arm.
        jobs: In the order in which they run: by seed, and each after the one that it is made from.
        rows: In the order of the file.
    """

    title: str
    metrics: tuple[str, ...]
    x: str
    jobs: tuple[Job, ...]
    rows: tuple[Row, ...]


def read(path: Path, changes: Sequence[str] = ()) -> Sweep:
    """Reads a sweep and the config of each of its runs; `changes` are ``KEY=VALUE`` or ``ARM:KEY=VALUE``.

    Raises:
        InputError: The file is missing or no sweep; a config cannot be read, or a key or value of it is wrong.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: no sweep: {error}") from None
    for key, value in content.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; {nearest(key, KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise InputError(f"{path}: {key} = {value!r}: a {KEYS[key].__name__} is needed")
    arms = content.get("arms", [{}])
    if not arms or not all(isinstance(arm, dict) and isinstance(arm.get("name", ""), str) for arm in arms):
        raise InputError(f"{path}: arms: one [[arms]] or more, each with a text as its name")
    names = [arm.get("name", "") for arm in arms]
    if len(set(names)) < len(names) or (len(names) > 1 and "" in names):
        raise InputError(f"{path}: arms: each needs a name of its own; they are {names}")
    base, grid, arms = _changed(path, content.get("base", {}), content.get("grid", {}), arms, changes)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: grid.{key} = {values!r}: a list of values")
    x, shown = content.get("x", ""), tuple(content.get("metrics", ()))
    _check_shown(path, x, grid, shown)
    jobs = [
        _job(path, base, arm, dict(zip(grid, values, strict=True)), names)
        for arm in arms
        for values in itertools.product(*grid.values())
    ]
    if len({job.name for job in jobs}) < len(jobs):
        raise InputError(f"{path}: two runs of one name; name the arms so that they differ in letters and digits")
    rows = tuple(dict.fromkeys(job.row for job in jobs))
    if "seed" in grid:
        jobs.sort(key=lambda job: grid["seed"].index(job.values["seed"]))
    return Sweep(content.get("title", path.stem), shown, x, tuple(_in_order(path, jobs)), rows)


def _changed(
    path: Path, base: dict[str, Any], grid: dict[str, Any], arms: list[dict[str, Any]], changes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Base, grid and arms with changes such as 'train.epochs=2', 'seed=0,1' and 'QAT:train.lr=1e-4'."""
    base, grid, by_name = dict(base), dict(grid), {arm.get("name", ""): dict(arm) for arm in arms}
    for change in changes:
        where, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}: give KEY=VALUE, such as train.epochs=2")
        of, _, key = where.rpartition(":")
        if of:
            if of not in by_name:
                raise InputError(f"--set {change}: there is no such arm; {nearest(of, by_name)}")
            by_name[of][key] = value
        elif key in grid:
            grid[key] = [_literal(part) for part in value.split(",")]
        else:
            base[key] = value
    settled = {change.partition("=")[0] for change in changes}
    for key in (key for key in settled if ":" not in key):
        own = [n for n, arm in by_name.items() if key in arm and f"{n}:{key}" not in settled and not _of_run(arm[key])]
        if own and key not in grid:
            raise InputError(
                f"--set {key}: arm {own[0]!r} of {path} has {by_name[own[0]][key]!r} of its own; "
                f"add --set '{own[0]}:{key}=VALUE' to say what it gets"
            )
    return base, grid, list(by_name.values())


def _of_run(value: Any) -> bool:
    """Whether it stands for the run of another arm."""
    return isinstance(value, str) and value.startswith("@")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_shown(path: Path, x: str, grid: Mapping[str, list[Any]], shown: Sequence[str]) -> None:
    """Raises InputError where the figure could not be drawn."""
    if x and x not in grid:
        raise InputError(f"{path}: x = {x!r}: not a key of the grid, which has {', '.join(grid) or 'none'}")
    if x and not all(type(value) in (int, float) and math.isfinite(value) for value in grid[x]):
        raise InputError(f"{path}: x = {x!r}: its values are {grid[x]}; an axis needs numbers")
    if not any(set(shown) <= set(names) for names in (metrics.MULTICLASS, metrics.MULTILABEL)):
        known = set(metrics.MULTICLASS + metrics.MULTILABEL)
        wrong = next((str(name) for name in shown if name not in known), None)
        raise InputError(
            f"{path}: metrics: no {wrong!r}; {nearest(wrong, known)}"
            if wrong
            else f"{path}: metrics = {list(shown)}: of several labels and of one label an image, which no task has together"
        )


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
        return Job(arm["name"], values, name, command, {"quantize": list(options)}, source)
    settings = {**base, **{key: value for key, value in arm.items() if key != "name"}, **values}
    if "options" in settings or not isinstance(settings.get("config"), str):
        raise InputError(f"{path}: arm {arm.get('name', '')!r}: 'config' names its file; 'options' are of 'quantize'")
    file, after = _config_file(path, settings.pop("config")), ""
    for key, value in settings.items():
        if _of_run(value):
            after = other(value[1:])
            settings[key] = f"@/{after}"
    name = _name(arm.get("name", ""), values)
    keys = [f"{key}={_text(value)}" for key, value in settings.items()]
    try:
        config = configs.absolute(configs.load(file, keys))
    except InputError as error:
        raise InputError(f"{path}: run {name}: {error}") from None
    command = ("-m", "vitft_jax.train", "--config", file, "--workdir", f"@/{name}", *(f"--config.{k}" for k in keys))
    return Job(arm.get("name", ""), values, name, command, {"config": _made(config)}, after)


def _config_file(path: Path, name: str) -> str:
    """A config's file: as it is named where that is one, or in the repository."""
    if found := next((str(file) for file in (Path(name), ROOT / name) if file.is_file()), None):
        return found
    raise InputError(f"{path}: config = {name!r}: there is no such file, here or in {ROOT}")


def _made(config: configs.Config) -> dict[str, Any]:
    """Keys of a config that say what a run is, as JSON."""
    flat = {key.replace("/", "."): value for key, value in tree.flatten(json.loads(configs.to_json(config))).items()}
    return {key: value for key, value in flat.items() if not key.startswith(configs.ON_RESUME)}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _name(arm: str, values: Mapping[str, Any]) -> str:
    parts = [arm, *(f"{key.split('.')[-1]}{_text(value)}" for key, value in values.items())]
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-") for part in parts if part) or "run"


def _in_order(path: Path, jobs: Sequence[Job]) -> Iterator[Job]:
    """Jobs in their order, each after the one that it is made from."""
    waiting, done = list(jobs), {""}
    while waiting:
        ready = next((job for job in waiting if job.after in done), None)
        if ready is None:
            raise InputError(f"{path}: arm {waiting[0].arm!r} is made from itself, by way of others")
        waiting.remove(ready)
        done.add(ready.name)
        yield ready


def notes(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """What NAME.json says of each run, by name: what made it, and what made the run that it is made from."""
    found: dict[str, dict[str, Any]] = {}
    for job in sweep.jobs:
        found[job.name] = {**job.made, **({"from": found[job.after]} if job.after else {})}
    return found


def results(output: Path, job: Job) -> dict[str, Any] | None:
    """The summary of a run that this sweep has done; None of others."""
    path = output / job.name / "summary.json"
    if not (path.is_file() and (output / f"{job.name}.json").is_file()):
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def check(sweep: Sweep, output: Path) -> None:
    """Makes sure that the runs in a folder are those of this sweep, and have the metrics to show.

    Raises:
        InputError: A run was made with other settings; or its task has no metric of such a name.
    """
    for name, now in notes(sweep).items():
        path = output / f"{name}.json"
        if not (path.is_file() and (output / name).exists()):
            continue
        then = json.loads(path.read_text(encoding="utf-8"))
        if then != now:
            raise InputError(
                f"{output / name}: was made with other settings: {'; '.join(_differences(then, now)[:5])}. "
                "Choose another --output, or delete this run and those made from it"
            )
    for job in sweep.jobs:
        if told := results(output, job):
            check_metrics(sweep, told)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> list[str]:
    found = []
    for key in {**then, **now}:
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, "of the run that it is made from, " if key == "from" else of)
        elif a != b:
            found.append(f"{of}{key} {a!r} there, {b!r} here")
    return found


def check_metrics(sweep: Sweep, told: Mapping[str, Any]) -> None:
    """Raises InputError if a summary has no metric of a name that the sweep shows."""
    known = told["metrics"]["test"]
    if missing := [name for name in sweep.metrics if name not in known]:
        raise InputError(f"metrics = {list(sweep.metrics)}: no {missing[0]!r}; the task has {', '.join(known)}")


def run(sweep: Sweep, output: Path) -> dict[str, str]:
    """Makes the runs that are not done yet; returns what came of each: 'done', 'failed: ...' or 'left out: ...'.

    Raises:
        InputError: As `check`; a metric that the task does not have is found once the first run is done.
    """
    output.mkdir(parents=True, exist_ok=True)
    check(sweep, output)
    noted = notes(sweep)
    state = {job.name: "done" if results(output, job) else "waits" for job in sweep.jobs}
    console = Console()
    with Live(console=console, auto_refresh=False) as live:

        def show(name: str, value: str) -> None:
            state[name] = value
            report.write_json(output / STATUS, {"process": os.getpid(), "since": time.time(), "runs": state})
            if not console.is_terminal:
                print(f"{sum(v == 'done' for v in state.values())}/{len(state)} done; {name}: {value}", flush=True)
            look()

        def look() -> None:
            if console.is_terminal:
                live.update(progress(sweep, output, console.size.height), refresh=True)

        for job in sweep.jobs:
            if state[job.name] == "done":
                continue
            if job.after and state[job.after] != "done":
                show(job.name, f"left out: {job.after} is not there")
                continue
            show(job.name, "runs")
            report.write_json(output / f"{job.name}.json", noted[job.name])
            log = output / f"{job.name}.log"
            code = _wait_for([sys.executable, *(_placed(part, output) for part in job.command)], log, look)
            if code in ENDED:
                show(job.name, "was ended")
                raise KeyboardInterrupt
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            failed = last if code > 0 else f"killed by {signal.Signals(-code).name}; {last}" if code else ""
            show(job.name, f"failed: {failed}" if code else "done")
            if told := results(output, job):
                check_metrics(sweep, told)
    return state


def _wait_for(command: Sequence[str], log: Path, look: Any) -> int:
    """Runs a command, looking at it from time to time; it ends with us, and saves before that what it can."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    return process.wait(POLL)
                except subprocess.TimeoutExpired:
                    look()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _placed(part: str, output: Path) -> str:
    """An argument with '@/' for the folder of the sweep."""
    flag, equals, value = part.rpartition("=")
    return f"{flag}{equals}{output / value[2:]}" if value.startswith("@/") else part


def progress(sweep: Sweep, output: Path, height: int) -> Table:
    """The newest lines around the run that goes on, as high as the terminal, from what the sweep writes.

    Raises:
        InputError: No sweep was started in the folder.
    """
    try:
        status = json.loads((output / STATUS).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{output}: no sweep was started there") from None
    told = {job.name: results(output, job) for job in sweep.jobs}
    done = [one["timing"]["seconds"] for one in told.values() if one]
    title = f"{sweep.title}: {len(done)} of {len(sweep.jobs)}"
    if done:
        left = sum(status["runs"].get(job.name, "waits") in ("waits", "runs") for job in sweep.jobs)
        title += f", about {_duration(left * sum(done) / len(done))} left"
    table = Table(title=title, title_justify="left")
    table.add_column("run", no_wrap=True, min_width=max(len(job.name) for job in sweep.jobs))
    for column in ("state", "test"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    going = next((i for i, job in enumerate(sweep.jobs) if status["runs"].get(job.name) == "runs"), len(sweep.jobs) - 1)
    room = max(3, height - 6)
    for job in sweep.jobs[max(0, going - room + 3) :][:room]:
        state = status["runs"].get(job.name, "waits")
        if state == "runs":
            state = _goes_on(output / job.name, status)
        test = told[job.name]["metrics"]["test"] if told[job.name] else {}
        first = next((name for name in (*sweep.metrics, *test) if name in test), None)
        value = test[first]["value"] if first else None
        table.add_row(job.name, state, f"{first} {value:.3f}" if value is not None else "")
    return table


def _goes_on(folder: Path, status: Mapping[str, Any]) -> str:
    """Where a run is: its step of how many, since when, and how long still."""
    try:
        os.kill(status["process"], 0)
    except ProcessLookupError:
        return "was ended; the same command goes on"
    except PermissionError:  # it is there, and another user's
        pass
    text = f"runs for {_duration(time.time() - status['since'])}"
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = [json.loads(line) for line in file.read().splitlines()[-3:] if line.endswith(b"}")]
        config = runs.Folder(folder).config()
        total = runs.Folder(folder).task(config).total_steps
    except (OSError, ValueError):  # it has not come to its first step, or writes at this moment
        return text
    text += f", step {lines[-1]['step']} of {total}" if lines else ""
    speed = next((line["images_per_second"] for line in reversed(lines) if "images_per_second" in line), None)
    if speed:
        text += f", {_duration((total - lines[-1]['step']) * config.train.batch_size / speed)} left"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sweep", type=Path, help="a TOML file, such as configs/sweeps/methods.toml")
    arguments.add_argument("--output", required=True, type=Path, help="folder of the runs")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="[ARM:]KEY=VALUE", help="put over base, grid or an arm"
    )
    arguments.add_argument("--table", action="store_true", help="train nothing: tables and figure of what is done")
    arguments.add_argument("--status", action="store_true", help="train nothing: how far it has come")
    arguments.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="copy the tables and the figure there, by the name of --output"
    )
    options = arguments.parse_args(argv)
    sweep = read(options.sweep, options.set)
    if options.status:
        console = Console()
        return console.print(progress(sweep, options.output, console.size.height if console.is_terminal else 10**6))
    if options.table:
        check(sweep, options.output)
    state = {} if options.table else run(sweep, options.output.absolute())

    import sweep_results  # slow to import, and after hours of training first

    sweep_results.write(sweep, options.output)
    if options.publish:
        sweep_results.publish(options.output, options.publish)
    if failed := {name: text for name, text in state.items() if text != "done"}:
        raise InputError(
            f"{len(failed)} of {len(state)} runs are missing: "
            + "; ".join(f"{name} {text}" for name, text in list(failed.items())[:5])
            + f". See {options.output}/NAME.log; the same command tries them again"
        )
    return None


if __name__ == "__main__":
    cli.main(main)
