"""Exports runs to every format, opens what came out in the library it is for, and compares with our own predictions.

    python scripts/round_trip.py runs/busi_lora_qkv_0 runs/busi_int8/busi_lora_qkv_0_all-of-them --output exported

Prints a table: on the images of the test split, the largest difference of a probability, the share of images with the same
decision, the accuracy, and the size of the export. A format that cannot express a run says why. transformers and timm read the
image files themselves; the others get the pixels that `vitft_jax.load(RUN).prepare` makes. Needs the extra `interop`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import vitft_jax
from vitft_jax import cli, run, runtime
from vitft_jax.errors import InputError
from vitft_jax.export import FORMATS, export
from vitft_jax.predictor import Predictor

BATCH = 16
Opened = Callable[[Sequence[Image.Image], np.ndarray], np.ndarray]
"""Takes images as they are and as uint8 pixels `(n, S, S, 3)`; returns probabilities `(n, C)`."""


def transformers_(folder: Path, model: Predictor) -> Opened:
    """The pipeline, with the image processor that resizes as PIL does."""
    from transformers import AutoImageProcessor, pipeline

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    classify = pipeline("image-classification", model=str(folder), image_processor=processor)

    def probabilities(images: Sequence[Image.Image], _: np.ndarray) -> np.ndarray:
        said = classify(list(images), top_k=len(model.classes))
        scores = [{line["label"]: line["score"] for line in lines} for lines in said]
        return np.array([[score[name] for name in model.classes] for score in scores])

    return probabilities


def timm_(folder: Path, model: Predictor) -> Opened:
    """`create_model` and the transform of its config."""
    import timm
    import torch

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))

    def probabilities(images: Sequence[Image.Image], _: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = network(torch.stack([transform(image) for image in images]))
        return (logits.sigmoid() if model.multilabel else logits.softmax(-1)).numpy()

    return probabilities


def peft_(folder: Path, model: Predictor) -> Opened:
    """The adapter on its base in transformers; its logits are those before the temperature."""
    import torch
    import transformers
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = transformers.AutoConfig.from_pretrained(base, num_labels=len(model.classes))
    network = transformers.AutoModelForImageClassification.from_pretrained(
        base, config=config, ignore_mismatched_sizes=True
    )
    network = PeftModel.from_pretrained(network, folder).eval()
    mean, std = (np.float32(getattr(model.program, name)) for name in ("mean", "std"))

    def probabilities(_: Sequence[Image.Image], pixels: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
        with torch.inference_mode():
            logits = network(pixel_values=inputs).logits.numpy()
        return model.decision.probabilities(logits, model.multilabel)

    return probabilities


def onnx_(folder: Path, _: Predictor) -> Opened:
    """ONNX Runtime with its defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda _, pixels: session.run(["probabilities"], {"images": pixels})[0]


def stablehlo_(folder: Path, _: Predictor) -> Opened:
    """The program, by jax alone."""
    import jax.export

    program = jax.export.deserialize(bytearray((folder / "model.jax").read_bytes()))
    return lambda _, pixels: np.asarray(program.call(pixels))


LIBRARIES = {
    "hf": ("transformers", transformers_),
    "timm": ("timm", timm_),
    "peft": ("PEFT", peft_),
    "onnx": ("ONNX Runtime", onnx_),
    "stablehlo": ("jax", stablehlo_),
}


def rows(workdir: Path, output: Path, formats: Sequence[str]) -> list[str]:
    """Lines of the table for one run."""
    folder, model = run.Folder(workdir), vitft_jax.load(workdir)
    dataset = folder.dataset(folder.config())
    indices = dataset.indices("test")
    parts = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    images = [[dataset.images[i].convert("RGB") for i in part] for part in parts]
    pixels = [np.stack([model.prepare(image) for image in part]) for part in images]
    ours, labels = np.concatenate([model.probabilities(part) for part in pixels]), dataset.labels[indices]

    def cells(p: np.ndarray) -> list[str]:
        same, right = model.decide(p) == model.decide(ours), model.decide(p) == labels
        shares = [np.mean(x if x.ndim == 1 else x.all(axis=1)) for x in (same, right)]
        return [f"{np.abs(p - ours).max():.1e}", f"{100 * shares[0]:.1f} %", f"{shares[1]:.3f}"]

    lines = [f"| {workdir.name} | our own | | | {cells(ours)[-1]} | |"]
    for name in formats:
        place = output / f"{workdir.name}_{name}"
        try:
            export(workdir, place, name)
        except InputError as error:
            lines.append(f"| | {name}: {error} | | | | |")
            continue
        library, opens = LIBRARIES[name]
        opened = opens(place, model)
        p = np.concatenate([opened(*part) for part in zip(images, pixels, strict=True)])
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 1e6
        lines.append(f"| | {name}, in {library} | {' | '.join(cells(p))} | {size:.1f} |")
    return lines


def main() -> None:
    """Command line."""
    runtime.start()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path)
    arguments.add_argument("--output", required=True, type=Path, help="folder of the exports")
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    options = arguments.parse_args()
    print("| run | export | largest difference of a probability | same decision | test accuracy | MB |")
    print("|---|---|---|---|---|---|")
    for workdir in options.runs:
        print("\n".join(rows(workdir, options.output, options.formats)), flush=True)


if __name__ == "__main__":
    cli.main(main)
