"""The results of a run on a page: headline, tables, confusion, ROC, reliability."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitft_jax import metrics
from vitft_jax.report import charts, words
from vitft_jax.report.markup import Html, join, outside, table, tag
from vitft_jax.report.predictions import Predictions
from vitft_jax.report.record import Record
from vitft_jax.report.style import SERIES

_MATRIX = 12  # classes; the matrix of more is no longer read
_PAIRS = 20  # confusions that stand for it then
_SMALLEST = 5e-10  # probability: files hold nine digits

HOW_TO_READ = (
    "Intervals are 95 % bootstrap intervals (BCa; of differences, Student's), resampled by group (patient or video): what "
    "other images of this kind would change, not what another training would. With few groups or a rare class they are wide, "
    "and wide is what they should be."
)


def value(found: Mapping[str, Any], *, sign: str = "") -> Html:
    """A metric with its interval below; says why, where it is undefined."""
    number, below = words.shown(found, sign)
    if not words.defined(found.get("value")):
        return tag("span", f"{number}: ", outside(below), class_="undefined")
    return join(tag("span", number, class_="number"), tag("span", outside(below), class_="ci"))


def tiles(record: Record) -> Html:
    """The headline metrics of the split that counts."""
    found = record.of("metrics", record.split)
    cells = []
    for metric in [name for name in metrics.names(record.multilabel) if name in found][: metrics.HEADLINE]:
        number, below = words.shown(found[metric])
        cells.append(
            tag("div", tag("span", words.name(metric)), tag("b", number), tag("span", outside(below)), class_="tile")
        )
    return tag("div", cells, class_="tiles")


def all_metrics(record: Record) -> Html:
    """All metrics of all splits."""
    splits = [split for split in ("test", "val", "train") if record.of("metrics", split)]
    known = record.of("metrics", record.split)
    rows = [
        [words.name(metric), *(value(record.of("metrics", split).get(metric, {})) for split in splits)]
        for metric in known
    ]
    return table(["Metric", *(words.SPLITS[split] for split in splits)], rows, "Value, and its 95 % interval")


def per_class(record: Record) -> Html | None:
    """The metrics of each class."""
    found = record.of("per_class", record.split)
    if not found:
        return None
    told = record.of("calibration", record.split) or {}
    thresholds, why = (told.get(key, {}) for key in ("thresholds", "one_half"))
    chosen = ("sensitivity", "specificity", "precision", "f1", "auroc", "average_precision")
    head = [
        "Label" if record.multilabel else "Class",
        "images",
        *(words.NAMES[name] for name in chosen),
        *(["decided from"] if thresholds else []),
    ]
    rows = [
        [
            outside(c),
            f"{values['images']:,}",
            *(value(values[name]) for name in chosen),
            *([join(f"{thresholds[c]:.2f}", tag("span", outside(why.get(c, "")), class_="ci"))] if thresholds else []),
        ]
        for c, values in found.items()
    ]
    return table(head, rows, f"Each {head[0].lower()} against all else, {words.SPLITS[record.split]} split")


def confusion(p: Predictions) -> Html:
    """Who was taken for whom: a matrix, or its largest cells; of labels, a row each."""
    counts = metrics.confusion(p.decided, p.labels, len(p.classes))
    if p.multilabel:
        rows = [
            [outside(c), *(f"{cell:,}" for cell in (n[1, 1], n[1, 0], n[0, 1], n[0, 0]))]
            for c, n in zip(p.classes, counts, strict=True)
        ]
        return table(
            ["Label", "found", "missed", "false alarm", "rightly absent"], rows, "Images by truth and decision"
        )
    if len(p.classes) > _MATRIX:
        return _confused(p.classes, counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = tag(
        "tr", tag("th", "truth \u2193  decision \u2192", class_="words"), [tag("th", outside(c)) for c in p.classes]
    )
    body = [
        tag(
            "tr",
            tag("th", outside(c), scope="row", class_="words"),
            [_cell(counts[i, j], share[i, j], counts[i].sum(), i == j) for j in range(len(p.classes))],
        )
        for i, c in enumerate(p.classes)
    ]
    caption = tag("caption", "Images, and their share of the true class; the diagonal is right")
    made = tag("table", caption, tag("thead", head), tag("tbody", body), class_="matrix")
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label="confusion matrix")


def _cell(count: int, share: float, total: int, hit: bool) -> Html:
    return tag(
        "td",
        f"{count:,}",
        tag("small", f"{100 * share:.0f} %" if total else "no images"),
        class_="hit" if hit else None,
        style=f"background: rgba(var(--tint), {0.06 + 0.44 * share:.2f})",
    )


def _confused(classes: Sequence[str], counts: np.ndarray) -> Html:
    wrong = counts - np.diag(np.diag(counts))
    worst = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]]
    rows = [
        [outside(classes[i]), outside(classes[j]), f"{wrong[i, j]:,}", f"{counts[i].sum():,}"]
        for i, j in worst
        if wrong[i, j]
    ]
    caption = f"The {len(rows)} most frequent confusions of {len(classes)} classes"
    return table(["truth", "decision", "images", "of the true class"], rows, caption, left=2)


def curves(record: Record, p: Predictions) -> Html:
    """ROC curves of the classes: all, or of many those with the most images."""
    truth = p.labels if p.multilabel else np.eye(len(p.classes), dtype=int)[p.labels]
    decided = p.decided if p.multilabel else np.eye(len(p.classes), dtype=int)[p.decided]
    order = np.sort(np.argsort(-truth.sum(axis=0), kind="stable")[:SERIES])
    of_class = record.of("per_class", record.split) or {}
    drawn, none = [], []
    for i in order:
        name = p.classes[i]
        line = charts.roc(p.probabilities[:, i], truth[:, i], decided[:, i], _roc_label(name, of_class.get(name)))
        if line is None:
            none.append(name)
        else:
            drawn.append(line)
    left_out = len(p.classes) - len(order)
    said = "Each class against the rest" if not p.multilabel else "Each label"
    shown = charts.lines(
        drawn,
        "1 \u2212 specificity",
        "sensitivity",
        f"ROC curves of {len(drawn)} {'labels' if p.multilabel else 'classes'}; areas are in the legend and the table",
        square=True,
        diagonal=True,
    )
    return tag(
        "figure",
        tag("h3", "ROC"),
        shown if drawn else None,
        tag(
            "figcaption",
            f"{said}. Points: where the model decides; dashed: chance.",
            f" Left out: {left_out} classes with fewer images." if left_out else None,
            [join(" Undefined: every image or none is ", outside(name), ".") for name in none],
        ),
    )


def _roc_label(name: str, found: Mapping[str, Any] | None) -> Html:
    if not found or not words.defined(found["auroc"]["value"]):
        return outside(name)
    ends = words.interval(found["auroc"])
    return join(outside(name), f" {found['auroc']['value']:.3f}", f" ({ends})" if ends else None)


def reliability(record: Record, p: Predictions) -> Html:
    """Reliability before and after temperature scaling, or as it is where there was none."""
    told = record.of("calibration", record.split)
    if not told:
        return _diagram(p, p.probabilities, "Reliability", None)
    before = _before(p, told["temperature"])
    return join(
        _diagram(p, before, "Reliability before temperature scaling", told["before"]),
        _diagram(
            p, p.probabilities, f"Reliability after temperature scaling ({told['temperature']:.2f})", told["after"]
        ),
    )


def _before(p: Predictions, temperature: float) -> np.ndarray:
    """Probabilities `(n, C)` before the temperature, from those after it, which tell the logits but for a constant."""
    clipped = np.clip(p.probabilities, _SMALLEST, 1 - _SMALLEST if p.multilabel else 1)
    logits = np.log(clipped) - (np.log1p(-clipped) if p.multilabel else 0)
    return metrics.probabilities(temperature * logits, p.multilabel)


def _diagram(p: Predictions, probabilities: np.ndarray, title: str, scores: Mapping[str, float] | None) -> Html:
    if p.multilabel:
        confidence, right, y_label = probabilities.ravel(), p.labels.ravel(), "share that has the label"
    else:
        confidence, right = probabilities[np.arange(len(probabilities)), p.decided], p.decided == p.labels
        y_label = "share of right decisions"
    found = charts.bins(confidence, right)
    described = f"{title}: {y_label} by the probability given, in {len(found.images)} bins"
    numbers = (
        ", ".join(f"{words.NAMES[key]} {words.number(scores[key])}" for key in metrics.CALIBRATED) if scores else ""
    )
    return tag(
        "figure",
        tag("h3", title),
        charts.reliability(found, described, y_label),
        tag("figcaption", f"{numbers}. " if numbers else None, "On the dashed line probabilities are what they say."),
    )
