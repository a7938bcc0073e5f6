"""Fine-tunes a pretrained Vision Transformer on labelled images.

Writes a run folder: resolved config, metrics, checkpoints (newest and best), predictions, summary and figures. The same
command goes on where an interrupted run stopped.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitft_jax import IMPORTED, calibration, cli, data, figures, flops, metrics, report, run, runtime, step, tree
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.data import duplicates
from vitft_jax.errors import InputError, nearest
from vitft_jax.evaluate import evaluate_split, outputs

LOG_EVERY = 10  # steps between lines in metrics.jsonl


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains, evaluates the best checkpoint and returns the summary.

    Raises:
        InputError: Config, data, weights or work directory are at fault; before any training where that can be seen.
    """
    started = time.perf_counter()
    config, source = run.resolve(config)
    folder = run.Folder(workdir)
    if folder.whole() is not None:
        raise InputError(
            f"--workdir {workdir}: holds an int8 model that vitft_jax.quantize made, which does not train. To train adapters "
            "over an int8 base, start a new run: --config configs/qat.py --config.methods=quant,lora "
            "--config.train.trainable=^head --config.quant.base=int8"
        )
    folder.check(config)
    dataset = folder.dataset(config)
    dataset.images.check()
    _check_metric(config, dataset)
    figures.chosen(config, dataset)
    built = run.build(config, dataset, source)
    batches = data.train_batches(
        dataset,
        batch_size=config.train.batch_size,
        image_size=config.data.image_size,
        fit=config.data.fit,
        augment=config.augment,
        seed=config.seed,
        workers=config.data.workers,
    )
    folder.open(config, dataset, built)
    print(_headline(config, dataset, built, workdir), flush=True)
    if folder.summary.exists():  # the last thing that a run writes
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        report.print_results(f"{workdir} is finished (best step {summary['best_step']})", summary["metrics"])
        return summary

    if warning := duplicates.warning(dataset):
        print(warning, flush=True)
    with Checkpoints(folder.checkpoints) as checkpoints:
        state, timing = _fit(config, dataset, built, batches, folder, checkpoints)
        trainable, best_step = checkpoints.restore_best(built.trainable)
    told = built.program.method.report(trainable, state.opt_state)
    for name, values in told.items():
        if isinstance(values, Mapping):
            report.heat_map(folder.figures / f"{name}.png", values, name.replace("_", " "))

    results, speed = {}, math.nan
    for split in ("val", "test"):
        results[split], out = evaluate_split(folder.path, built, trainable, dataset, split, config)
        speed = out.images_per_second
    figures.draw(folder.path, built.program, trainable, built.frozen, dataset, config)
    summary = report.finite(
        {
            "metrics": results,
            "best_step": best_step,
            "candidates_from_step": _ready_from(built),
            "method": told,
            "parameters": built.parameters,
            "bytes": {
                "trainable": tree.nbytes(built.trainable),
                "frozen": tree.nbytes(built.frozen),
                "checkpoint": _folder_bytes(folder.checkpoints / str(best_step)),
            },
            "flops": flops.report(built.program.model, config.data.image_size),
            "timing": {**timing, "eval_images_per_second": speed, "seconds": time.perf_counter() - started},
            "environment": {**report.environment(), "weights": folder.resolved()["weights"]},
        }
    )
    report.write_json(folder.summary, summary)
    report.print_results(f"best checkpoint (step {best_step}) of {workdir}", results)
    return summary


def _fit(
    config: Config,
    dataset: data.Dataset,
    built: run.Built,
    batches: data.Batches,
    folder: run.Folder,
    checkpoints: Checkpoints,
) -> tuple[step.State, dict[str, float]]:
    """The loop over steps, from the newest checkpoint to the end; returns the last state and timing."""
    per_epoch = data.steps_per_epoch(dataset, config.train.batch_size)
    if checkpoints.latest_step is None:
        built = calibration.calibrated(built, dataset, config)
    state = step.init_state(built.program, built.trainable)
    # `waited` counts the epochs since the best; `input`, added when saved, is the position in the stream of batches.
    loop: dict[str, Any] = {"best": None, "waited": 0, "stopped": False}
    if checkpoints.latest_step is not None:
        state, loop = checkpoints.restore(state)
        batches.set_state(loop["input"])
    step.check_calibrated(built.program, state.trainable)
    first = done = int(state.step)
    program = built.program_at(done)
    log = report.MetricsLog(folder.metrics, done)
    meter = Meter(config.train.batch_size)
    with report.Screen(built.total_steps, done) as screen:
        while done < built.total_steps and not loop["stopped"]:
            batch = {key: value for key, value in next(batches).items() if key != "index"}
            if program is not built.program_at(done):
                program = built.program_at(done)  # which compiles
                jax.block_until_ready(state)
                meter.leave_out_next()
            state, values = step.train_step(state, built.frozen, batch, program=program)
            done += 1
            meter.add(values)
            if done == first + 1:
                jax.block_until_ready(state)
                runtime.release()  # compilation leaves much behind
                screen.say(f"first step done {time.perf_counter() - IMPORTED:.1f} s after start")
            epoch_ends = done % per_epoch == 0 or done == built.total_steps
            speed = meter.images_per_second
            left = (built.total_steps - done) * config.train.batch_size / speed
            screen.step(done, meter.loss, speed, left)
            if done % LOG_EVERY == 0 or epoch_ends:
                means = meter.take()
                if not math.isfinite(means["loss"]):
                    raise InputError(f"the loss is {means['loss']} by step {done}; try a lower train.lr")
                log.write(done, "train", {**means, **program.method.report(state.trainable, state.opt_state)})
            if epoch_ends:
                meter.pause()
                loop, rank = _validate(config, dataset, built, state, loop, log, screen, done)
                checkpoints.save(state, {**loop, "input": batches.get_state()}, rank)
                runtime.release()
                meter.resume()
    return state, {"train_images_per_second": meter.images_per_second, "steps": done}


