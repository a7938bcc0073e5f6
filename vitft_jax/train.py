"""Fine-tunes a pretrained Vision Transformer on labelled images.

Writes a run folder: resolved config, metrics, checkpoints (the two newest and the best), predictions, summary, figures, report.
The same command goes on where an interrupted run stopped, to the same result to the bit; after SIGTERM from the very step.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitft_jax import (
    IMPORTED,
    cli,
    data,
    figures,
    flops,
    loggers,
    methods,
    metrics,
    optim,
    peft,
    processes,
    report,
    run,
    runtime,
    step,
    tree,
)
from vitft_jax.build import Built, build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.data import duplicates
from vitft_jax.errors import InputError, Preempted, nearest
from vitft_jax.evaluate import by_part, evaluate_split, fit_decision, outputs
from vitft_jax.folder import Folder
from vitft_jax.lock import Lock
from vitft_jax.meter import LOG_EVERY, Meter
from vitft_jax.preemption import Notice
from vitft_jax.ptq import calibration
from vitft_jax.report import page


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains, evaluates the best checkpoint and returns the summary.

    Raises:
        InputError: Config, data, weights or work directory are at fault; before any training where that can be seen.
        MachineError: A disk is full, or a process that reads images was killed.
        Preempted: SIGTERM came; a checkpoint of the last step was saved.
    """
    with Lock(workdir):
        return _train(config, workdir)


def _train(config: Config, workdir: Path) -> dict[str, Any]:
    started = time.perf_counter()
    config, source = run.resolve(config)
    config, adapter = peft.resolve(config, source)
    folder = Folder(workdir)
    if folder.whole() is not None:
        raise InputError(
            f"--workdir {workdir}: holds an int8 model that vitft_jax.quantize made, which does not train. To train adapters "
            "over an int8 base, start a new run: --config configs/qat.py --config.quant.base=int8"
        )
    folder.check(config)
    dataset = folder.dataset(config)
    dataset.images.check()
    _check_metric(config, dataset)
    figures.chosen(config, dataset)
    loggers.check(config)
    built = build(config, dataset, source)
    del source  # the base in float, of which an int8 base needs nothing any more
    if adapter is not None:
        built, fresh = peft.insert(built, adapter, dataset.classes)
        print(f"starts from the adapter {adapter.source}{fresh and f', with a fresh head: {fresh}'}", flush=True)
        if other := peft.other_base(adapter, built.weights):
            print(f"note: {other}", flush=True)
    layout = built.program.layout
    layout.check_batch(config.train.batch_size, config.train.accumulate)
    part, parts = layout.reader
    batches = data.train_batches(
        dataset,
        batch_size=config.train.batch_size,
        image_size=config.data.image_size,
        fit=config.data.fit,
        augment=config.augment,
        seed=config.seed,
        balanced=config.train.balanced,
        workers=config.data.workers,
        process_index=part,
        process_count=parts,
    )
    folder.open(config, dataset, built)
    print(_headline(config, dataset, built, workdir), flush=True)
    if unread := methods.unread(config):
        print(f"note: without effect, as no method of {config.methods} reads them: {', '.join(unread)}", flush=True)
    if folder.summary.exists():  # the last thing that a run writes
        summary = folder.results()
        report.print_results(f"{workdir} is finished (best step {summary['best_step']})", summary["metrics"])
        if not (workdir / page.FILE).exists():
            page.after(workdir, dataset)
        return summary

    alike = duplicates.across(dataset)
    if warning := duplicates.warning(dataset, alike):
        print(warning, flush=True)
    with Checkpoints(folder.checkpoints) as checkpoints:
        state, timing, halved = _fit_again(config, dataset, built, batches, folder, checkpoints)
        trainable, best_step = checkpoints.restore_best(built.trainable)
    told = built.program.method.report(trainable, state.opt_state)

    outs = {s: outputs(built.program, trainable, built.frozen, dataset, s, config) for s in ("val", "test")}
    decision = fit_decision(folder.path, dataset, outs["val"], config)
    results = {s: evaluate_split(folder.path, dataset, s, replace(out, decision=decision)) for s, out in outs.items()}
    for split in set(data.SPLITS) - set(outs):  # of `evaluate` while the run went on: no more what the run says
        (workdir / f"predictions_{split}.csv").unlink(missing_ok=True)
    speed = outs["test"].images_per_second
    summary = report.finite(
        {
            **by_part(results),
            "duplicates_across_splits": None if alike is None else duplicates.counts(alike),
            "best_step": best_step,
            "candidates_from_step": _ready_from(built),
            "method": told,
            "learning_rate_halved": halved,
            "parameters": built.parameters,
            "bytes": {
                "trainable": tree.nbytes(built.trainable),
                "frozen": tree.nbytes(built.frozen),
                "checkpoint": _folder_bytes(folder.checkpoints / str(best_step)),
            },
            "flops": flops.report(built.program.model, config.data.image_size),
            "timing": {**timing, "eval_images_per_second": speed, "seconds": time.perf_counter() - started},
            "environment": {**report.environment(), "weights": folder.resolved()["weights"], **_started_from(adapter)},
        }
    )
    report.write_json(folder.summary, summary)
    report.print_results(f"best checkpoint (step {best_step}) of {workdir}", summary["metrics"])
    report.print_calibration(summary["calibration"])
    with report.optional(f"figures of {workdir}", "its results are whole"):
        for name, values in told.items():
            if isinstance(values, Mapping):
                report.heat_map(folder.figures / f"{name}.png", values, name.replace("_", " "))
        figures.draw(folder.path, built.program, trainable, built.frozen, dataset, config)
    page.after(workdir, dataset)
    return summary


