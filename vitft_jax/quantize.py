"""Makes an int8 model of a trained run, without training: a new run folder that the other commands treat like any.

Adapters are merged, then the linear layers of the blocks are quantised by the recipe of `vitft_jax.ptq`, calibrated on training
images without augmentation, the run's or others (`--calibration`). The checkpoint holds int8 kernels and their scales in
the place of float ones, and the whole model, so the pretrained weights are not needed any more. `summary.json` compares with
the float run on the same images.
"""

import argparse
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitft_jax import calibration, cli, data, decision, methods, metrics, report, run, runtime, tree
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.evaluate import Outputs, by_part, evaluate_split, fit_decision, outputs
from vitft_jax.methods import quant
from vitft_jax.ptq import simulate
from vitft_jax.ptq.recipe import Recipe
from vitft_jax.ptq.recipe import run as quantise
from vitft_jax.ptq.simulate import Layer
from vitft_jax.report import page
from vitft_jax.step import Program, State


@dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
        recipe: Stages.
        bits: Of kernels, 8 or 4.
        weight_only: Leaves activations in float.
        attention: Also the products of attention in int8.
        skip_layers: Regex on paths of linear layers that stay in float; '' for none.
        images: Calibration images.
        calibration: Where they come from, see `calibration.images_from`: the training split there; '' = that of the run.
        max_drop: Percentage points that the first metric (accuracy) may fall on the validation split: the most sensitive
            layers stay in float until it falls no further. None for no limit.
        sensitivity_images: Images on which every layer is left out once; 0 to leave that away.
    """

    recipe: Recipe = field(default_factory=Recipe)
    bits: int = 8
    weight_only: bool = False
    attention: bool = False
    skip_layers: str = "^(embed|head)"
    images: int = calibration.IMAGES
    calibration: str = ""
    max_drop: float | None = None
    sensitivity_images: int = 32


@dataclass(frozen=True)
class Source:
    """The float run: its folder, config, data, program, trained variables and the step of its best checkpoint."""

    folder: run.Folder
    config: Config
    dataset: data.Dataset
    built: run.Built
    trainable: Any
    step: int

    def outputs(self, dataset: data.Dataset, split: str) -> Outputs:
        """What the float model says about a split."""
        return outputs(self.built.program, self.trainable, self.built.frozen, dataset, split, self.config)


@dataclass(frozen=True)
class Simulation:
    """The quantised model with any of its layers in float: the program of `simulate`, and what its variables are made of."""

    program: Program
    params: tree.Tree
    layers: dict[str, Layer]
    weight_only: bool
    config: Config

    def outputs(self, dataset: data.Dataset, split: str, in_float: Sequence[str]) -> Outputs:
        """What it says about a split with some layers in float."""
        variables = simulate.variables(self.params, self.layers, in_float, self.weight_only)
        return outputs(self.program, variables, {}, dataset, split, self.config)


def quantize(workdir: Path, output: Path, options: Options) -> dict[str, Any]:
    """Quantises the best checkpoint of a run into a new run folder; returns the summary.

    Raises:
        InputError: There is no trained run, or it is quantised already; the output exists; a setting is out of range; the
            calibration images are too few, cannot be read or have other classes, or activations on them are not finite;
            no layer is left within `max_drop`.
    """
    started = time.perf_counter()
    _check(output, options)
    source = _source(workdir)
    config = _config(source.config, options)
    settings = quant.settings_of(config)
    params = source.built.program.method.merge(tree.join(source.trainable, source.built.frozen))["params"]
    plain = calibration.plain(source.built.program)

    images = source.dataset
    if options.calibration:
        images = calibration.images_from(options.calibration, source.dataset, source.config)
    chosen = calibration.subset(images, options.images, source.config.seed)
    print(f"{workdir}, step {source.step}: calibrating on {len(chosen.indices('train'))} training images", flush=True)
    seen = calibration.see(plain, params, chosen, source.config)
    params, layers, told = quantise(params, seen, settings, options.recipe)
    if not layers:
        raise InputError(f"--skip_layers {options.skip_layers!r} skips every linear layer: nothing is quantised")
    weakest = min(told, key=lambda path: told[path]["snr_db"])
    print(f"{len(layers)} layers; lowest signal-to-noise {told[weakest]['snr_db']:.1f} dB at {weakest}", flush=True)

    program = simulate.program(plain, layers, settings)
    simulation = Simulation(program, params, layers, settings.weight_only, source.config)
    if options.sensitivity_images:
        for path, value in _sensitivity(source, simulation, options.sensitivity_images).items():
            told[path]["sensitivity"] = value
    before = {split: source.outputs(source.dataset, split) for split in ("val", "test")}

    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a command that was killed
    try:
        in_float: list[str] = []
        while True:
            in_float = _within(options.max_drop, in_float, told, source.dataset, simulation, before["val"])
            folder, built, variables = _write(part, source, config, params, layers, in_float)
            after = {s: outputs(built.program, variables, built.frozen, source.dataset, s, config) for s in before}
            drop = _drop(before["val"], after["val"], source.dataset.multilabel)
            if options.max_drop is None or drop <= options.max_drop:
                break
            in_float = _one_more(in_float, told, options.max_drop)  # the simulation rounds a little otherwise
            shutil.rmtree(part)
        # The logits changed, so temperature and thresholds are fitted again.
        fitted = fit_decision(folder.path, source.dataset, after["val"], config)
        before, after = (
            {split: replace(out, decision=how) for split, out in outs.items()}
            for outs, how in ((before, decision.read(workdir)), (after, fitted))
        )
        results = {s: evaluate_split(folder.path, source.dataset, s, out) for s, out in after.items()}
        comparison = {split: _compare(source.dataset, before[split], after[split]) for split in results}
        summary = {
            **by_part(results),
            **_of_source(source.folder),
            "best_step": source.step,
            "method": {
                "source": str(workdir.resolve()),
                "options": asdict(options),
                "calibration_images": len(chosen.indices("train")),
                "float_layers": in_float,
                "val_drop": drop,
                "compared": comparison,
                "layers": {path: value for path, value in told.items() if path not in in_float},
            },
            "parameters": {"total": tree.count(params), "trainable": 0, "trainable_percent": 0.0},
            "bytes": {
                "float32": tree.nbytes(params),
                "arrays": tree.nbytes(variables),
                "checkpoint": sum(f.stat().st_size for f in folder.checkpoints.rglob("*") if f.is_file()),
            },
            "timing": {
                "eval_images_per_second": after["test"].images_per_second,
                "float_eval_images_per_second": before["test"].images_per_second,
                "seconds": time.perf_counter() - started,
            },
            "environment": {**report.environment(), "weights": folder.resolved()["weights"]},
        }
        report.write_json(folder.summary, summary)
        os.replace(part, output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _print(output, summary)
    page.after(output, source.dataset)
    return report.finite(summary)


def _of_source(folder: run.Folder) -> dict[str, Any]:
    """What the summary of the float run says of the data, if it is there yet."""
    known = folder.results() if folder.summary.exists() else {}
    return {key: known[key] for key in ("duplicates_across_splits",) if key in known}


def _check(output: Path, options: Options) -> None:
    if output.exists():
        raise InputError(f"--output {output}: exists already; choose another, or delete it")
    if options.max_drop is not None and not (options.max_drop >= 0 and options.sensitivity_images):
        raise InputError(
            f"--max_drop {options.max_drop} with --sensitivity_images {options.sensitivity_images}: the limit is at least "
            "0, and which layers are sensitive must be measured"
        )
    if options.images < calibration.FEWEST or options.sensitivity_images < 0:
        raise InputError(
            f"--images {options.images} --sensitivity_images {options.sensitivity_images}: at least "
            f"{calibration.FEWEST} and 0"
        )


def _source(workdir: Path) -> Source:
    folder = run.Folder(workdir)
    if folder.whole() is not None:
        raise InputError(f"--workdir {workdir}: is quantised already; quantise the run that it was made from")
    config, weights = run.resolve(folder.config())
    dataset = folder.dataset(config)
    built = run.build(config, dataset, weights)
    folder.open(config, dataset, built)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, step = checkpoints.restore_best(built.trainable)
    return Source(folder, config, dataset, built, trainable, step)


def _config(config: Config, options: Options) -> Config:
    """The config of the quantised run: methods that are merged into the kernels are gone, others stay."""

    def stays(name: str) -> bool:
        alone = config.copy_and_resolve_references()
        alone.methods = (name,)
        return name != "quant" and not methods.load(alone).collections

    new = config.copy_and_resolve_references()
    new.methods = ("quant", *(name for name in config.methods if stays(name)))
    new.quant.update(
        bits=options.bits,
        weight_only=options.weight_only,
        attention=options.attention,
        static=bool(options.recipe.static),
        base="int8",
        skip_layers=options.skip_layers,
    )
    return new


def _sensitivity(source: Source, simulation: Simulation, count: int) -> dict[str, float]:
    """How much the divergence of the outputs from the float model falls when one layer alone stays in float, by path."""
    dataset = calibration.subset(source.dataset, count, source.config.seed)

    def divergence(in_float: Sequence[str]) -> float:
        p = simulation.outputs(dataset, "train", in_float).probabilities
        return simulate.divergence(exact.probabilities, p, dataset.multilabel)

    exact = source.outputs(dataset, "train")
    whole, values = divergence([]), {}
    for i, path in enumerate(simulation.layers, 1):
        values[path] = whole - divergence([path])
        if i % max(1, len(simulation.layers) // report.PLAIN_LINES) == 0:
            print(f"leaving out layer {i}/{len(simulation.layers)}  {path}  {values[path]:.2e} nats", flush=True)
    return values


def _within(
    max_drop: float | None,
    in_float: list[str],
    told: dict[str, dict[str, Any]],
    dataset: data.Dataset,
    simulation: Simulation,
    before: Outputs,
) -> list[str]:
    """The layers to keep in float, the most sensitive first, until the metric falls by no more than `max_drop`."""
    while max_drop is not None:
        drop = _drop(before, simulation.outputs(dataset, "val", in_float), dataset.multilabel)
        print(f"{len(in_float)} layers in float: validation drop {drop:.2f} points", flush=True)
        if drop <= max_drop:
            break
        in_float = _one_more(in_float, told, max_drop)
    return in_float


def _one_more(in_float: list[str], told: dict[str, dict[str, Any]], max_drop: float) -> list[str]:
    order = sorted(told, key=lambda path: told[path]["sensitivity"], reverse=True)
    if len(in_float) + 1 >= len(order):
        raise InputError(
            f"--max_drop {max_drop}: no layer is left to quantise within it; allow more, or try other stages"
        )
    return order[: len(in_float) + 1]


def _drop(before: Outputs, after: Outputs, multilabel: bool) -> float:
    """Percentage points that the first metric falls."""
    name = metrics.names(multilabel)[0]
    old, new = (metrics.compute(out.probabilities, out.labels, multilabel)[name] for out in (before, after))
    return 100 * (old - new)


def _write(
    part: Path, source: Source, config: Config, params: tree.Tree, layers: dict[str, Layer], in_float: list[str]
) -> tuple[run.Folder, run.Built, dict[str, Any]]:
    """Writes the run folder but for its summary; returns it with its program and its variables as they are stored."""
    if in_float:
        config = config.copy_and_resolve_references()
        exactly = f"^({'|'.join(map(re.escape, in_float))})$"
        config.quant.skip_layers = "|".join(filter(None, (config.quant.skip_layers, exactly)))
    whole = run.whole_model(source.built.program, source.built.weights)
    built = run.build(config, source.dataset, None, whole)
    size = config.data.image_size
    shapes = jax.eval_shape(built.program.model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    kept = {path: layer for path, layer in layers.items() if path not in in_float}
    leaves = tree.flatten(params) | {f"{path}/bias": layer.bias for path, layer in kept.items()}
    variables = quant.insert(
        {"params": tree.unflatten(leaves), quant.COLLECTION: shapes[quant.COLLECTION]},
        {path: layer.kernel for path, layer in kept.items()},
        {path: layer.bound for path, layer in kept.items()} if config.quant.static else None,
    )
    folder = run.Folder(part)
    folder.open(config, source.dataset, built)
    with Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(State(jnp.int32(source.step), variables, {}), {}, [1.0])
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        return folder, built, checkpoints.restore_best(None, built.program.layout)[0]


def _compare(dataset: data.Dataset, before: Outputs, after: Outputs) -> dict[str, Any]:
    """Metrics of the float model, the change with its interval, and how far outputs (before the temperature) agree."""
    groups = [dataset.groups[i] for i in after.indices]
    p, q, decided = before.probabilities, after.probabilities, (before.decided, after.decided)
    same = decided[0] == decided[1]
    raw = (metrics.probabilities(out.logits, dataset.multilabel) for out in (before, after))
    told = metrics.assess(p, before.decided, before.labels, groups, dataset.classes, metrics.RESAMPLES)
    return {
        "float": told["metrics"],
        "change": metrics.change(p, q, after.labels, groups, decided, dataset.classes, metrics.RESAMPLES),
        "agreement": float(np.mean(same if same.ndim == 1 else same.all(axis=1))),
        "divergence": simulate.divergence(*raw, dataset.multilabel),
    }


def _print(output: Path, summary: dict[str, Any]) -> None:
    told, size = summary["method"], summary["bytes"]
    compared = told["compared"]["test"]
    columns = {"float": compared["float"], "int8": summary["metrics"]["test"], "change": compared["change"]}
    report.print_results(f"{output}, test split", columns)
    print(
        f"same decision for {100 * compared['agreement']:.1f} % of the images; divergence {compared['divergence']:.2e} nats; "
        f"weights {size['arrays']:,} bytes of {size['float32']:,} ({size['arrays'] / size['float32']:.3f}x), "
        f"checkpoint on disk {size['checkpoint']:,}"
    )
    if told["float_layers"]:
        print(f"kept in float: {', '.join(told['float_layers'])}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(__doc__, "python -m vitft_jax.quantize --workdir runs/lora --output runs/lora_int8")
    switch = argparse.BooleanOptionalAction
    default = Options()
    arguments.add_argument("--workdir", required=True, type=Path, help="the folder of a trained run")
    arguments.add_argument("--output", required=True, type=Path, help="the folder to make")
    arguments.add_argument(
        "--images", type=int, default=default.images, help="calibration images (default: %(default)s)"
    )
    arguments.add_argument(
        "--calibration",
        default="",
        help="folder, CSV table or .npz file of which the training split calibrates (default: the run's)",
    )
    arguments.add_argument("--smooth", action=switch, default=True, help="smoothing folds with a search for alpha")
    arguments.add_argument("--clip", action=switch, default=True, help="search for where kernels saturate")
    arguments.add_argument("--correct", action=switch, default=True, help="bias correction")
    arguments.add_argument("--static", default="", help="static ranges: mse, max or a percentile (default: per token)")
    arguments.add_argument("--bits", type=int, default=default.bits, help="of kernels, 8 or 4 (default: %(default)s)")
    arguments.add_argument("--weight_only", action="store_true", help="activations stay in float")
    arguments.add_argument("--attention", action="store_true", help="also the products of attention in int8")
    arguments.add_argument(
        "--skip_layers", default=default.skip_layers, help="regex on layers that stay in float (default: %(default)s)"
    )
    arguments.add_argument(
        "--max_drop", type=float, help="points that validation accuracy may fall; sensitive layers stay in float for it"
    )
    arguments.add_argument(
        "--sensitivity_images",
        type=int,
        default=default.sensitivity_images,
        help="images on which each layer is left out once, 0 for not (default: %(default)s)",
    )
    f = arguments.parse_args(argv)
    recipe = Recipe(f.smooth, f.clip, f.correct, f.static)
    options = Options(
        recipe,
        f.bits,
        f.weight_only,
        f.attention,
        f.skip_layers,
        f.images,
        f.calibration,
        f.max_drop,
        f.sensitivity_images,
    )
    quantize(f.workdir, f.output, options)


if __name__ == "__main__":
    cli.main(main)
