"""ONNX Runtime, on the model that torch exports, in float32 and quantised by its own tools, and on the graphs of ours."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import contest

from contestants import CLASSES, RANGE, Built, Label


def build(who: Label, options: argparse.Namespace) -> Built:
    """A forward pass of the peer's graph ('onnx'), or of one of ours."""
    return peer(who, options) if who.name == "onnx" else exported(who, options)


def peer(who: Label, options: argparse.Namespace) -> Built:
    """The torch model by ONNX Runtime's own tools: exported, prepared, and for int8 quantised dynamically.

    Its graph computes the whole last block; ours only what the head reads of it, 7 % of the work less at 12 blocks.
    """
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from contestants import torch_peers

    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size)
    model = torch_peers.network(who, options).eval()
    contest.imported()
    with tempfile.TemporaryDirectory() as folder:
        path, prepared, int8 = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8"))
        torch.onnx.export(model, (images,), path, dynamo=False)
        if who.task == "int8":
            quant_pre_process(path, prepared)
            quantize_dynamic(prepared, int8, weight_type=QuantType.QInt8)
            path = int8
        return session(path.read_bytes(), images.numpy())


def exported(who: Label, options: argparse.Namespace) -> Built:
    """Our ONNX graph: float32, or int8 with dynamic or static ranges."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vitft_jax import quantizer, tree, vit
    from vitft_jax.export import onnx_graph
    from vitft_jax.methods import quant

    contest.imported()
    size = options.size
    model = vit.ViT(**vit.VARIANTS[options.model], classes=CLASSES)
    params = tree.flatten(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"])
    settings, ranges = quant.Settings(base="int8", static=who.name == "static"), {}
    for path in [n.removesuffix("/kernel") for n in params if n.endswith("/kernel")]:
        if who.name != "float32" and settings.converts(path):
            params[f"{path}/kernel"], scale = quantizer.quantise_kernel(params[f"{path}/kernel"])
            ranges |= {f"{path}/quant/scale": scale, f"{path}/quant/bound": jnp.float32(RANGE)}
    variables = {"params": tree.unflatten(params), quant.COLLECTION: tree.unflatten(ranges)}
    proto = onnx_graph.build(
        model, variables, size, (0.5,) * 3, (0.5,) * 3, settings=None if who.name == "float32" else settings
    )
    images = np.random.default_rng(0).integers(0, 255, (options.batch, size, size, 3), np.uint8)
    return session(proto.SerializeToString(), images)


def session(model: bytes, images: Any) -> Built:
    """A step of ONNX Runtime on as many threads as there are cores."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = len(os.sched_getaffinity(0))
    opened = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    feed = {opened.get_inputs()[0].name: images}
    return Built(lambda: opened.run(None, feed), {"megabytes": len(model) / 1e6})
