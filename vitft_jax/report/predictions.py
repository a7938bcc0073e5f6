"""Tables of what a model said about a split, `predictions_<split>.csv`."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitft_jax import processes
from vitft_jax.data import Dataset
from vitft_jax.errors import InputError


def write_predictions(path: Path, dataset: Dataset, indices: np.ndarray, p: np.ndarray, decided: np.ndarray) -> None:
    """Writes a CSV: path, group, true label(s), decision(s), and the probability of each class."""
    if not processes.first():
        return
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        many = dataset.multilabel
        writer.writerow(
            ["path", "group"]
            + ([f"true:{c}" for c in dataset.classes] if many else ["true"])
            + ([f"predicted:{c}" for c in dataset.classes] if many else ["predicted"])
            + [f"p:{c}" for c in dataset.classes]
        )
        for i, probabilities, decision in zip(indices, p, decided, strict=True):
            true = dataset.labels[i]
            writer.writerow(
                [dataset.names[i], dataset.groups[i]]
                + (true.astype(int).tolist() if many else [dataset.classes[true]])
                + (decision.tolist() if many else [dataset.classes[decision]])
                + [f"{x:.6f}" for x in probabilities]
            )
    os.replace(part, path)


@dataclass(frozen=True)
class Predictions:
    """What a model said about a split, as `write_predictions` wrote it.

    Attributes:
        names: Of the images.
        groups: Of the images.
        labels: `(n,)`, or `(n, C)` of 0 and 1.
        decided: As `labels`.
        probabilities: `(n, C)`, to six digits.
        classes: Names of the columns.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: np.ndarray
    decided: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @property
    def multilabel(self) -> bool:
        """Whether an image has several labels."""
        return self.labels.ndim == 2


def read_predictions(path: Path) -> Predictions:
    """Inverse of `write_predictions`.

    Raises:
        InputError: The file is not there, or is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        classes = tuple(column.removeprefix("p:") for column in rows[0] if column.startswith("p:"))
        if "true" in rows[0]:
            labels, decided = (np.array([classes.index(row[k]) for row in rows]) for k in ("true", "predicted"))
        else:
            labels, decided = (
                np.array([[int(row[f"{k}:{c}"]) for c in classes] for row in rows]) for k in ("true", "predicted")
            )
        return Predictions(
            tuple(row["path"] for row in rows),
            tuple(row["group"] for row in rows),
            labels,
            decided,
            np.array([[float(row[f"p:{c}"]) for c in classes] for row in rows]),
            classes,
        )
    except (OSError, IndexError, KeyError, ValueError) as error:
        raise InputError(f"{path}: no table of predictions as train and evaluate write them: {error!r}") from None
