"""How a run was made, on a page: training, data, method, cost, config, weights, machine."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitft_jax import config as configs
from vitft_jax import metrics
from vitft_jax.report import charts, results, words
from vitft_jax.report.markup import Html, folded, join, outside, table, tag
from vitft_jax.report.record import Record

_BESIDE = ("step", "split", "loss", "images_per_second")  # of a line of the log: what is no further curve
_MACHINE = ("devices", "cpu", "python", "platform")
_FEW = 3  # points that make no line
_LINES = 4  # metrics in one chart


def training(record: Record) -> Html:
    """Curves of the training; says so where there are none."""
    best = record.summary.get("best_step")
    shown = [
        _curves(record, {"train": ("loss",), "val": ("loss",)}, "loss", best),
        _curves(record, {"val": _watched(record)}, "validation", best),
    ]
    others = dict.fromkeys(
        key
        for entry in record.log
        for key, value in entry.items()
        if entry.get("split") == "train" and key not in _BESIDE and isinstance(value, int | float)
    )
    more = [_curves(record, {"train": (key,)}, key.replace("_", " "), best) for key in others]
    if not any(shown):
        return tag("p", "No training is recorded in this folder.")
    halved = record.summary.get("learning_rate_halved")
    return join(
        tag("div", shown, class_="charts"),
        tag(
            "p",
            f"Dashed: step {best}, the best checkpoint by the validation split ({record.config.train.best_metric}), on which "
            "all results rest. Losses are those before temperature scaling; the training loss is that of augmented images, "
            "with any class weights, smoothing and penalties."
            if best is not None
            else "The run has not finished.",
            class_="note",
        ),
        tag("p", f"The loss was not finite {halved} times, and the learning rate was halved each time.")
        if halved
        else None,
        folded("More curves", tag("div", more, class_="charts")) if any(more) else None,
    )


def _watched(record: Record) -> tuple[str, ...]:
    names = (record.config.train.best_metric, *metrics.names(record.multilabel))
    return tuple(dict.fromkeys(name for name in names if name not in metrics.LOWER_IS_BETTER))[:_LINES]


def _curves(record: Record, chosen: Mapping[str, Sequence[str]], y_label: str, best: int | None) -> Html | None:
    drawn = []
    for split, names in chosen.items():
        entries = [entry for entry in record.log if entry.get("split") == split]
        for name in names:
            mine = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if mine:
                label = words.SPLITS[split] if len(chosen) > 1 else words.NAMES.get(name, name.replace("_", " "))
                x, y = zip(*mine, strict=True)
                drawn.append(
                    charts.Line(label, np.array(x), np.array(y, float), points=split == "val" or len(x) < _FEW)
                )
    if not drawn:
        return None
    described = f"{y_label} by optimiser step: {', '.join(line.label for line in drawn)}"
    return tag("figure", charts.lines(drawn, "optimiser step", y_label, described, vertical=best))


def data(record: Record) -> Html:
    """What the run learned from and was judged on."""
    settings = record.config.data
    source = settings.path or settings.name or "generated images (phantom)"
    said = "Some images occur in two splits, see above." if _apart(record) else words.duplicates(record.summary)
    table_ = join(", table ", outside(settings.table)) if settings.table else None
    return join(
        tag(
            "p",
            outside(source),
            table_,
            f"; images are {settings.image_size} pixels square to the model ({settings.fit}).",
        ),
        split_table(record),
        tag("p", said or "Whether images occur in two splits is not recorded.", class_="note"),
    )


def split_table(record: Record) -> Html:
    """Images, groups and classes of each split."""
    if not record.counts:
        return tag("p", "Which images were in which split is not recorded.")
    counts = record.counts
    rows = [
        ["images", *(f"{c.images:,}" for c in counts.values())],
        ["groups (patients, videos)", *(f"{c.groups:,}" for c in counts.values())],
        *(
            [outside(name), *(_share(c.classes.get(name, 0), c.images) for c in counts.values())]
            for name in record.classes
        ),
    ]
    return table(["", *(words.SPLITS[split] for split in counts)], rows, "No group is in two splits")


def _share(count: int, total: int) -> Html:
    return join(
        tag("span", f"{count:,}", class_="number"), tag("span", f"{100 * count / max(1, total):.0f} %", class_="ci")
    )


def single_groups(record: Record) -> bool:
    """Whether every image is a group of its own, as where nothing is known of patients."""
    return bool(record.counts) and all(c.groups == c.images for c in record.counts.values())


def doubts(record: Record) -> list[str]:
    """What makes results look better than they are, as far as the run knows."""
    found = []
    if _apart(record):
        found.append(words.duplicates(record.summary))
    if single_groups(record):
        found.append(
            "Every image is a group of its own. If patients have several images, give the data a column group: the splits may "
            "share patients otherwise, results look better than they are, and intervals are too narrow."
        )
    return found


def warnings(record: Record) -> Html:
    """The doubts of a run in boxes."""
    return join(tag("div", tag("p", said), class_="box warn") for said in doubts(record))


def _apart(record: Record) -> bool:
    return any((record.summary.get("duplicates_across_splits") or {}).values())


def cost(record: Record) -> Html:
    """Parameters, bytes, operations and speed, with the machine."""
    summary = record.summary
    parameters, flops, timing = (summary.get(key, {}) for key in ("parameters", "flops", "timing"))
    rows: list[tuple[str, Any]] = [
        ("Parameters", words.whole(parameters.get("total"))),
        ("of these trained", _trained(parameters)),
        ("Forward pass, one image", operations(flops)),
        ("Training", words.speed(timing.get("train_images_per_second"))),
        ("Evaluation, with reading images", words.speed(timing.get("eval_images_per_second"))),
    ]
    if words.defined(timing.get("float_eval_images_per_second")):
        rows.append(("the same of the float model", words.speed(timing["float_eval_images_per_second"])))
    rows += [("Time in all", words.duration(timing.get("seconds")))]
    rows += [(f"Bytes, {key.replace('_', ' ')}", words.size(count)) for key, count in summary.get("bytes", {}).items()]
    rows.append(("Measured on", machine(record)))
    return tag("dl", [join(tag("dt", key), tag("dd", shown)) for key, shown in rows])


def machine(record: Record) -> str:
    """What the run was measured on."""
    environment = record.summary.get("environment", {})
    return (
        "; ".join(environment[key] for key in ("devices", "cpu") if key in environment)
        or "a machine that is not recorded"
    )


def _trained(parameters: Mapping[str, float]) -> str:
    if not parameters:
        return "not measured"
    if not parameters["trainable"]:
        return "none in this run"
    return f"{parameters['trainable']:,} ({parameters['trainable_percent']:.2f} %)"


def operations(flops: Mapping[str, float]) -> str:
    """Of a forward pass, as `flops.report` tells them."""
    if not flops:
        return "not measured"
    said = words.operations(flops["forward"])
    return said if flops["ratio"] == 1 else f"{said}, {100 * flops['ratio']:.0f} % of that with all tokens"


def method(record: Record) -> Html | None:
    """What the method did, as the summary tells it: numbers in a list, the rest folded; of an int8 model its comparison."""
    told = record.summary.get("method")
    if not told:
        return None
    plain = {k: v for k, v in told.items() if not isinstance(v, Mapping | list | tuple)}
    nested = {k: v for k, v in told.items() if k not in plain and k != "compared" and v}
    shown = tag("dl", [join(tag("dt", k.replace("_", " ")), tag("dd", _plain(v))) for k, v in plain.items()])
    return join(
        _compared(record, told["compared"]) if "compared" in told else None,
        shown if plain else None,
        [
            folded(k.replace("_", " "), tag("pre", json.dumps(v, indent=2, ensure_ascii=False)))
            for k, v in nested.items()
        ],
    )


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _compared(record: Record, compared: Mapping[str, Any]) -> Html | None:
    """An int8 model beside the float model that it was made from."""
    told = compared.get(record.split)
    now = record.of("metrics", record.split)
    if not told or not now:
        return None
    rows = [
        [words.name(m), results.value(was), results.value(now[m]), results.value(told["change"][m], sign="+")]
        for m, was in told["float"].items()
        if m in now
    ]
    return join(
        tag(
            "p",
            f"The int8 model decides as the float model does for {100 * told['agreement']:.1f} % of the images. Changes are "
            "paired: their intervals are of the same resamples for both.",
        ),
        table(["Metric", "float", "int8", "change"], rows, f"{words.SPLITS[record.split].capitalize()} split"),
    )


def config(record: Record) -> Html:
    """The keys that differ from the defaults, and the whole config folded."""
    rows = [[tag("code", key), tag("code", shown(now)), tag("code", shown(was))] for key, now, was in record.changed]
    return join(
        table(["Key", "value", "default"], rows, "What differs from the defaults", left=3)
        if rows
        else tag("p", "All keys have their defaults."),
        folded("All keys (config.json)", tag("pre", configs.to_json(record.config))),
    )


def shown(value: Any) -> str:
    """A value of the config."""
    return repr(value) if value in ("", ()) else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def origin(record: Record) -> Html:
    """Weights and machine."""
    weights, environment = record.weights, record.summary.get("environment", {})
    rows = [
        ("Base weights", outside(weights["source"])),
        ("revision", outside(weights["revision"])) if weights["revision"] else None,
        ("sha256", tag("code", weights["sha256"] or "none: drawn from the seed")),
        ("Seed", str(record.config.seed)),
        *((key.capitalize(), outside(environment[key])) for key in _MACHINE if key in environment),
        (
            "Versions",
            outside(", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items()) or "not recorded"),
        ),
    ]
    return tag("dl", [join(tag("dt", row[0]), tag("dd", row[1])) for row in rows if row])
