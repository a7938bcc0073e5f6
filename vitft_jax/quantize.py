"""Makes an int8 model of a trained run, without training: a new run folder that the other commands treat like any.

Adapters are merged, then the linear layers of the blocks are quantised by the recipe of `vitft_jax.ptq`, calibrated on training
images without augmentation, the run's or others (`--calibration`). The checkpoint holds int8 kernels and their scales in
the place of float ones, and the whole model, so the pretrained weights are not needed any more. `summary.json` compares with
the float model on the same images.

A run that trained with int8 products over a float base (`configs/qat.py`) becomes the model that it trained to be: with its
`config.quant`, its static ranges and none of the stages, unless flags say otherwise. docs/int8.md says what to use when.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vitft_jax import cli, data, decision, methods, metrics, report, run, runtime, tree
from vitft_jax import config as configs
from vitft_jax import step as steps
from vitft_jax.build import Built, build, whole_model
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.evaluate import Outputs, by_part, evaluate_split, fit_decision, outputs
from vitft_jax.folder import Folder
from vitft_jax.lock import Lock
from vitft_jax.methods import quant
from vitft_jax.ptq import calibration, gate, ranges, simulate
from vitft_jax.ptq.gate import Simulation
from vitft_jax.ptq.options import Options, add_flags, changed, check, defaults, trained_in_int8
from vitft_jax.ptq.recipe import run as quantise
from vitft_jax.ptq.simulate import Layer
from vitft_jax.report import page
from vitft_jax.step import Program, State


@dataclass(frozen=True)
class Source:
    """The run to be quantised, and the float model in it.

    Attributes:
        folder: Of the run.
        config: Of the run.
        dataset: Of the run.
        built: Its program.
        trainable: What trained, as in the best checkpoint.
        step: Of that checkpoint.
        plain: The program without methods in its products.
        params: Of `plain`: adapters folded in, kernels in float.
        as_run: Whether the float model is the run's own program; else it is `plain`, because the run multiplies in int8.
    """

    folder: Folder
    config: Config
    dataset: data.Dataset
    built: Built
    trainable: Any
    step: int
    plain: Program
    params: tree.Tree
    as_run: bool

    def outputs(self, dataset: data.Dataset, split: str) -> Outputs:
        """What the float model says about a split."""
        if self.as_run:
            return outputs(self.built.program, self.trainable, self.built.frozen, dataset, split, self.config)
        return outputs(self.plain, {"params": self.params}, {}, dataset, split, self.config)

    def ranges(self) -> dict[str, Array]:
        """The static ranges that the run trained with, by layer."""
        leaves = tree.flatten(tree.join(self.trainable, self.built.frozen).get(quant.COLLECTION, {}))
        bounds = {name.removesuffix("/bound"): leaf for name, leaf in leaves.items() if name.endswith("/bound")}
        return {quant.layer_of(name): leaf for name, leaf in bounds.items()}


def quantize(
    workdir: Path,
    output: Path,
    options: Options | None = None,
    rewrite: Callable[[tree.Tree], tree.Tree] | None = None,
) -> dict[str, Any]:
    """Quantises the best checkpoint of a run into a new run folder; returns the summary.

    Args:
        workdir: Of the run.
        output: The folder to make.
        options: What to do; None is `defaults` of the run's config.
        rewrite: Changes the float parameters first, for studies; the float model of all comparisons is then this one.

    Raises:
        InputError: There is no trained run, or it is quantised already; the output exists, or another process is making it; a
            setting is out of range; the calibration images are too few, cannot be read or have other classes, or
            activations on them are not finite; no layer is left within `max_drop`.
    """
    started = time.perf_counter()
    options = defaults(Folder(workdir).config()) if options is None else options
    if output.exists():
        raise InputError(f"--output {output}: exists already; choose another, or delete it")
    check(options)
    with _workplace(output) as part:
        source = _source(workdir, rewrite)
        config = _config(source.config, options)
        _check_layers(source, quant.settings_of(config), options)
        summary = _quantize(source, part, config, options)
        summary["timing"]["seconds"] = time.perf_counter() - started
        report.write_json(part / "summary.json", summary)
        os.replace(part, output)
    _print(output, summary)
    page.after(output, source.dataset)
    return report.finite(summary)


def _quantize(source: Source, part: Path, config: Config, options: Options) -> dict[str, Any]:
    """Makes the run in the folder `part`, all but its summary, which it returns."""
    settings = quant.settings_of(config)
    images = source.dataset
    if options.calibration:
        images = calibration.images_from(options.calibration, source.dataset, source.config)
    chosen = calibration.subset(images, options.images, source.config.seed)
    _say(f"{source.folder.path}, step {source.step}: calibrating on {len(chosen.indices('train'))} training images")
    seen = calibration.see(source.plain, source.params, chosen, source.config)
    params, layers, told = quantise(source.params, seen, settings, options.recipe, source.ranges(), _say)
    weakest = min(told, key=lambda path: told[path]["snr_db"])
    _say(f"{len(layers)} layers; lowest signal-to-noise {told[weakest]['snr_db']:.1f} dB at {weakest}")

    simulation = Simulation(
        simulate.program(source.plain, layers, settings), params, layers, settings.weight_only, source.config
    )
    sensitivities: dict[str, float] = {}
    if options.sensitivity_images:
        some = calibration.subset(source.dataset, options.sensitivity_images, source.config.seed)
        sensitivities = gate.sensitivity(simulation, source.outputs(some, "train"), some)
        for path, value in sensitivities.items():
            told[path]["sensitivity"] = value
    _say("evaluating the float model")
    before = {split: source.outputs(source.dataset, split) for split in ("val", "test")}

    in_float: list[str] = []
    while True:
        if options.max_drop is not None:
            in_float = gate.within(options.max_drop, in_float, sensitivities, source.dataset, simulation, before["val"])
        folder, built, variables = _write(part, source, config, params, layers, in_float)
        _say("evaluating the int8 model")
        after = {s: outputs(built.program, variables, built.frozen, source.dataset, s, config) for s in before}
        drop = gate.drop(before["val"], after["val"], source.dataset, config.train.thresholds)
        if options.max_drop is None or drop <= options.max_drop:
            break
        in_float = gate.one_more(in_float, sensitivities, options.max_drop)  # the simulation rounds a little otherwise
        shutil.rmtree(part)
    # The logits changed, so temperature and thresholds are fitted again.
    fitted = fit_decision(folder.path, source.dataset, after["val"], config)
    before, after = (
        {split: replace(out, decision=how) for split, out in outs.items()}
        for outs, how in ((before, decision.read(source.folder.path)), (after, fitted))
    )
    results = {s: evaluate_split(folder.path, source.dataset, s, out) for s, out in after.items()}
    return {
        **by_part(results),
        **_of_source(source.folder),
        "best_step": source.step,
        "method": {
            "source": str(source.folder.path.resolve()),
            "float_model": "the run" if source.as_run else "the merged kernels of the run, multiplied in float",
            "options": asdict(options),
            "calibration_images": len(chosen.indices("train")),
            "float_layers": in_float,
            "val_drop": drop,
            "compared": {split: _compare(source.dataset, before[split], after[split]) for split in results},
            "layers": told,
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
        },
        "environment": {**report.environment(), "weights": folder.resolved()["weights"]},
    }


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A path beside the output, of this process alone; whatever is left there at the end goes."""
    folder = output.with_name(output.name + ".part")
    with Lock(folder, "--output"):
        part = folder / "run"
        shutil.rmtree(part, ignore_errors=True)  # of a command that was killed
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()  # where the lock did not make it


