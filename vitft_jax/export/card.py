"""The `README.md` of an exported model: how to open it, where it differs from the run, and the model card of the run."""

import json
from pathlib import Path

from vitft_jax import hf_names, model_card, report
from vitft_jax.export.source import Source

_LIBRARIES = {"hf": "transformers", "timm": "timm", "peft": "peft", "onnx": "onnx", "stablehlo": "jax"}
_OPEN = {
    "hf": """from transformers import AutoImageProcessor, pipeline

processor = AutoImageProcessor.from_pretrained("DIR", backend="pil")  # the default one rounds pixels otherwise
classify = pipeline("image-classification", model="DIR", image_processor=processor)
print(classify("image.png"))""",
    "hf, pad": """import torch
import vitft_jax
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("DIR").eval()
pixels = (vitft_jax.load("DIR").prepare(image) / 255 - {mean}) / {std}
inputs = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
probabilities = model(pixel_values=inputs).logits.{read}""",
    "timm": """import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(image.convert("RGB"))[None]).{read}""",
    "onnx": """import onnxruntime

model = onnxruntime.InferenceSession("DIR/model.onnx")
logits, probabilities = model.run(None, {{"images": images}})  # uint8 (n, {size}, {size}, 3)""",
    "stablehlo": """import jax.export
import numpy as np

model = jax.export.deserialize(bytearray(open("DIR/model.jax", "rb").read()))
probabilities = np.asarray(model.call(images))  # uint8 (n, {size}, {size}, 3)""",
    "peft": """from peft import PeftModel
from transformers import {architecture}
{imported}
classes = {classes!r}
base = {architecture}.from_pretrained(
    {base},
    id2label=dict(enumerate(classes)),
    label2id={{name: i for i, name in enumerate(classes)}},
    problem_type="{problem}_label_classification",
    dtype="float32",  # else that of the file, which may be float16
    ignore_mismatched_sizes=True,
)
model = PeftModel.from_pretrained(base, "DIR").eval()""",
}


def write(source: Source, folder: Path, format: str, notes: list[str]) -> None:
    """Writes the file."""
    task, weights, program = source.best.task, source.best.built.weights, source.best.built.program
    bundled = weights.source == "bundled"
    base = "BUNDLED" if bundled else json.dumps(weights.source)
    padded = format == "hf" and source.best.config.data.fit == "pad"
    code = _OPEN["hf, pad" if padded else format].format(
        read="sigmoid()" if task.multilabel else "softmax(-1)",
        size=source.best.config.data.image_size,
        mean=list(program.mean),
        std=list(program.std),
        architecture=hf_names.architecture(source.architecture) if format == "peft" else "",
        imported="from vitft_jax.pretrained import BUNDLED\n" if bundled else "",
        base=base + (f', revision="{weights.revision}"' if weights.revision else ""),
        classes=list(task.classes),
        problem="multi" if task.multilabel else "single",
    )
    front, body = _card(source.workdir)
    front = [f"library_name: {_LIBRARIES[format]}", *(line for line in front if not line.startswith("library_name:"))]
    if not any(line.startswith("pipeline_tag:") for line in front):
        front.append("pipeline_tag: image-classification")
    parts = ["---", *front, "---", "", "# Open it", "", "```python", code, "```", ""]
    parts += ["# What to know", "", *(f"- {note}" for note in notes), ""] if notes else []
    report.write_text(folder / "README.md", "\n".join([*parts, body]))


def _card(workdir: Path) -> tuple[list[str], str]:
    """The front matter's lines and the body of a run's model card: the one in its folder, which people edit, or a fresh one."""
    file = workdir / "MODEL_CARD.md"
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
    else:
        text = model_card.render(workdir)
    if not text.startswith("---\n"):
        return [], text
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    return front.splitlines(), body
