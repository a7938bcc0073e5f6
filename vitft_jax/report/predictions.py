"""Tables of what a model said about a split, `predictions_<split>.csv`."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitft_jax.data import Dataset
from vitft_jax.errors import InputError
from vitft_jax.report.files import write_text


def write_predictions(path: Path, dataset: Dataset, indices: np.ndarray, p: np.ndarray, decided: np.ndarray) -> None:
    """Writes what a model said of images of a dataset, with their groups, whole or not at all."""
    names, groups = ([values[i] for i in indices] for values in (dataset.names, dataset.groups))
    write_text(path, predictions_table(names, dataset.classes, decided, p, dataset.labels[indices], groups))


def predictions_table(
    names: Sequence[str],
    classes: Sequence[str],
    decided: np.ndarray,
    p: np.ndarray,
    labels: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
) -> str:
    """CSV: path, group and true label(s) if given, decision(s), and the probability of each class.

    Args:
        names: Of the images.
        classes: Names of the columns of `p`.
        decided: The class `(n,)`, or 0/1 for each label `(n, C)`.
        p: Probabilities `(n, C)`.
        labels: As `decided`; negative where not known, which is a blank.
        groups: Of the images.
    """
    many = decided.ndim == 2

    def heads(what: str) -> list[str]:
        return [f"{what}:{c}" for c in classes] if many else [what]

    def cells(label: np.ndarray) -> list[str]:
        values = [str(int(x)) for x in label] if many else [classes[label]]
        return ["" if x < 0 else value for x, value in zip(np.atleast_1d(label), values, strict=True)]

    text = io.StringIO()
    writer = csv.writer(text)
    group, true = ([] if groups is None else ["group"]), ([] if labels is None else heads("true"))
    writer.writerow(["path", *group, *true, *heads("predicted"), *(f"p:{c}" for c in classes)])
    for i, name in enumerate(names):
        group, true = ([] if groups is None else [groups[i]]), ([] if labels is None else cells(labels[i]))
        writer.writerow([name, *group, *true, *cells(decided[i]), *(f"{x:.9g}" for x in p[i])])
    return text.getvalue()


@dataclass(frozen=True)
class Predictions:
    """What a model said about a split, as `write_predictions` wrote it.

    Attributes:
        names: Of the images.
        groups: Of the images.
        labels: `(n,)`, or `(n, C)` of 0 and 1.
        decided: As `labels`.
        probabilities: `(n, C)`, to nine digits.
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