def _started_from(adapter: peft.Adapter | None) -> dict[str, Any]:
    return {"adapter": {"source": adapter.source, "sha256": adapter.sha256}} if adapter else {}


class _NotFinite(InputError):
    """The loss is not finite; `halved` is how often the learning rate was halved for that reason already."""

    def __init__(self, message: str, halved: int) -> None:
        super().__init__(message)
        self.halved = halved


def _fit_again(
    config: Config,
    dataset: data.Dataset,
    built: Built,
    batches: data.Batches,
    folder: Folder,
    checkpoints: Checkpoints,
) -> tuple[step.State, dict[str, float], int]:
    """`_fit`, which goes back to the newest checkpoint with half the learning rate up to ``train.nan_retries`` times.

    Also returns how often it was halved. A checkpoint says what it was saved under, so a run that is killed after it went
    back meets the same loss again and goes back as often.
    """
    halved = 0
    while True:
        try:
            return _fit(config, dataset, built, batches, folder, checkpoints, halved)
        except _NotFinite as error:
            if error.halved >= config.train.nan_retries:
                raise
            halved = error.halved + 1
            print(
                f"warning: {error}\ngoes back to step {checkpoints.latest_step or 0}, the learning rate halved",
                flush=True,
            )
        finally:
            batches.close()


def _fit(
    config: Config,
    dataset: data.Dataset,
    built: Built,
    batches: data.Batches,
    folder: Folder,
    checkpoints: Checkpoints,
    halved: int,
) -> tuple[step.State, dict[str, float], int]:
    """The loop over steps, from the newest checkpoint to the end; returns the last state, timing and halvings."""
    per_epoch = data.steps_per_epoch(dataset, config.train.batch_size)
    if checkpoints.latest_step is None:
        built = calibration.calibrated(built, dataset, config)
    state = step.init_state(built.program, built.trainable)
    # `waited` counts the epochs since the best. When saved, `input` is added, the position in the stream of batches, and
    # `pending`, the metrics of the steps since the last line of the log.
    loop: dict[str, Any] = {"best": None, "best_step": None, "waited": 0, "stopped": False, "halved": 0}
    batches.set_state({"next_batch": 0})
    if checkpoints.latest_step is not None:
        state, saved = checkpoints.restore(state)
        loop |= saved
        batches.set_state(loop["input"])
    loop["halved"] = max(halved, loop["halved"])
    built, rate = _slower(config, built, loop["halved"])
    step.check_calibrated(built.program, state.trainable)
    first = done = int(state.step)
    program = built.program_at(done)
    meter = Meter(config.train.batch_size, loop.pop("pending", ()))

    def check_finite(validation: float = 0.0) -> None:
        """Raises _NotFinite if a step since the last line of the log, or the loss of validation after it, is not finite."""
        fault = meter.not_finite()
        if fault is None and not math.isfinite(validation):
            fault = 0, f"the validation loss afterwards is {validation}"
        if fault is not None:
            ago, what = fault
            images = ", ".join(dataset.names[i] for i in meter.indices[-1 - ago])
            raise _NotFinite(
                f"step {done - ago}: {what}; learning rate {float(rate(done - ago - 1)):.3g}, images {images}. Look at these "
                "images, try a lower train.lr, or set train.nan_retries to go back to the last checkpoint with half of it",
                loop["halved"],
            )

    with (
        loggers.Log(config, folder.metrics, done) as log,
        report.Screen(built.total_steps, done) as screen,
        Notice() as notice,
    ):
        while done < built.total_steps and not loop["stopped"]:
            rows = dict(next(batches))
            indices = rows.pop("index")
            batch = built.program.layout.batch(rows)
            if program is not built.program_at(done):
                program = built.program_at(done)  # which compiles
                jax.block_until_ready(state)
                meter.leave_out_next()
            state, values = step.train_step(state, built.frozen, batch, program=program)
            done += 1
            meter.add(values, indices)
            if done == first + 1:
                jax.block_until_ready(state)
                runtime.release()  # compilation leaves much behind
                screen.say(f"first step done {time.perf_counter() - IMPORTED:.1f} s after start")
            epoch_ends = done % per_epoch == 0 or done == built.total_steps
            speed = meter.images_per_second
            left = (built.total_steps - done) * config.train.batch_size / speed
            screen.step(done, meter.loss, speed, left)
            if done % LOG_EVERY == 0 or epoch_ends:
                check_finite()
                means = meter.take()
                log.write(done, "train", {**means, **program.method.report(state.trainable, state.opt_state)})
            if epoch_ends:
                meter.pause()
                loop, rank = _validate(config, dataset, built, state, loop, log, screen, done, check_finite)
                checkpoints.save(state, {**loop, "input": batches.get_state(), "pending": []}, rank)
                runtime.release()
                meter.resume()
            if notice.came(done):
                if not epoch_ends:
                    check_finite()
                    checkpoints.save(state, {**loop, "input": batches.get_state(), "pending": meter.pending()}, None)
                raise Preempted(
                    f"terminated; step {done} of {built.total_steps} is saved and the same command goes on there"
                )
    return state, {"train_images_per_second": meter.images_per_second, "steps": done}, loop["halved"]


