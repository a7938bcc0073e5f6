"""ONNX, for ONNX Runtime and whatever else reads it: `model.onnx`, uint8 pixels in, probabilities out; see `onnx_graph`.

A run that `vitft_jax.quantize` made keeps its integers, any other is in float32. Token skipping is kept.
"""

from dataclasses import asdict
from pathlib import Path

import jax

from vitft_jax import exported
from vitft_jax.errors import InputError
from vitft_jax.export import onnx_graph
from vitft_jax.export.source import Options, Source
from vitft_jax.methods import quant

FILE = "model.onnx"
_MOST = 2**31 - 2**20  # bytes of a file of protocol buffers, with room for the nodes
_RESIZE = {
    "squash": "the whole image, whatever its shape",
    "crop": "the largest square in its middle",
    "pad": "the whole image in its shape, centred on black",
}


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Writes the graph, with what it is in its metadata.

    Raises:
        InputError: The run multiplies in int8 and was not made by `vitft_jax.quantize`, or its attention does; the model is
            too large for a file; or the package onnx is missing.
    """
    best, about = source.best, source.about("onnx")
    program, size = best.built.program, about.image_size
    if "quant" not in best.config.methods or "quant" in source.without:
        variables, settings = {"params": best.built.merged(best.trainable)}, None
    elif best.built.whole is None:
        raise InputError(
            f"--workdir {source.workdir}: trains in int8, and its kernels are not stored so. First: python -m "
            f"vitft_jax.quantize --workdir {source.workdir} --output {source.workdir}_int8 --no-smooth --no-clip "
            "--no-correct; and export that"
        )
    else:
        variables, settings = best.trainable, quant.settings_of(best.config)
    variables = jax.device_get(variables)
    if sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) > _MOST:
        raise InputError(
            f"--workdir {source.workdir}: more than the 2 GB that an ONNX file can hold; quantise it first"
        )
    model = source.model.clone(select=None if "skip" in source.without else program.model.select)
    said = asdict(about) | {
        "input": f"{onnx_graph.INPUT}: uint8 (batch, {size}, {size}, 3), RGB, rows from the top; normalised inside",
        "preprocessing": f"8-bit RGB resized to {size} by {size} pixels, bicubic and antialiased as PIL does it, "
        f"fit {about.fit!r}: {_RESIZE[about.fit]}. `vitft_jax.load(FOLDER).prepare(image)` does that",
        "outputs": "logits, and probabilities after the temperature; float32 (batch, classes)",
    }
    proto = onnx_graph.build(
        model,
        variables,
        size,
        program.mean,
        program.std,
        settings=settings,
        temperature=source.decision.temperature,
        multilabel=program.multilabel,
        metadata=said,
    )
    (folder / FILE).write_bytes(proto.SerializeToString())
    exported.write(
        folder,
        about,
        file=FILE,
        opset=onnx_graph.OPSET,
        **{key: said[key] for key in ("input", "preprocessing", "outputs")},
    )
    return source.notes()
