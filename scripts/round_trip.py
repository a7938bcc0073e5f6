"""Trains, exports, opens every format in the library that it is for, and prints how far the answers differ.

    python scripts/round_trip.py                                  # trains configs/lora.py on what comes with the package
    python scripts/round_trip.py runs/busi_lora_qkv_[012] runs/busi_int8_[012]

Without runs it fine-tunes the bundled ViT as scripts/demo.py does, and `vitft_jax.quantize` makes two int8 runs of it, all in a
temporary folder like the exports. Runs of one kind of model (float, int8, int8 with static ranges) are pooled in a row: the
largest difference of a probability, images with the same decision, the change of accuracy, the size, and images per second in
batches of 16 after a first one. transformers and timm prepare the images themselves, and their speed is with that; the others
get the pixels that `vitft_jax.load(RUN).prepare` makes. All is compared with our model in float32, but for StableHLO, which
keeps the run's dtype. A row of an int8 model says how far our own answers go apart when the patch embedding changes by a
millionth: rounding makes whole integers of that, so no other arithmetic can be expected to be nearer. The exit code is 1 where
probabilities of a float model differ by more than 1e-4, or fewer than 99.5 % of the decisions of an int8 model are the same.
Needs the extra `interop`.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from PIL import Image

from vitft_jax import cli, data, decision, exported, predictor, run, runtime, tree
from vitft_jax import config as configs
from vitft_jax.errors import InputError, nearest
from vitft_jax.export import export
from vitft_jax.exported import About
from vitft_jax.folder import Folder
from vitft_jax.predictor import Predictor
from vitft_jax.ptq.options import Options
from vitft_jax.ptq.recipe import Recipe
from vitft_jax.quantize import quantize
from vitft_jax.train import train

BATCH = 16
APART, AGREE = 1e-4, 0.995
WIDER = {"transformers": 1e-2, "jax, bfloat16": 5e-2}
"""Bounds where not the model rounds: the plain pipeline of transformers its pixels, and bfloat16 all that it computes."""
SHAKE = 1e-6
"""By what share `shaken` changes a kernel."""
ALL = "all"
CONFIG = Path(__file__).parent.parent / "configs" / "lora.py"
Answer = Callable[[Sequence[Image.Image], np.ndarray], np.ndarray]
"""Takes images as they are and as uint8 pixels `(n, S, S, 3)`; returns probabilities `(n, C)`."""


def pipeline_(folder: Path, about: About) -> Answer:
    """The pipeline as it is."""
    from transformers import pipeline

    return _of_pipeline(pipeline("image-classification", model=str(folder)), about)


def exact_pipeline_(folder: Path, about: About) -> Answer:
    """The pipeline with the image processor that resizes by PIL, as the README.md of an export has it."""
    from transformers import AutoImageProcessor, pipeline

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return _of_pipeline(pipeline("image-classification", model=str(folder), image_processor=processor), about)


def _of_pipeline(classify: Any, about: About) -> Answer:
    def probabilities(images: Sequence[Image.Image], _: np.ndarray) -> np.ndarray:
        said = classify(list(images), top_k=len(about.classes), batch_size=len(images))
        scores = [{line["label"]: line["score"] for line in lines} for lines in said]
        return np.array([[score[name] for name in about.classes] for score in scores])

    return probabilities


def timm_(folder: Path, about: About) -> Answer:
    """`create_model` and the transform of its config."""
    import timm
    import torch

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))

    def probabilities(images: Sequence[Image.Image], _: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = network(torch.stack([transform(image) for image in images]))
        return (logits.sigmoid() if about.multilabel else logits.softmax(-1)).numpy()

    return probabilities


def peft_(folder: Path, about: About) -> Answer:
    """The adapter on its base in transformers; its logits are those before the temperature."""
    import torch
    import transformers
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    config = transformers.AutoConfig.from_pretrained(base, num_labels=len(about.classes))
    network = transformers.AutoModelForImageClassification.from_pretrained(
        base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    network = PeftModel.from_pretrained(network, folder).eval()
    mean, std = np.float32(about.mean), np.float32(about.std)
    size = {"interpolate_pos_encoding": True} if config.image_size != about.image_size else {}

    def probabilities(_: Sequence[Image.Image], pixels: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
        with torch.inference_mode():
            logits = network(pixel_values=inputs, **size).logits.numpy()
        return about.decision.probabilities(logits, about.multilabel)

    return probabilities


def onnx_(folder: Path, _: About) -> Answer:
    """ONNX Runtime with its defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda _, pixels: session.run(["probabilities"], {"images": pixels})[0]


