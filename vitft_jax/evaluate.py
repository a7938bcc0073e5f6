"""Evaluates the best checkpoint of a run on a split of its data.

Prints metrics with 95 % bootstrap intervals (resampled by group), writes `predictions_<split>.csv`, and updates the split's
metrics in `summary.json`.

A run can also be evaluated under other settings than it was trained with, where they need no other parameters: such as token
skipping on a model that was trained with all tokens, `--config.methods=lora,skip --config.skip.drop_ratio=0.5`. Results then
go to `evaluations/<name>/` in the run, and the run's own stay as they are.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitft_jax import cli, data, figures, flops, metrics, processes, report, runtime, step, tree
from vitft_jax import config as configs
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.run import Built, Folder, build, resolve


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
    """Runs the model over a split, each image exactly once.

    Raises:
        InputError: Its static ranges were never calibrated.
    """
    step.check_calibrated(program, trainable)
    layout, index = program.layout, dataset.indices(split)
    part, parts = layout.reader
    batch_size = layout.rows(config.train.batch_size)
    logits, started = [], time.perf_counter()
    batches = data.eval_batches(
        dataset,
        split,
        batch_size=batch_size,
        image_size=config.data.image_size,
        fit=config.data.fit,
        workers=config.data.workers,
        process_index=part,
        process_count=parts,
    )
    for batch in batches:
        images = layout.batch(batch["image"])
        logits.append(np.asarray(step.eval_step(trainable, frozen, images, program=program)))
        if len(logits) == 1:
            started = time.perf_counter()
    seconds, timed = time.perf_counter() - started, max(0, len(index) - batch_size)
    z = np.concatenate(logits)[: len(index)]  # in the order of the data, padding last
    p, labels = metrics.probabilities(z, dataset.multilabel), dataset.labels[index]
    return Outputs(index, p, labels, _loss(p, labels, dataset.multilabel), timed / seconds if timed else float("nan"))


def _loss(p: np.ndarray, labels: np.ndarray, multilabel: bool) -> float:
    p = np.clip(p, 1e-12, 1.0)
    if multilabel:
        return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log(np.clip(1 - p, 1e-12, 1.0))))
    return float(-np.mean(np.log(p[np.arange(len(labels)), labels])))


def evaluate_split(
    path: Path, built: Built, trainable: Any, dataset: data.Dataset, split: str, config: Config
) -> tuple[dict[str, Any], Outputs]:
    """Metrics with intervals of one split; writes its predictions into the folder `path`."""
    out = outputs(built.program, trainable, built.frozen, dataset, split, config)
    groups = [dataset.groups[i] for i in out.indices]
    report.write_predictions(path / f"predictions_{split}.csv", dataset, out.indices, out.probabilities)
    results = metrics.intervals(out.probabilities, out.labels, groups, dataset.multilabel, metrics.RESAMPLES)
    return results, out


def evaluate(workdir: Path, split: str = "test", overrides: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """Evaluates a finished or running run; returns ``{metric: {value, low, high}}``.

    Args:
        workdir: The run folder.
        split: Of its data.
        overrides: Other settings than the run's, such as ``skip.drop_ratio=0.5``; see `config.AT_EVALUATION`.
        name: With overrides, the folder in `evaluations/`; '' = the names of the methods.

    Raises:
        InputError: No run or no checkpoint there, its data or weights are not what they were, or the overrides need other
            parameters than the run has.
    """
    if split not in data.SPLITS:
        raise InputError(f"--split {split}: one of {', '.join(data.SPLITS)}")
    if Path(name).name != name:
        raise InputError(f"--name {name}: the name of one folder, without separators")
    folder = Folder(workdir)
    whole = folder.whole()
    here = [text for text in overrides if text.startswith(configs.WHERE)]
    overrides = [text for text in overrides if text not in here]
    config, source = resolve(_overridden(folder.config(), here), whole)
    dataset = folder.dataset(config)
    built = build(config, dataset, source, whole)
    folder.open(config, dataset, built)
    path = workdir
    if overrides:
        trained, config = built, _overridden(config, overrides)
        built = build(config, dataset, source, whole)
        _check_same_parameters(trained, built, config)
        figures.chosen(config, dataset)
        path = workdir / "evaluations" / (name or "-".join(config.methods) or "plain")
        path.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, at = checkpoints.restore_best(built.trainable, built.program.layout)
    results, out = evaluate_split(path, built, trainable, dataset, split, config)
    report.print_results(f"{path}, step {at}, {len(dataset.indices(split))} images", {split: results})
    if overrides:
        report.write_json(
            path / f"results_{split}.json",
            {
                "differs": configs.differences(folder.config(), config),
                "step": at,
                "metrics": results,
                "flops": flops.report(built.program.model, config.data.image_size),
                "eval_images_per_second": out.images_per_second,
            },
        )
    elif folder.summary.exists():
        summary = folder.results()
        summary["metrics"][split] = results
        report.write_json(folder.summary, summary)
    figures.draw(path, built.program, trainable, built.frozen, dataset, config)
    return results


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    config = config.copy_and_resolve_references()
    configs.override(config, overrides, only=configs.AT_EVALUATION)
    return config


def _check_same_parameters(trained: Built, built: Built, config: Config) -> None:
    """Refuses settings under which the parameters of a run are not those that it trained."""
    there, here = (
        {name: leaf.shape for b_tree in (b.trainable, b.frozen) for name, leaf in tree.flatten(b_tree).items()}
        for b in (trained, built)
    )
    if there != here:
        raise InputError(
            f"--config.methods={','.join(config.methods)}: this run has other parameters, such as "
            f"{min(there.items() ^ here.items())[0]!r}; keep the methods that it was trained with, and add to them"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(__doc__, "python -m vitft_jax.evaluate --workdir runs/lora --split test")
    arguments.add_argument("--workdir", required=True, type=Path, help="a run folder")
    arguments.add_argument("--split", default="test", help="train, val or test (default: test)")
    arguments.add_argument("--name", default="", help="folder in evaluations/ (default: the names of the methods)")
    processes.add_flags(arguments)
    flags, overrides = cli.parse_with_overrides(arguments, argv, "--config.methods=lora,skip")
    processes.start(flags)
    evaluate(flags.workdir, flags.split, overrides, flags.name)


if __name__ == "__main__":
    cli.main(main)
