"""`MODEL_CARD.md`: what a reader must know of a trained model (Mitchell et al. 2019, arXiv:1810.03993), from its run folder.

The front matter is that of cards on the Hugging Face Hub. What only people know, such as the license, is left to them, and a
card that was changed by hand is never written over.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from vitft_jax.config import Config
from vitft_jax.report import conduct, words
from vitft_jax.report.files import write_text
from vitft_jax.report.markdown import plain as _plain
from vitft_jax.report.record import Record, read

FILE = "MODEL_CARD.md"
_MARK = "<!-- as generated: {} -->\n"
_MARKED = re.compile(r"<!-- as generated: ([0-9a-f]{64}) -->\n\Z")
_METRICS = {  # ids on the Hub, of those that it knows
    "accuracy": "accuracy",
    "f1_macro": "f1",
    "auroc": "roc_auc",
    "average_precision": "average_precision",
    "brier": "brier_score",
}


def render(run_folder: Path) -> str:
    """The card of a run, in Markdown.

    Raises:
        InputError: There is no run, or one of its files is damaged.
    """
    return of(read(run_folder))


def write(path: Path, card: str) -> None:
    """Writes a card with a mark of how it was generated; one that was changed since is left alone, and the command says so."""
    if path.exists() and not _untouched(path.read_text(encoding="utf-8", errors="replace")):
        print(f"{path} was changed by hand and stays as it is; delete it to have it made anew", flush=True)
        return
    write_text(path, card + _MARK.format(_digest(card)))


def _untouched(content: str) -> bool:
    mark = _MARKED.search(content)
    return mark is not None and mark[1] == _digest(content[: mark.start()])


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()


def of(record: Record) -> str:
    """The card of a run that was read."""
    parts = [
        _front(record),
        f"# {_plain(record.name)}\n",
        _what(record),
        "## Intended use and limits\n",
        _limits(record),
        "## Data\n",
        _data(record),
        "## Training\n",
        _training(record),
        "## Evaluation\n",
        _evaluation(record),
        "## Calibration\n",
        _calibration(record),
        "## Cost\n",
        _cost(record),
        "## What was not measured\n",
        _unknown(record),
        "## How to use\n",
        _use(record),
    ]
    return "\n".join(parts)


def _front(record: Record) -> str:
    """YAML, whose strings are written as JSON, which is YAML too."""
    known = record.of("metrics", record.split) or {}
    lines = [
        "license: other  # to be chosen by whoever publishes the model; it must suit the base weights and the data",
        "license_name: not-chosen-yet",
        "library_name: vitft_jax",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in ("vision", "vit", "medical-imaging", "research-only", "jax")),
        *(f"- {json.dumps(method)}" for method in record.config.methods),
    ]
    if record.weights["revision"]:  # an id on the Hub
        lines.append(f"base_model: {json.dumps(record.weights['source'])}")
    if found := [hub for metric, hub in _METRICS.items() if metric in known]:
        lines += ["metrics:", *(f"- {metric}" for metric in found)]
    return "\n".join(["---", *lines, "---", ""])


def _what(record: Record) -> str:
    kind = "finds any of the labels" if record.multilabel else "tells apart the classes"
    methods = ", ".join(record.config.methods)
    how = f"fine-tuned with {_plain(methods)}" if methods else "fine-tuned without adapters"
    if _int8(record):
        how += " and quantised to int8 after training"
    return (
        f"A Vision Transformer that {kind} {', '.join(map(_plain, record.classes))} in images of "
        f"{record.config.data.image_size} x {record.config.data.image_size} pixels, {how}.\n"
    )


def _int8(record: Record) -> bool:
    return "compared" in record.summary.get("method", {})


def _limits(record: Record) -> str:
    return (
        "For research on images like those below, by people who can judge its mistakes.\n\n"
        "**This is not a medical device. It is not validated clinically**, and no authority has looked at it. It must not be "
        "used for diagnosis, triage, treatment or any other decision about a patient.\n\n"
        f"It decides on {'any of its labels, or none,' if record.multilabel else 'one of its classes'} for every image, also "
        "for images of something else or of no use at all; it cannot say that it does not know. "
        f"{_frequencies(record.config.train)}\n"
    )


def _frequencies(train: Config) -> str:
    """What probabilities hold for."""
    skewed = {"rare classes were drawn more often": train.balanced, "rare classes weighed more": train.class_weights}
    skewed["easy images weighed less"] = train.focal_gamma > 0
    if reasons := [reason for reason, on in skewed.items() if on]:
        return f"Its probabilities are no frequencies: while it trained, {' and '.join(reasons)}."
    return "Probabilities hold for the frequency of the classes in the data below."


def _data(record: Record) -> str:
    settings = record.config.data
    source = Path(settings.path).name or settings.name or "generated images (phantom)"
    lines = [f"Source: {_plain(source)}. License and consent: to be filled in by whoever publishes the model.\n"]
    if record.counts:
        head = ["", *(words.SPLITS[split] for split in record.counts)]
        rows = [
            ["images", *(f"{c.images:,}" for c in record.counts.values())],
            ["groups (patients, videos)", *(f"{c.groups:,}" for c in record.counts.values())],
            *(
                [_plain(name), *(f"{c.classes.get(name, 0):,}" for c in record.counts.values())]
                for name in record.classes
            ),
        ]
        lines.append(_table(head, rows))
    lines.append((words.duplicates(record.summary) or "Whether images occur in two splits is not recorded.") + "\n")
    return "\n".join(lines)


def _training(record: Record) -> str:
    weights, summary = record.weights, record.summary
    source = weights["source"] if weights["revision"] else Path(weights["source"]).name
    revision = f", revision {_plain(weights['revision'])}" if weights["revision"] else ""
    digest = f", sha256 `{weights['sha256']}`" if weights["sha256"] else ""
    lines = [f"Base weights: {_plain(source)}{revision}{digest}. Seed {record.config.seed}."]
    if summary:
        steps = summary.get("timing", {}).get("steps")
        trained = f"{steps:,} optimiser steps of {record.config.train.batch_size} images; " if steps else ""
        lines.append(
            f"{trained}the checkpoint is that of step {summary['best_step']:,}, the best on the validation split."
        )
    else:
        lines.append("Training has not finished.")
    # Paths of the machine, told above by name, and names of images.
    hidden = ("data.path", "data.table", "model.pretrained", "init_adapter", "figures.names")
    rows = [
        [f"`{key}`", _plain(conduct.shown(now)), _plain(conduct.shown(was))]
        for key, now, was in record.changed
        if key not in hidden
    ]
    return "\n".join(
        [*lines, "", "Settings that differ from the defaults:\n", _table(["key", "value", "default"], rows)]
    )


def _evaluation(record: Record) -> str:
    if not record.split:
        return "Not evaluated.\n"
    known = record.of("metrics", record.split)
    rows = [[words.name(metric), *map(_plain, words.shown(found))] for metric, found in known.items()]
    lines = [
        f"On the {words.SPLITS[record.split]} split, with 95 % bootstrap intervals (BCa), resampled by group:\n",
        _table(["metric", "value", "95 % interval"], rows),
    ]
    if each := record.of("per_class", record.split):
        chosen = ("sensitivity", "specificity", "precision", "auroc")
        rows = [
            [_plain(c), f"{found['images']:,}", *(_plain("{} ({})".format(*words.shown(found[m]))) for m in chosen)]
            for c, found in each.items()
        ]
        lines.append(_table(["class", "images", *(words.NAMES[m] for m in chosen)], rows))
    return "\n".join(lines)


def _calibration(record: Record) -> str:
    told = record.of("calibration", record.split)
    if not told:
        return "Not calibrated.\n"
    rows = [[words.name(m), *(words.number(told[when][m]) for when in ("before", "after"))] for m in told["before"]]
    lines = [
        f"Logits are divided by a temperature of {told['temperature']:.2f}, fitted on the validation split.\n",
        _table(["metric", "before", "after"], rows),
    ]
    if thresholds := told.get("thresholds"):
        why = told.get("one_half", {})
        said = ", ".join(
            f"{_plain(c)} {value:.2f}" + (f" ({_plain(why[c])})" if c in why else "") for c, value in thresholds.items()
        )
        lines.append(f"Labels are decided from these probabilities on, chosen on the validation split: {said}.\n")
    return "\n".join(lines)


def _cost(record: Record) -> str:
    summary = record.summary
    parameters, flops, timing = (summary.get(key, {}) for key in ("parameters", "flops", "timing"))
    rows = [
        ["parameters", words.whole(parameters.get("total"))],
        ["of these trained", words.whole(parameters.get("trainable"))],
        ["forward pass, one image", words.operations(flops.get("forward"))],
        ["training", words.speed(timing.get("train_images_per_second"))],
        ["evaluation", words.speed(timing.get("eval_images_per_second"))],
        *([f"bytes, {key.replace('_', ' ')}", words.size(count)] for key, count in summary.get("bytes", {}).items()),
        ["measured on", _plain(conduct.machine(record))],
    ]
    return _table(["", ""], rows)


def _unknown(record: Record) -> str:
    """What nobody looked at, and what the run itself says it could not tell."""
    found = [
        "Images of another hospital, scanner, operator or population than those of the data above.",
        "Differences between patients by age, sex, origin or disease, of which the run knows nothing.",
        "How the model compares with readers, and whether it helps them.",
        "Image faults, and images that show something else.",
        "How results vary from one training to the next: this is one run with one seed.",
    ]
    if conduct.single_groups(record):
        found.append(
            "Whether patients are in two splits: every image is a group of its own here. If patients have several, results "
            "look better than they are and the intervals are too narrow."
        )
    if record.split != "test":
        found.append("The test split: the model was not evaluated on it.")
    known = (record.of("metrics", record.split) or {}).items()
    undefined = [(m, words.shown(value)[1]) for m, value in known if not words.defined(value["value"])]
    found += [f"{words.NAMES.get(m, m)}: undefined here, as {_plain(why)}." for m, why in undefined]
    return "\n".join(f"- {line}" for line in found) + "\n"


def _use(record: Record) -> str:
    return (
        "With the run folder and its base weights at hand:\n\n"
        "```python\nimport vitft_jax\n\n"
        f"model = vitft_jax.load({json.dumps(record.name)})  # the run folder\n"
        "result = model.predict(images)  # uint8 arrays (H, W) or (H, W, 3) of any sizes, or PIL images\n"
        f"result.probabilities  # (n, {len(record.classes)})\nresult.labels\n```\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
