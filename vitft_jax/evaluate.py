"""Evaluates the best checkpoint of a run on a split of its data.

Prints metrics with 95 % bootstrap intervals (resampled by group), writes `predictions_<split>.csv`, and updates the split's
metrics in `summary.json`, and `report.html`. Probabilities are those after temperature scaling, and labels are decided at the
thresholds, that the end of training fitted on the validation split (`decision.json`), so numbers of that split are a little
too good.

A run can also be evaluated under other settings than it was trained with, where they need no other parameters: such as token
skipping on a model that was trained with all tokens, `--config.methods=lora,skip --config.skip.drop_ratio=0.5`. Results then
go to `evaluations/<name>/` in the run, and the run's own stay as they are.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitft_jax import cli, data, decision, figures, flops, metrics, processes, report, runtime, step, tree
from vitft_jax import config as configs
from vitft_jax.build import Built, build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.report import page
from vitft_jax.run import resolve


@dataclass(frozen=True)
class Outputs:
    """What a model says about a split, in the order of the data.

    Attributes:
        indices: Positions in the dataset, `(n,)`.
        logits: `(n, C)`.
        labels: `(n,)` or `(n, C)`.
        images_per_second: Over the whole pass, input included, the first batch (compilation) left out.
        decision: How the logits are read.
    """

    indices: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    images_per_second: float
    decision: Decision = decision.RAW

    @property
    def probabilities(self) -> np.ndarray:
        """`(n, C)`, float64."""
        return self.decision.probabilities(self.logits, self.labels.ndim == 2)

    @property
    def decided(self) -> np.ndarray:
        """`(n,)` or `(n, C)`."""
        return self.decision.decide(self.probabilities, self.labels.ndim == 2)

    @property
    def metrics(self) -> dict[str, float]:
        """See `metrics.compute`."""
        return metrics.compute(self.probabilities, self.labels, self.labels.ndim == 2, self.decided)


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
    speed = timed / seconds if timed else float("nan")
    # In the order of the data, padding last.
    return Outputs(index, np.concatenate(logits)[: len(index)], dataset.labels[index], speed)


def fit_decision(path: Path, dataset: data.Dataset, out: Outputs, config: Config) -> Decision:
    """Fits temperature and thresholds to outputs on the validation split, and writes them into the run at `path`."""
    groups = [dataset.groups[i] for i in out.indices]
    fitted = decision.fit(out.logits, out.labels, groups, config.train.thresholds)
    decision.write(path, fitted, dataset.classes)
    return fitted


def evaluate_split(path: Path, dataset: data.Dataset, split: str, out: Outputs) -> dict[str, Any]:
    """What `summary.json` says of a split, a part for each of its keys; writes its predictions into the folder `path`.

    Returns:
        As `metrics.assess`; and `calibration`: the temperature, the thresholds of labels, and the metrics that these change
        without (`before`) and with them (`after`).
    """
    groups = [dataset.groups[i] for i in out.indices]
    report.write_predictions(path / f"predictions_{split}.csv", dataset, out.indices, out.probabilities, out.decided)
    before, after = replace(out, decision=decision.RAW).metrics, out.metrics
    return {
        **metrics.assess(out.probabilities, out.decided, out.labels, groups, dataset.classes, metrics.RESAMPLES),
        "calibration": {
            **out.decision.told(dataset.classes),
            "before": {name: before[name] for name in metrics.CALIBRATED},
            "after": {name: after[name] for name in metrics.CALIBRATED},
        },
    }


def by_part(splits: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results of splits as they stand in `summary.json`: a dict of splits for each part."""
    parts = next(iter(splits.values()))
    return {part: {split: result[part] for split, result in splits.items()} for part in parts}


def evaluate(workdir: Path, split: str = "test", overrides: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """Evaluates a finished or running run; returns ``{metric: {value, low, high}}``.

    Args:
        workdir: The run folder.
        split: Of its data.
        overrides: Other settings than the run's, such as ``skip.drop_ratio=0.5``; see `config.AT_EVALUATION`.
        name: With overrides, the folder in `evaluations/`; '' = the names of the methods.

    Raises:
        InputError: No run or no checkpoint there, its data or weights are not what they were, the overrides need other
            parameters than the run has, or the folder `name` holds results under other overrides.
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
        _check_same_settings(path, configs.differences(folder.config(), config))
        path.mkdir(parents=True, exist_ok=True)
        del trained
    del source  # the base in float, of which an int8 base needs nothing any more
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, at = checkpoints.restore_best(built.trainable, built.program.layout)
    out = outputs(built.program, trainable, built.frozen, dataset, split, config)
    out = replace(out, decision=decision.read(workdir))
    results = report.finite(evaluate_split(path, dataset, split, out))
    report.print_results(f"{path}, step {at}, {len(out.indices)} images", {split: results["metrics"]})
    report.print_calibration({split: results["calibration"]})
    if overrides:
        report.write_json(
            path / f"results_{split}.json",
            {
                "differs": configs.differences(folder.config(), config),
                "step": at,
                **results,
                "flops": flops.report(built.program.model, config.data.image_size),
                "eval_images_per_second": out.images_per_second,
            },
        )
    elif folder.summary.exists():
        summary = folder.results()
        for part, value in results.items():
            summary.setdefault(part, {})[split] = value
        report.write_json(folder.summary, summary)
    with report.optional(f"figures of {path}", "its results are whole"):
        figures.draw(path, built.program, trainable, built.frozen, dataset, config)
    page.after(workdir, dataset)
    return results["metrics"]


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    config = config.copy_and_resolve_references()
    configs.override(config, overrides, only=configs.AT_EVALUATION)
    return config


def _check_same_settings(path: Path, differs: Sequence[str]) -> None:
    """Refuses a folder that holds results under other settings, so that no page shows the results of both as of one."""

    def of_results(texts: Sequence[str]) -> list[str]:
        return [text for text in texts if not text.startswith(("figures.", *configs.WHERE))]  # which change no result

    for file in sorted(path.glob("results_*.json")):
        try:
            there = json.loads(file.read_text(encoding="utf-8"))["differs"]
            same = of_results(there) == of_results(differs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: no results as this command writes them ({error!r}); delete it") from None
        if not same:
            raise InputError(
                f"{file} has results under other settings ({'; '.join(there)}); give these another --name, or delete {path}"
            )


def _parameters(built: Built, config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the variables of a run by name; those of one whose checkpoint holds the whole model come from the model."""
    if built.whole is None:
        parts = (built.trainable, built.frozen)
    else:
        images = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
        parts = (jax.eval_shape(built.program.model.init, jax.random.key(0), images),)
    return {name: leaf.shape for part in parts for name, leaf in tree.flatten(part).items()}


def _check_same_parameters(trained: Built, built: Built, config: Config) -> None:
    """Refuses settings under which the parameters of a run are not those that it trained."""
    there, here = (_parameters(b, config) for b in (trained, built))
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
