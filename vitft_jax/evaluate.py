"""Evaluates the best checkpoint of a run on a split of its data.

Prints metrics with 95 % bootstrap intervals (resampled by group), writes `predictions_<split>.csv`, and updates the split's
metrics in `summary.json`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitft_jax import cli, data, metrics, report, runtime, step
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.run import Built, Folder, build


@dataclass(frozen=True)
class Outputs:
    """What a model says about a split, in the order of the data.

    Attributes:
        indices: Positions in the dataset, `(n,)`.
        probabilities: `(n, C)`.
        labels: `(n,)` or `(n, C)`.
        loss: Mean loss without smoothing or class weights.
        images_per_second: Over the whole pass, input included, the first batch (compilation) left out.
    """

    indices: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    loss: float
    images_per_second: float


def outputs(
    program: step.Program, trainable: Any, frozen: Any, dataset: data.Dataset, split: str, config: Config
) -> Outputs:
    """Runs the model over a split, each image exactly once."""
    batch_size = config.train.batch_size
    logits, indices = [], []
    started, timed = time.perf_counter(), 0
    batches = data.eval_batches(
        dataset,
        split,
        batch_size=batch_size,
        image_size=config.data.image_size,
        fit=config.data.fit,
        workers=config.data.workers,
    )
    for i, batch in enumerate(batches):
        real = batch["mask"] > 0
        logits.append(np.asarray(step.eval_step(trainable, frozen, batch["image"], program=program))[real])
        indices.append(batch["index"][real])
        if i:
            timed += int(real.sum())
        else:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    z, index = np.concatenate(logits), np.concatenate(indices)
    p, labels = metrics.probabilities(z, dataset.multilabel), dataset.labels[index]
    return Outputs(index, p, labels, _loss(p, labels, dataset.multilabel), timed / seconds if timed else float("nan"))


def _loss(p: np.ndarray, labels: np.ndarray, multilabel: bool) -> float:
    p = np.clip(p, 1e-12, 1.0)
    if multilabel:
        return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log(np.clip(1 - p, 1e-12, 1.0))))
    return float(-np.mean(np.log(p[np.arange(len(labels)), labels])))


def evaluate_split(
    folder: Folder, built: Built, trainable: Any, dataset: data.Dataset, split: str, config: Config
) -> tuple[dict[str, Any], Outputs]:
    """Metrics with intervals of one split; writes its predictions."""
    out = outputs(built.program, trainable, built.frozen, dataset, split, config)
    groups = [dataset.groups[i] for i in out.indices]
    report.write_predictions(folder.path / f"predictions_{split}.csv", dataset, out.indices, out.probabilities)
    results = metrics.intervals(out.probabilities, out.labels, groups, dataset.multilabel, metrics.RESAMPLES)
    return results, out


def evaluate(workdir: Path, split: str = "test") -> dict[str, Any]:
    """Evaluates a finished or running run; returns ``{metric: {value, low, high}}``.

    Raises:
        InputError: No run or no checkpoint there, or its data or weights are not what they were.
    """
    folder = Folder(workdir)
    config = folder.config()
    dataset = folder.dataset(config)
    if split not in data.SPLITS:
        raise InputError(f"--split {split}: one of {', '.join(data.SPLITS)}")
    built = build(config, dataset, folder.whole())
    folder.open(config, dataset, built)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, at = checkpoints.restore_best(built.trainable)
    results, _ = evaluate_split(folder, built, trainable, dataset, split, config)
    report.print_results(f"{workdir}, step {at}, {len(dataset.indices(split))} images", {split: results})
    if folder.summary.exists():
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        summary["metrics"][split] = results
        report.write_json(folder.summary, summary)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(__doc__, "python -m vitft_jax.evaluate --workdir runs/lora --split test")
    arguments.add_argument("--workdir", required=True, type=Path, help="a run folder")
    arguments.add_argument("--split", default="test", help="train, val or test (default: test)")
    flags = arguments.parse_args(argv)
    evaluate(flags.workdir, flags.split)


if __name__ == "__main__":
    cli.main(main)