def _of_source(folder: Folder) -> dict[str, Any]:
    """What the summary of the float run says of the data, if it is there yet."""
    known = folder.results() if folder.summary.exists() else {}
    return {key: known[key] for key in ("duplicates_across_splits",) if key in known}


def _check_layers(source: Source, settings: quant.Settings, options: Options) -> None:
    """Refuses a model of which nothing is quantised, or of which a range that was trained is missing."""
    paths = [name.removesuffix("/kernel") for name in tree.flatten(source.params) if name.endswith("/kernel")]
    chosen = [path for path in paths if settings.converts(path)]
    if not chosen:
        raise InputError(f"--skip_layers {options.skip_layers!r} skips every linear layer: nothing is quantised")
    trained = source.ranges()
    missing = [path for path in chosen if path not in trained]
    if options.recipe.static == ranges.TRAINED and missing:
        raise InputError(
            f"--static {ranges.TRAINED}: the run trained no static range for {len(missing)} layers, such as {missing[0]}; "
            "use --static mse"
        )


def _source(workdir: Path, rewrite: Callable[[tree.Tree], tree.Tree] | None = None) -> Source:
    folder = Folder(workdir)
    if folder.whole() is not None:
        raise InputError(f"--workdir {workdir}: is quantised already; quantise the run that it was made from")
    config = folder.config()
    config.mesh = configs.default().mesh  # the devices of today
    config, weights = run.resolve(config)
    dataset = folder.dataset(config)
    built = build(config, dataset, weights)
    folder.open(config, dataset, built)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, step = checkpoints.restore_best(built.trainable)
    steps.check_calibrated(built.program, trainable)
    if "quant" in config.methods:
        _say(
            f"{workdir}: trained with int8 products; the float model below is its kernels without them"
            if trained_in_int8(config)
            else f"{workdir}: its base is int8 already ({config.quant.bits} bits): kernels are dequantised, adapters merged, "
            "and the sums quantised again by the flags of this command, not by the config of the run"
        )
    params = built.merged(trainable)
    return Source(
        folder,
        config,
        dataset,
        built,
        trainable,
        step,
        calibration.plain(built.program),
        params if rewrite is None else rewrite(params),
        as_run="quant" not in config.methods and rewrite is None,
    )


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


def _write(
    part: Path, source: Source, config: Config, params: tree.Tree, layers: dict[str, Layer], in_float: list[str]
) -> tuple[Folder, Built, dict[str, Any]]:
    """Writes the run folder but for its summary; returns it with its program and its variables as they are stored."""
    if in_float:
        config = config.copy_and_resolve_references()
        exactly = f"^({'|'.join(map(re.escape, in_float))})$"
        config.quant.skip_layers = "|".join(filter(None, (config.quant.skip_layers, exactly)))
    whole = whole_model(source.built.program, source.built.weights)
    built = build(config, source.dataset, None, whole)
    size = config.data.image_size
    shapes = jax.eval_shape(built.program.model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    kept = {path: layer for path, layer in layers.items() if path not in in_float}
    leaves = tree.flatten(params) | {f"{path}/bias": layer.bias for path, layer in kept.items()}
    variables = quant.insert(
        {"params": tree.unflatten(leaves), quant.COLLECTION: shapes[quant.COLLECTION]},
        {path: layer.kernel for path, layer in kept.items()},
        {path: layer.bound for path, layer in kept.items()} if config.quant.static else None,
    )
    folder = Folder(part)
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
    arguments.add_argument("--workdir", required=True, type=Path, help="the folder of a trained run")
    arguments.add_argument("--output", required=True, type=Path, help="the folder to make")
    add_flags(arguments)
    given = vars(arguments.parse_args(argv))
    workdir, output = given.pop("workdir"), given.pop("output")
    quantize(workdir, output, changed(defaults(Folder(workdir).config()), given))


if __name__ == "__main__":
    cli.main(main)