def stablehlo_(folder: Path, _: About) -> Answer:
    """The program, by jax alone."""
    program = jax.jit(jax_export.deserialize(bytearray((folder / "model.jax").read_bytes())).call)
    return lambda _, pixels: np.asarray(program(pixels))


OPENERS = {
    "hf": {"transformers, backend='pil'": exact_pipeline_, "transformers": pipeline_},
    "timm": {"timm": timm_},
    "peft": {"PEFT": peft_},
    "onnx": {"ONNX Runtime": onnx_},
    "stablehlo": {"jax": stablehlo_},
}
"""Formats to the ways in which their users open them."""


@dataclass(frozen=True)
class Row:
    """One run in one program, or several runs pooled.

    Attributes:
        kind: Of model, see `kind_of`.
        format: Of the export.
        library: That opened it.
        apart: Largest difference of a probability from ours.
        images: How many there were.
        same: On how many the decision was ours.
        gained: How many more of them were right than of ours.
        megabytes: Of the export.
        seconds: For all images but the first batch.
        timed: How many these are.
    """

    kind: str
    format: str
    library: str
    apart: float
    images: int
    same: int
    gained: int
    megabytes: float
    seconds: float
    timed: int

    def cells(self) -> str:
        """As a line of the table."""
        speed = f"{self.timed / self.seconds:.0f}" if self.timed else "-"
        return (
            f"| {self.kind} | {self.format} | {self.library} | {self.apart:.1e} | {self.same} of {self.images} | "
            f"{100 * self.gained / self.images:+.2f} | {self.megabytes:.2f} | {speed} |"
        )

    def missed(self) -> str:
        """Which bound is missed; '' where none is."""
        what = f"{self.kind}, {self.format} in {self.library}"
        if self.kind.startswith("int"):
            bad = self.same < AGREE * self.images
            return f"{what}: {self.same} of {self.images} decisions are ours, below {100 * AGREE} %" if bad else ""
        bound = WIDER.get(self.library, APART)
        return f"{what}: a probability differs by {self.apart:.1e}, more than {bound:g}" if self.apart > bound else ""


HEAD = (
    "| model | format | opened with | largest difference of a probability | same decisions | accuracy, points | MB "
    "| images/s |\n|---|---|---|---|---|---|---|---|"
)


