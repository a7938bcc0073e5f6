"""Run folders made by hand: what a run writes, without a training."""

import json

import numpy as np

from vitft_jax import config as configs
from vitft_jax import data, decision, metrics, report

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style>& $\\frac{1}{0}$ _x | `y`",
)
"""Names of classes, which no page may take for anything but text."""


def write(
    path, classes=("benign", "malignant", "normal"), multilabel=False, n=60, seed=0, names=None, config=None, **more
):
    """A finished run with predictions for val and test, `more` going into its summary.

    Two images a group. Every class has as many images in a split; of labels, an image has each by the toss of a coin.
    """
    rng = np.random.default_rng(seed)
    splits = np.repeat(["train", "val", "test"], n)
    labels = np.arange(3 * n) // 2 % len(classes)
    if multilabel:
        labels = np.random.default_rng(7).integers(0, 2, (3 * n, len(classes))).astype(np.float32)
    names = names or [f"images/{i}.png" for i in range(3 * n)]
    groups = [f"g{i // 2}" for i in range(3 * n)]
    dataset = data.Dataset(tuple(classes), multilabel, tuple(names), labels, tuple(groups), tuple(splits), ())
    path.mkdir(parents=True)
    if config is None:
        config = configs.default()
        config.data.path = "/nowhere"
    (path / "config.json").write_text(configs.to_json(config))
    data.write_table(dataset, path / "split.csv")
    weights = {"source": "somewhere/weights", "revision": "", "sha256": "ab" * 32}
    outside = {"weights": weights, "classes": list(classes), "multilabel": multilabel}
    (path / "run.json").write_text(json.dumps(outside))
    truth = labels if multilabel else np.eye(len(classes))[labels]
    how = decision.Decision(1.5, (0.4,) * len(classes) if multilabel else ())
    summary = {"best_step": 20, **{part: {} for part in ("metrics", "per_class", "confusion", "calibration")}}
    for split in ("val", "test"):
        index = dataset.indices(split)
        logits = 2 * truth[index] - 1 + rng.normal(size=(len(index), len(classes)))
        p, raw = (d.probabilities(logits, multilabel) for d in (how, decision.RAW))
        decided = how.decide(p, multilabel)
        report.write_predictions(path / f"predictions_{split}.csv", dataset, index, p, decided)
        told = metrics.assess(p, decided, labels[index], [groups[i] for i in index], classes, metrics.RESAMPLES)
        for part in told:
            summary[part][split] = told[part]
        before, after = (metrics.compute(q, labels[index], multilabel, decided) for q in (raw, p))
        summary["calibration"][split] = {
            **how.told(classes),
            "before": {name: before[name] for name in metrics.CALIBRATED},
            "after": {name: after[name] for name in metrics.CALIBRATED},
        }
    summary |= {
        "parameters": {"total": 1000, "trainable": 100, "trainable_percent": 10.0},
        "bytes": {"trainable": 400, "frozen": 3600, "checkpoint": 5000},
        "flops": {"forward": 3.2e9, "dense_forward": 4e9, "ratio": 0.8},
        "timing": {"train_images_per_second": 12.5, "steps": 30, "eval_images_per_second": None, "seconds": 75.0},
        "environment": {"cpu": "2 x a processor", "devices": "1 x cpu (cpu)", "versions": {"jax": "0.0"}},
        **more,
    }
    report.write_json(path / "summary.json", summary)
    log = report.MetricsLog(path / "metrics.jsonl", 0)
    first = metrics.names(multilabel)[: metrics.HEADLINE]
    for step in (10, 20, 30):
        log.write(step, "train", {"loss": 1 / step, "grad_norm": float(step), "images_per_second": 9.0})
        log.write(step, "val", {"loss": 2 / step, **dict.fromkeys(first, 0.5 + step / 100)})
    return path


def unfinished(path):
    """The same while it trains: no results, and no predictions."""
    for name in ("summary.json", "predictions_val.csv", "predictions_test.csv"):
        (path / name).unlink()
    return path