def _slower(config: Config, built: Built, halved: int) -> tuple[Built, Callable[[int], Any]]:
    """The run with its learning rate halved so many times, and that rate by step."""
    config = config.copy_and_resolve_references()
    config.train.lr *= 0.5**halved
    if halved:
        tx = optim.optimizer(config, built.program.method, built.total_steps)
        phases = tuple((end, replace(program, tx=tx)) for end, program in built.phases)
        built = replace(built, program=replace(built.program, tx=tx), phases=phases)
    return built, optim.schedule(config, built.total_steps)


def _ready_from(built: Built) -> int:
    """First step whose checkpoint may be the best."""
    return built.program.method.ready_from(built.total_steps)


def _validate(
    config: Config,
    dataset: data.Dataset,
    built: Built,
    state: step.State,
    loop: dict[str, Any],
    log: loggers.Log,
    screen: report.Screen,
    done: int,
    check_finite: Callable[[float], None],
) -> tuple[dict[str, Any], list[float]]:
    """Evaluates the validation split; returns what the loop knows afterwards, and the rank of this checkpoint."""
    out = outputs(built.program, state.trainable, built.frozen, dataset, "val", config)
    values = out.metrics
    check_finite(values["loss"])
    log.write(done, "val", values)
    name = config.train.best_metric
    # Where images are few the metric saturates; of equal values the lower loss is the better model.
    ready = done >= _ready_from(built)
    rank = [float(ready), metrics.rank(name, values[name]), -values["loss"]]
    better = loop["best"] is None or rank > loop["best"]
    waited = 0 if better or not ready else loop["waited"] + 1
    stopped = bool(config.train.patience) and waited >= config.train.patience
    few = dict.fromkeys(("loss", *metrics.names(dataset.multilabel)[: metrics.HEADLINE], name))
    why = partial(metrics.why_undefined, decided=out.decided, labels=out.labels, classes=dataset.classes)
    shown = report.line({key: values[key] for key in few}, why)
    note = "  (best so far)" if better else ""
    screen.say(f"step {done}  val  {shown}{note if ready else f'  (no candidate before step {_ready_from(built)})'}")
    if stopped:
        screen.say(f"stops: {waited} epochs without a better {name}")
    best, best_step = (rank, done) if better else (loop["best"], loop["best_step"])
    return {**loop, "best": best, "best_step": best_step, "waited": waited, "stopped": stopped}, rank


def _check_metric(config: Config, dataset: data.Dataset) -> None:
    known = metrics.names(dataset.multilabel)
    name = config.train.best_metric
    if name not in known:
        raise InputError(f"config key train.best_metric={name!r}; {nearest(name, known)}")
    labels = dataset.labels[dataset.indices("val")]
    one_hot = labels if dataset.multilabel else np.eye(len(dataset.classes))[labels]
    if math.isnan(metrics.compute(one_hot, labels, dataset.multilabel)[name]):  # even of a model that makes no mistake
        same = [c for c, column in zip(dataset.classes, one_hot.T, strict=True) if column.all() or not column.any()]
        raise InputError(
            f"train.best_metric={name!r} is not defined: in the validation split every image or none is {same[0]!r}. "
            "Choose train.best_metric=loss, or another split"
        )


def _headline(config: Config, dataset: data.Dataset, built: Built, workdir: Path) -> str:
    sizes = ", ".join(f"{split} {len(dataset.indices(split))}" for split in data.SPLITS)
    p = built.parameters
    alone = sum(name == group for name, group in zip(dataset.names, dataset.groups, strict=True))
    groups = f"; {alone} images have no group (patient, video), so each counts as one" if alone else ""
    groups = groups if dataset.grouped else "; no groups (patients, videos) are known, so each image counts as one"
    return (
        f"{workdir}: {len(dataset.classes)} {'labels' if dataset.multilabel else 'classes'} "
        f"({', '.join(dataset.classes)}); {sizes}{groups}\n"
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
    processes.add_flags(arguments)
    flags, config = cli.parse_with_config(arguments, argv)
    processes.start(flags)
    train(config, flags.workdir or Path("runs") / Path(flags.config).stem)


if __name__ == "__main__":
    cli.main(main)
