"""A run folder.

It holds `config.json` (resolved), `run.json` (what came from outside: weights, classes, the digest of the split), `split.csv`
(which image is in which split), `metrics.jsonl`, `summary.json`, `predictions_<split>.csv`, `decision.json` (temperature,
thresholds), `checkpoints/`, `report.html` and `MODEL_CARD.md`; also `figures/` where there is something to draw, and
`evaluations/` where the run was evaluated under other settings.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitft_jax import config as configs
from vitft_jax import data, digest, lock, processes, report
from vitft_jax.build import ARCHITECTURE, Built
from vitft_jax.errors import InputError
from vitft_jax.task import Task, total_steps

_FIRST = {lock.FILE, "config.json", "config.json.part", "split.csv", "run.json.part"}
"""What a command that was killed may leave in a folder before there is a run."""


def _read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it from a copy") from error
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise InputError(f"{path}: no object with {', '.join(keys)}; restore it from a copy")
    return content


def _from_outside(task: Task, built: Built) -> dict[str, Any]:
    """What `run.json` holds."""
    now = {"weights": asdict(built.weights), "classes": list(task.classes), "multilabel": task.multilabel}
    return now | (built.whole or {})


class Folder:
    """A run folder."""

    def __init__(self, path: Path) -> None:
        """Names the files in `path`; raises InputError if Orbax could not keep checkpoints there."""
        if pattern := set("*?[") & set(str(path.absolute())):
            raise InputError(
                f"run folder {path.absolute()}: checkpoints cannot lie below a name with {min(pattern)!r}, which Orbax "
                "takes for a pattern; choose another"
            )
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.figures = path / "figures"

    @property
    def exists(self) -> bool:
        """Whether there is a run in the folder."""
        return (self.path / "run.json").is_file()  # written last, so config.json and split.csv are whole

    def check(self, config: configs.Config) -> None:
        """Refuses a folder that holds something else than this run.

        Raises:
            InputError: It holds a run with another config, or files that are no run.
        """
        if self.exists:
            differ = configs.differences(self.config(), config)
            if other := [text for text in differ if not text.startswith(configs.ON_RESUME)]:
                raise InputError(
                    f"--workdir {self.path} holds another run; it differs in {'; '.join(other[:5])}. "
                    "Choose another --workdir, or delete this one"
                )
        elif {path.name for path in self.path.glob("*")} - _FIRST:
            raise InputError(f"--workdir {self.path}: has files in it that are no run; choose an empty or new folder")

    def open(self, config: configs.Config, dataset: data.Dataset, built: Built) -> None:
        """Creates the run, or makes sure that its weights and classes are still what they were.

        Raises:
            InputError: They are not.
        """
        task = Task(dataset.classes, dataset.multilabel, built.total_steps)
        exists = self.exists
        processes.wait("every process has looked at the folder")
        if exists:
            self.confirm(task, built)
            return
        if processes.first():
            self.path.mkdir(parents=True, exist_ok=True)
            report.write_text(self.path / "config.json", configs.to_json(config))
            data.write_table(dataset, self.path / "split.csv")
            split = {"split_sha256": digest.sha256(self.path / "split.csv")}
            report.write_json(self.path / "run.json", _from_outside(task, built) | split)
        processes.wait("the folder is there")

    def confirm(self, task: Task, built: Built) -> None:
        """Makes sure that the weights and classes of a run are still what they were.

        Raises:
            InputError: They are not.
        """
        now = _from_outside(task, built)
        for key, then in self.resolved().items():
            if key in now and then != now[key]:
                raise InputError(
                    f"--workdir {self.path}: its {key} were {then} when it was started and are {now[key]} now. "
                    "Restore them, or choose another --workdir"
                )

    def config(self) -> configs.Config:
        """The config of the run.

        Raises:
            InputError: This is no run folder.
        """
        if not self.exists:
            raise InputError(f"--workdir {self.path}: no run here (a run folder has config.json and run.json)")
        try:
            return configs.from_json((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.path / 'config.json'}: cannot be read ({error}); restore it from a copy"
            ) from error

    def resolved(self) -> dict[str, Any]:
        """Contents of `run.json`: weights, classes, multilabel; and of a whole model, what it is."""
        found = _read_json(self.path / "run.json", ("weights", "classes", "multilabel"))
        classes, strings = found["classes"], lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x)
        if not (isinstance(found["weights"], dict) and strings(classes) and isinstance(found["multilabel"], bool)):
            raise InputError(
                f"{self.path / 'run.json'}: weights, classes or multilabel are no such; restore it from a copy"
            )
        return found

    def results(self) -> dict[str, Any]:
        """Contents of `summary.json`."""
        return _read_json(self.summary, ("metrics", "best_step"))

    def whole(self) -> dict[str, Any] | None:
        """What `build` needs of a run whose checkpoint holds the whole model; None for other runs."""
        resolved = self.resolved() if self.exists else {}
        if "model" not in resolved:
            return None
        fields = ("source", "revision", "sha256"), ARCHITECTURE
        try:
            known = set(resolved["weights"]) == set(fields[0]) and set(resolved["model"]) == set(fields[1])
            if known and all(len([float(x) for x in resolved[key]]) == 3 for key in ("mean", "std")):
                return {k: resolved[k] for k in ("weights", "model", "mean", "std")}
        except (TypeError, ValueError, KeyError):
            pass
        raise InputError(
            f"{self.path / 'run.json'}: says of the model what this version does not write; restore it from a copy"
        )

    def task(self, config: configs.Config) -> Task:
        """The task of the run, from its folder alone: its data need not be there. Loss weights are left out.

        Raises:
            InputError: `split.csv` is not in the folder.
        """
        try:
            with (self.path / "split.csv").open(encoding="utf-8", newline="") as file:
                train_images = sum(row["split"] == "train" for row in csv.DictReader(file))
        except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.path / 'split.csv'}: cannot be read ({error!r}); restore it from a copy") from None
        resolved = self.resolved()
        return Task(tuple(resolved["classes"]), resolved["multilabel"], total_steps(config, train_images))

    def dataset(self, config: configs.Config) -> data.Dataset:
        """The images of the run: in the splits that it was started with, if it was.

        Raises:
            InputError: As `data.load`; or `split.csv` is not what was written.
        """
        if not self.exists:
            return data.load(config.data, config.seed)
        resolved, table = self.resolved(), self.path / "split.csv"
        dataset = data.load(config.data, config.seed, classes=tuple(resolved["classes"]), table=table)
        if resolved.get("split_sha256", then := digest.sha256(table)) != then:
            raise InputError(
                f"{table}: has changed since the run was started; restore it from a copy, or start a new run"
            )
        return dataset
