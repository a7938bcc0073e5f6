"""How metrics and numbers are put into words, on a page and in a model card."""

import math
from collections.abc import Mapping
from typing import Any

from vitft_jax import metrics

NAMES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "subset_accuracy": "All labels right",
    "f1_macro": "F1, mean over classes",
    "f1_micro": "F1, all labels together",
    "f1_samples": "F1, mean over images",
    "f1_weighted": "F1, weighted by class",
    "f1": "F1",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "precision": "Precision (PPV)",
    "precision_macro": "Precision, mean over classes",
    "precision_weighted": "Precision, weighted by class",
    "recall_macro": "Sensitivity, mean over classes",
    "recall_weighted": "Sensitivity, weighted by class",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "jaccard": "Jaccard index",
    "hamming": "Share of labels wrong",
    "brier": "Brier score",
    "ece": "Calibration error (ECE)",
    "loss": "Log loss",
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}


def name(metric: str) -> str:
    """A metric as a reader knows it, and whether less of it is better."""
    return NAMES.get(metric, metric) + (", lower is better" if metric in metrics.LOWER_IS_BETTER else "")


def defined(value: float | None) -> bool:
    """Whether there is a number: JSON has null for one that is not finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """A metric."""
    return f"{value:.3f}" if defined(value) else "undefined"


def interval(value: Mapping[str, float | None], sign: str = "") -> str:
    """The ends of an interval, such as '0.81 to 0.92'; '' where there is none."""
    low, high = value.get("low"), value.get("high")
    return f"{low:{sign}.3f} to {high:{sign}.3f}" if defined(low) and defined(high) else ""


def shown(found: Mapping[str, Any], sign: str = "") -> tuple[str, str]:
    """A metric and its interval, such as '0.87' and '0.81 to 0.92'; where either is missing, 'undefined' and why.

    `found` is as `metrics.assess` returns it, or as JSON keeps that. `sign` '+' is for differences.
    """
    if not defined(found.get("value")):
        return "undefined", found.get("why", "why is not recorded")
    return f"{found['value']:{sign}.3f}", interval(found, sign) or f"no interval: {found.get('why', 'only one group')}"


def size(count: float | None) -> str:
    """Bytes."""
    return _scaled(count, 1000, ("bytes", "kB", "MB", "GB", "TB"))


def operations(count: float | None) -> str:
    """Floating-point operations."""
    return _scaled(count, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"))


def _scaled(count: float | None, step: int, units: tuple[str, ...]) -> str:
    if not defined(count):
        return "not measured"
    for unit in units:
        if count < step or unit == units[-1]:
            break
        count /= step
    return f"{count:,.0f} {unit}" if unit == units[0] else f"{count:.3g} {unit}"


def whole(count: float | None) -> str:
    """A number of things."""
    return f"{count:,.0f}" if defined(count) else "not measured"


def speed(images: float | None) -> str:
    """Images per second."""
    return f"{images:.3g} images/s" if defined(images) else "not measured"


def duration(seconds: float | None) -> str:
    """Seconds, in hours and minutes where there are many."""
    if not defined(seconds):
        return "not measured"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes) + [f"{left} s"] * (not hours)
    return " ".join(parts)


def duplicates(summary: Mapping[str, Any]) -> str:
    """What is known of the same image in two splits; '' where nothing is."""
    if "duplicates_across_splits" not in summary:
        return ""
    found = summary["duplicates_across_splits"]
    if found is None:
        return "Whether images occur in two splits was not looked at, as there are too many of them."
    if not any(found.values()):
        return "No image was found in two splits (compared by pixels)."
    return (
        f"Pairs of images in different splits: {found['exact']} the same, {found['near']} nearly the same. Results may look "
        "better than they are; python -m vitft_jax.check_data shows the pairs."
    )