def _ready_from(built: run.Built) -> int:
    """First step whose checkpoint may be the best."""
    return built.program.method.ready_from(built.total_steps)


def _validate(
    config: Config,
    dataset: data.Dataset,
    built: run.Built,
    state: step.State,
    loop: dict[str, Any],
    log: report.MetricsLog,
    screen: report.Screen,
    done: int,
) -> tuple[dict[str, Any], list[float]]:
    """Evaluates the validation split; returns what the loop knows afterwards, and the rank of this checkpoint."""
    out = outputs(built.program, state.trainable, built.frozen, dataset, "val", config)
    values = {"loss": out.loss, **metrics.compute(out.probabilities, out.labels, dataset.multilabel)}
    log.write(done, "val", values)
    name = config.train.best_metric
    # Where images are few the metric saturates; of equal values the lower loss is the better model.
    ready = done >= _ready_from(built)
    rank = [float(ready), -values[name] if name == "loss" else values[name], -out.loss]
    better = loop["best"] is None or rank > loop["best"]
    waited = 0 if better or not ready else loop["waited"] + 1
    stopped = bool(config.train.patience) and waited >= config.train.patience
    shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
    note = "  (best so far)" if better else ""
    screen.say(f"step {done}  val  {shown}{note if ready else f'  (no candidate before step {_ready_from(built)})'}")
    if stopped:
        screen.say(f"stops: {waited} epochs without a better {name}")
    return {"best": rank if better else loop["best"], "waited": waited, "stopped": stopped}, rank


class Meter:
    """Means of the step metrics, and the speed of training without compilation and evaluation.

    Values stay on the device until they are asked for, so that no step waits for the one before it to be read.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._values: list[dict[str, jax.Array]] = []
        self._steps, self._seconds, self._since = 0, 0.0, math.nan
        self.loss = math.nan

    def add(self, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched."""
        if self._values:
            self.loss = float(self._values[-1]["loss"])  # of the step before: this one is still running
        self._values.append(values)
        if math.isnan(self._since):  # this step compiles: time goes on after it
            jax.block_until_ready(values)
            self.resume()
        else:
            self._steps += 1

    def take(self) -> dict[str, float]:
        """Means since it was last called, and the speed so far."""
        host = jax.device_get(self._values)
        self._values = []
        means = {key: float(np.mean([values[key] for values in host])) for key in host[0]}
        self.loss = float(host[-1]["loss"])
        return {**means, "images_per_second": self.images_per_second}

    def pause(self) -> None:
        """Stops the clock; call it when the device is idle."""
        self._seconds += time.perf_counter() - self._since

    def leave_out_next(self) -> None:
        """Leaves the next step out, as the first: it compiles. Call it when the device is idle."""
        self.pause()
        self._since = math.nan

    def resume(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Images per second of training; NaN until the second step."""
        seconds = self._seconds + time.perf_counter() - self._since
        return self._steps * self._batch_size / seconds if self._steps else math.nan


def _check_metric(config: Config, dataset: data.Dataset) -> None:
    known = ("loss", *metrics.names(dataset.multilabel))
    name = config.train.best_metric
    if name not in known:
        raise InputError(f"config key train.best_metric={name!r}; {nearest(name, known)}")
    labels = dataset.labels[dataset.indices("val")]
    one_hot = labels if dataset.multilabel else np.eye(len(dataset.classes))[labels]
    for name_, column in zip(dataset.classes, one_hot.T, strict=True):
        if name == "auroc" and (column.all() or not column.any()):
            raise InputError(
                f"train.best_metric='auroc' is not defined: in the validation split every image or none is {name_!r}. "
                "Choose train.best_metric=loss, or another split"
            )


def _headline(config: Config, dataset: data.Dataset, built: run.Built, workdir: Path) -> str:
    sizes = ", ".join(f"{split} {len(dataset.indices(split))}" for split in data.SPLITS)
    p = built.parameters
    return (
        f"{workdir}: {len(dataset.classes)} {'labels' if dataset.multilabel else 'classes'} "
        f"({', '.join(dataset.classes)}); {sizes}\n"
        f"{built.weights.source}: {p['total']:,} parameters, {p['trainable']:,} train ({p['trainable_percent']:.2f} %); "
        f"{built.total_steps} steps of {config.train.batch_size} images"
    )


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(__doc__, "python -m vitft_jax.train --config configs/lora.py --config.data.path=IMAGES")
    arguments.add_argument("--workdir", type=Path, help="folder of the run (default: runs/<name of the config>)")
    flags, config = cli.parse_with_config(arguments, argv)
    train(config, flags.workdir or Path("runs") / Path(flags.config).stem)


if __name__ == "__main__":
    cli.main(main)
