"""The file of a sweep, as its runs.

It is TOML:

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

The file of a config is looked for from the working directory, then from the folder of the repository.
"""

import ast
import itertools
import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitft_jax import config as configs
from vitft_jax import metrics, tree
from vitft_jax.errors import InputError, nearest

KEYS = {"title": str, "metrics": list, "x": str, "base": dict, "grid": dict, "arms": list}
OF_ARM = ("name", "quantize", "options")
ROOT = Path(__file__).resolve().parent.parent

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


def of_arms(sweep: Sweep, arms: Sequence[str]) -> tuple[Job, ...]:
    """The runs of these arms and those that they are made from; all where no arm is named.

    Raises:
        InputError: There is no such arm.
    """
    known = {job.arm for job in sweep.jobs}
    if missing := next((arm for arm in arms if arm not in known), None):
        raise InputError(f"--only {missing}: there is no such arm; {nearest(missing, known)}")
    chosen: set[str] = set()
    for job in reversed(sweep.jobs):  # each stands after the one that it is made from
        if not arms or job.arm in arms or job.name in chosen:
            chosen |= {job.name, job.after}
    return tuple(job for job in sweep.jobs if job.name in chosen)


def check_metrics(sweep: Sweep, told: Mapping[str, Any]) -> None:
    """Raises InputError if a summary has no metric of a name that the sweep shows."""
    known = told["metrics"]["test"]
    if missing := [name for name in sweep.metrics if name not in known]:
        raise InputError(f"metrics = {list(sweep.metrics)}: no {missing[0]!r}; the task has {', '.join(known)}")


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
            of = f"arm {arm['name']!r}" if "name" in arm else "each run"
            raise InputError(f"{path}: {of} is made from arm {name!r}; {nearest(str(name), arms)}")
        return _name(name, values)

    if "quantize" in arm:
        if extra := set(arm) - set(OF_ARM):
            raise InputError(f"{path}: arm {arm['name']!r} quantises, so it has no {min(extra)!r}; only {OF_ARM}")
        source, name = other(arm["quantize"]), _name(arm["name"], values)
        given = arm.get("options", ())
        options = tuple(shlex.split(given) if isinstance(given, str) else map(str, given))
        command = ("-m", "vitft_jax.quantize", "--workdir", f"@/{source}", "--output", f"@/{name}", *options)
        return Job(arm["name"], values, name, command, {"quantize": list(options)}, source)
    if both := [key for key in arm if key in values]:
        raise InputError(f"{path}: arm {arm['name']!r} has {both[0]!r} of its own, and so has the grid; one of them")
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
