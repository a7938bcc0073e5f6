"""A run as its folder tells it: what `page`, `comparison` and the model card are made from."""

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vitft_jax import config as configs
from vitft_jax import data
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.report.predictions import Predictions, read_predictions

_EVALUATIONS = "evaluations"
_RESULTS = re.compile(r"results_(\w+)\.json")
PARTS = ("metrics", "per_class", "confusion", "calibration")
"""What a summary says of each split."""


@dataclass(frozen=True)
class Counts:
    """Of the images of a split.

    Attributes:
        images: How many.
        groups: Patients or videos.
        classes: Images of each class; of labels, images that have it.
    """

    images: int
    groups: int
    classes: dict[str, int]


@dataclass(frozen=True)
class Record:
    """What is known of a run, or of one of its evaluations under other settings.

    Attributes:
        path: The run folder; of an evaluation, its own.
        run: The run folder.
        name: To call it by.
        config: Of the run.
        weights: Where the base weights came from: source, revision, sha256.
        classes: Names.
        multilabel: Whether an image has several labels.
        summary: As in `summary.json`; empty while the run trains.
        log: Lines of `metrics.jsonl`.
        counts: By split.
        predictions: By split, where there are some.
        differs: Of an evaluation, in what it differs from the run.
    """

    path: Path
    run: Path
    name: str
    config: configs.Config
    weights: dict[str, str]
    classes: tuple[str, ...]
    multilabel: bool
    summary: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    counts: dict[str, Counts]
    predictions: dict[str, Predictions]
    differs: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        """The split whose results come first: test, if the run was evaluated on it; '' if on none."""
        splits = self.summary.get("metrics", {})
        return next((split for split in ("test", "val", "train") if split in splits), "")

    def of(self, part: str, split: str) -> Any:
        """A part of the summary for a split, see PARTS; None where it is not recorded."""
        return self.summary.get(part, {}).get(split)

    @property
    def changed(self) -> list[tuple[str, Any, Any]]:
        """Keys of the config that differ from the defaults: key, value, default."""
        return [(key, now, was) for key, was, now in configs.changes(configs.default(), self.config)]

    @property
    def to_pass_on(self) -> "Record":
        """The same without names of images, and with the last part of each path of the machine alone."""
        config = self.config.copy_and_resolve_references()
        config.figures.names = ()
        data_, model = config.data, config.model
        for group, key in ((data_, "path"), (data_, "table"), (model, "pretrained"), (config, "init_adapter")):
            if Path(group[key]).is_absolute():  # what is not may be an id on the Hub
                group[key] = Path(group[key]).name
        source = self.weights["source"]
        weights = {**self.weights, "source": source if self.weights["revision"] else Path(source).name}
        return replace(self, config=config, weights=weights)

    @cached_property
    def evaluations(self) -> tuple["Record", ...]:
        """Evaluations of this run under other settings, by name."""
        folders = sorted(file.parent for file in self.path.glob(f"{_EVALUATIONS}/*/results_*.json"))
        return tuple(_evaluation(self, folder) for folder in dict.fromkeys(folders))

    @property
    def figures(self) -> tuple[Path, ...]:
        """Pictures that the run has, by name."""
        return tuple(sorted((self.path / "figures").glob("*.png")))


def read(path: Path) -> Record:
    """Reads a run folder, or one of its `evaluations/`.

    Raises:
        InputError: There is no run, or one of its files is damaged.
    """
    if path.resolve().parent.name == _EVALUATIONS and any(path.glob("results_*.json")):
        whole = read(path.resolve().parent.parent)
        return _evaluation(whole, path)
    folder = Folder(path)
    config, resolved = folder.config(), folder.resolved()
    return Record(
        path=path,
        run=path,
        name=path.resolve().name,
        config=config,
        weights=resolved["weights"],
        classes=tuple(resolved["classes"]),
        multilabel=resolved["multilabel"],
        summary=folder.results() if folder.summary.exists() else {},
        log=_log(folder.metrics),
        counts=_counts(path / "split.csv", resolved["multilabel"]),
        predictions=_predictions(path),
    )


def _evaluation(whole: Record, path: Path) -> Record:
    summary: dict[str, Any] = {part: {} for part in PARTS}
    differs: tuple[str, ...] = ()
    for file in sorted(path.glob("results_*.json")):
        try:
            split, found = _RESULTS.fullmatch(file.name)[1], json.loads(file.read_text(encoding="utf-8"))
            for part in PARTS:
                summary[part][split] = found[part]
            differs = tuple(
                text for text in found["differs"] if not text.startswith("figures.")
            )  # which change no result
            summary |= {"best_step": found["step"], "flops": found["flops"]}
            summary["timing"] = {"eval_images_per_second": found["eval_images_per_second"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: no results as vitft_jax.evaluate writes them: {error!r}") from None
    return replace(
        whole,
        path=path,
        name=f"{whole.name}/{path.resolve().name}",
        summary=summary,
        log=(),
        predictions=_predictions(path),
        differs=differs,
    )


def _predictions(path: Path) -> dict[str, Predictions]:
    files = {split: path / f"predictions_{split}.csv" for split in data.SPLITS}
    return {split: read_predictions(file) for split, file in files.items() if file.exists()}


def _log(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines of a log; not the one that was being written when a run was killed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no log as vitft_jax.train writes it: {error}") from None
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return tuple(entries)


def _counts(table: Path, multilabel: bool) -> dict[str, Counts]:
    """Counts from the split that a run wrote down, see `data.write_table`; empty where that is missing."""
    if not table.exists():
        return {}
    try:
        with table.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        if any(len(row) != len(head) for row in rows) or len(head) < 4:
            raise ValueError("rows of different lengths, or too short ones")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: no split as vitft_jax.train writes it: {error}") from None
    found = {}
    for split in data.SPLITS:
        mine = [row for row in rows if row[-1] == split]
        labels = (name for row in mine for name in _labels(head, row, multilabel))
        found[split] = Counts(len(mine), len({row[-2] for row in mine}), dict(Counter(labels)))
    return found


def _labels(head: list[str], row: list[str], multilabel: bool) -> list[str]:
    if not multilabel:
        return [row[1]]
    return [name for name, cell in zip(head[1:-2], row[1:-2], strict=True) if cell == "1"]
