"""From logits to probabilities and decisions: a temperature and, for labels, thresholds, both fitted on the validation split.

A run holds them in `decision.json`. The classes that are decided do not depend on the temperature, and neither do labels, whose
thresholds are probabilities after it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitft_jax import metrics, report, temperature, thresholds
from vitft_jax.errors import InputError

FILE = "decision.json"


@dataclass(frozen=True)
class Decision:
    """How logits are read.

    Attributes:
        temperature: Divides the logits.
        thresholds: Probability from which on each label is decided; () = one half, and for classes.
        one_half: Pairs of a label's number and the reason why its threshold stays there, see `thresholds.too_few`.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    one_half: tuple[tuple[int, str], ...] = ()

    def probabilities(self, logits: np.ndarray, multilabel: bool) -> np.ndarray:
        """Probabilities `(n, C)` of logits."""
        return metrics.probabilities(logits.astype(np.float64) / self.temperature, multilabel)

    def decide(self, probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
        """The class `(n,)`, or 0/1 of each label `(n, C)`, of such probabilities."""
        return metrics.decisions(probabilities, multilabel, self.thresholds or 0.5)

    def told(self, classes: Sequence[str]) -> dict[str, Any]:
        """As JSON: the temperature, and by label the thresholds and the reasons of `one_half`, if there are."""
        by_label = {"thresholds": dict(zip(classes, self.thresholds, strict=True))} if self.thresholds else {}
        why = {"one_half": {classes[c]: reason for c, reason in self.one_half}} if self.one_half else {}
        return {"temperature": self.temperature, **by_label, **why}


RAW = Decision()
"""Logits as they are."""


def fit(logits: np.ndarray, labels: np.ndarray, groups: Sequence[str], rule: str) -> Decision:
    """Temperature and thresholds from logits `(n, C)` and labels of the validation split; see `thresholds.choose`."""
    t = temperature.fit(logits, labels)
    if labels.ndim == 1:
        return Decision(t)
    chosen = thresholds.choose(logits.astype(np.float64) / t, labels, groups, rule)
    few = thresholds.too_few(labels, groups, rule)
    one_half = tuple((c, reason) for c, reason in enumerate(few) if reason)
    return Decision(t, tuple(metrics.probabilities(chosen, True).tolist()), one_half)


def write(folder: Path, decision: Decision, classes: Sequence[str]) -> None:
    """Writes `decision.json` into a run."""
    report.write_json(folder / FILE, decision.told(classes))


def read(folder: Path) -> Decision:
    """The decision of a run; that of a run that is still training has no temperature and no thresholds yet.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return RAW
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        by_label, why = content.get("thresholds", {}), content.get("one_half", {})
        one_half = tuple((c, why[label]) for c, label in enumerate(by_label) if label in why)
        return Decision(float(content["temperature"]), tuple(map(float, by_label.values())), one_half)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no temperature and thresholds, as train writes them: {error!r}") from None
