"""Why a metric is undefined: the class that no image is of, or every image, or that is never decided."""

from collections.abc import Mapping, Sequence

import numpy as np

_NAMED = 3  # classes at most; of more, two and how many others
_CAUSES = {
    "absent": "no image {has} {any}",
    "everywhere": "every image {has} {all}",
    "never": "{all} {is_} never decided",
    "neither": "no image {has} {any}, nor {is_} {all} ever decided",
}
_OF_CLASS = {
    "precision": ("never",),
    "sensitivity": ("absent",),
    "specificity": ("everywhere",),
    "f1": ("neither",),
    "auroc": ("absent", "everywhere"),
    "average_precision": ("absent",),
}
"""What leaves a metric of a class undefined."""


class Reasons:
    """What leaves metrics undefined for these decisions and labels, in words; '' where these do not.

    Args:
        decided: Classes `(n,)`, or 0/1 `(n, C)` where an image has several labels.
        labels: As `decided`.
        classes: Names of the C classes.
        means: Of which metric of a class each mean over classes is the mean.
    """

    def __init__(
        self, decided: np.ndarray, labels: np.ndarray, classes: Sequence[str], means: Mapping[str, str]
    ) -> None:
        multilabel = labels.ndim == 2
        truth, chosen = (x > 0 if multilabel else x[:, None] == np.arange(len(classes)) for x in (labels, decided))
        absent, never = ~truth.any(axis=0), ~chosen.any(axis=0)
        self._holds = {"absent": absent, "everywhere": truth.all(axis=0), "never": never, "neither": absent & never}
        self._occurs = ~absent
        self._classes, self._means, self._has = tuple(classes), means, "has" if multilabel else "is"

    def of(self, metric: str) -> str:
        """Of a metric of all classes."""
        if metric == "f1_micro":
            return "no image has a label, and none is decided"
        if metric == "precision_weighted":  # in which classes that do not occur have no weight
            return self._said(("never",), self._occurs)
        return self._said(_OF_CLASS.get(self._means.get(metric, ""), ()), np.ones(len(self._classes), bool))

    def of_class(self, metric: str, c: int) -> str:
        """Of a metric of the class of number c."""
        return self._said(_OF_CLASS[metric], np.arange(len(self._classes)) == c)

    def _said(self, causes: Sequence[str], among: np.ndarray) -> str:
        found = {cause: np.flatnonzero(self._holds[cause] & among) for cause in causes}
        said = [
            self._sentence(cause, [repr(self._classes[c]) for c in them]) for cause, them in found.items() if len(them)
        ]
        return "; ".join(said)

    def _sentence(self, cause: str, names: Sequence[str]) -> str:
        if len(names) > _NAMED:
            names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} others"]
        joined = {key: f" {key} ".join(filter(None, (", ".join(names[:-1]), names[-1]))) for key in ("or", "and")}
        return _CAUSES[cause].format(
            has=self._has, any=joined["or"], all=joined["and"], is_="is" if len(names) == 1 else "are"
        )