def pooled(rows: Iterable[Row]) -> list[Row]:
    """One row for all runs of a kind in a program."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.kind, row.format, row.library)
        if key in found:
            sums = {name: getattr(found[key], name) + getattr(row, name) for name in _SUMS}
            row = replace(found[key], apart=max(found[key].apart, row.apart), **sums)
        found[key] = row
    return list(found.values())


_SUMS = ("images", "same", "gained", "seconds", "timed")


def kind_of(config: configs.Config) -> str:
    """What the rows of a run are called."""
    if "quant" not in config.methods:
        return " + ".join(["float", *(name for name in config.methods if name == "skip")])
    also = {"kernels only": config.quant.weight_only, "static ranges": config.quant.static}
    return ", ".join([f"int{config.quant.bits}", *(name for name, on in also.items() if on)])


def in_dtype(best: run.Best, workdir: Path, dtype: str) -> Predictor:
    """The model of a run, computing in such a dtype."""
    config, program = best.config.copy_and_resolve_references(), best.built.program
    config.train.batch_size = BATCH
    built = replace(best.built, program=replace(program, model=program.model.clone(dtype=jnp.dtype(dtype))))
    return predictor.of_model(config, built, best.trainable, best.task, decision.read(workdir), best.step)


def shaken(best: run.Best) -> run.Best:
    """The same model, the kernel of its patches changed in the last digits, by a normal factor of `SHAKE`."""

    def leaf(name: str, value: Any) -> Any:
        if name != "params/embed/patch/kernel":
            return value
        noise = np.random.default_rng(0).standard_normal(value.shape, np.float32)
        return jnp.asarray(value * (1 + SHAKE * noise), value.dtype)

    frozen = tree.map_named(leaf, best.built.frozen)
    return replace(best, trainable=tree.map_named(leaf, best.trainable), built=replace(best.built, frozen=frozen))


def rows_of(workdir: Path, folder: Path, split: str, formats: Sequence[str]) -> list[Row]:
    """The rows of one run, whose exports come into `folder`; formats that cannot express it are left out, and said."""
    best = run.best(workdir, devices=1)
    config, kind = best.config, kind_of(best.config)
    model = in_float32 = in_dtype(best, workdir, config.dtype)
    if config.dtype != "float32":
        in_float32 = in_dtype(best, workdir, "float32")
    dataset = Folder(workdir).dataset(config)
    indices = np.arange(len(dataset)) if split == ALL else dataset.indices(split)
    parts = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    images = [[dataset.images[i].convert("RGB") for i in part] for part in parts]
    pixels = [np.stack([model.prepare(image) for image in part]) for part in images]
    labels = dataset.labels[indices]
    exact = np.concatenate([in_float32.probabilities(part) for part in pixels])

    def right(p: np.ndarray) -> int:
        return int(_whole(model.decide(p) == labels).sum())

    def row(format: str, library: str, answer: Answer, size: float, ours: np.ndarray) -> Row:
        said, started = [answer(images[0], pixels[0])], time.perf_counter()
        said += [answer(*part) for part in zip(images[1:], pixels[1:], strict=True)]
        seconds, p = time.perf_counter() - started, np.concatenate(said)
        same = int(_whole(model.decide(p) == model.decide(ours)).sum())
        gained, apart = right(p) - right(ours), float(np.abs(p - ours).max())
        return Row(kind, format, library, apart, len(p), same, gained, size, seconds, len(p) - len(said[0]))

    def itself(_: Sequence[Image.Image], batch: np.ndarray) -> np.ndarray:
        return model.probabilities(batch)

    size = tree.nbytes((best.trainable, best.built.frozen)) / 1e6
    rows = [row("the run", f"vitft_jax, {config.dtype}", itself, size, exact)]
    if kind.startswith("int"):
        other = in_dtype(shaken(best), workdir, "float32")
        rows.append(
            row("the run", f"vitft_jax, changed by {SHAKE:g}", lambda _, x: other.probabilities(x), size, exact)
        )
    for format, openers in ((name, OPENERS[name]) for name in formats):
        place = folder / format
        try:
            export(workdir, place, format)
        except InputError as error:
            print(f"{workdir.name}: not as {format}: {error}", flush=True)
            continue
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 1e6
        kept = format == "stablehlo" and config.dtype != "float32"
        ours = np.concatenate([model.probabilities(part) for part in pixels]) if kept else exact
        for name, opener in openers.items():
            name = f"{name}, {config.dtype}" if kept else name
            rows.append(row(format, name, opener(place, exported.read(place)), size, ours))
    return rows


def _whole(equal: np.ndarray) -> np.ndarray:
    """Which images agree in all their labels."""
    return equal if equal.ndim == 1 else equal.all(axis=1)


def made(folder: Path, overrides: Sequence[str]) -> list[Path]:
    """Trains on what comes with the package, and quantises the result twice; returns the three runs."""
    config = configs.load(str(CONFIG), overrides)
    runs = [folder / name for name in ("lora", "lora_int8", "lora_int8_static")]
    train(config, runs[0])
    quantize(runs[0], runs[1], Options())
    quantize(runs[0], runs[2], Options(Recipe(static="mse")))
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(__doc__, "python scripts/round_trip.py runs/busi_lora_qkv_[012] --split all")
    arguments.add_argument("runs", nargs="*", type=Path, help="none: trains one, and makes two int8 runs of it")
    arguments.add_argument("--split", default="test", help=f"{', '.join(data.SPLITS)} or {ALL} (default: %(default)s)")
    arguments.add_argument("--formats", nargs="+", default=list(OPENERS), metavar="FORMAT", help="default: all")
    options, overrides = cli.parse_with_overrides(arguments, argv, "--config.seed=1, of the run that it trains")
    if options.split not in (*data.SPLITS, ALL):
        raise InputError(f"--split {options.split}: {nearest(options.split, (*data.SPLITS, ALL))}")
    if unknown := [name for name in options.formats if name not in OPENERS]:
        raise InputError(f"--formats {unknown[0]}: {nearest(unknown[0], OPENERS)}")
    if options.runs and overrides:
        raise InputError(f"--config.{overrides[0]}: is for the run that is trained here, and runs are given")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        runs = options.runs or made(place, overrides)
        places = (place / f"exports_{i}" for i in range(len(runs)))
        rows = pooled(
            row for pair in zip(runs, places, strict=True) for row in rows_of(*pair, options.split, options.formats)
        )
    print("\n".join([HEAD, *(row.cells() for row in rows)]), flush=True)
    missed = [row.missed() for row in rows if row.format != "the run" and row.missed()]
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    cli.main(main)
