"""A process of its own: the same tiny runs on several meshes of virtual devices, and what each says as a line of JSON.

    python tests/meshes.py METHOD,METHOD:MESH,MESH ... [flags of `processes`]

The runs of `DOUBLE` compute in float64, where sums in another order differ too little to turn an integer over: rounding is no
continuous function, and in float32 one of some 100,000 integers a step lies so near the middle between two that it is turned,
which moves the loss by up to 1e-4.

The method 'memory' says the bytes of a compiled step instead, 'product' what devices say to each other for a product, and
'restored' how a run goes on that was begun on one device.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scaling
from PIL import Image
from support import TINY

from vitft_jax import config as configs
from vitft_jax import data, pretrained, processes, product, quantizer, sharding, step, tree, vit
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.methods import quant
from vitft_jax.ptq import calibration

STEPS, BATCH, SIZE = 20, 8, 16
DOUBLE = ("qat", "static", "int8")
MESHES = {
    "one": {"data": 1, "model": 1, "fsdp": False},
    "data": {"data": 8, "model": 1, "fsdp": False},
    "fsdp": {"data": 8, "model": 1, "fsdp": True},
    "model": {"data": 2, "model": 4, "fsdp": False},
    "wide": {"data": 1, "model": 4, "fsdp": False},
    "all": {"data": 4, "model": 2, "fsdp": True},
    "fsdp 2": {"data": 2, "model": 1, "fsdp": True},
    "fsdp 4": {"data": 4, "model": 1, "fsdp": True},
}


class Noise:
    """Images of noise whose brightness tells the class."""

    def __init__(self, labels):
        self.labels = labels

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        pixels = rng.normal(60 + 60 * self.labels[i], 20, (SIZE, SIZE, 3)).clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8))


def dataset():
    n = 40
    labels = np.arange(n, dtype=np.int32) % 3
    names = tuple(f"{i}.png" for i in range(n))
    splits = ("train",) * (n - 8) + ("val",) * 8
    return data.Dataset(("a", "b", "c"), False, names, labels, names, splits, Noise(labels))


def config_of(method, mesh):
    config = configs.default()
    config.model.pretrained, config.model.name = "", "meshes_tiny"
    config.data.image_size, config.train.batch_size, config.train.steps = SIZE, BATCH, STEPS
    config.train.lr = 1e-3
    config.mesh.update(MESHES[mesh])
    config.adalora.update(init_r=4, target_r=2, t_init=0.2, t_final=0.3, targets="encoder")
    config.lora.update(rank=4, targets="encoder", dropout=0.1 * (method == "lora"))
    config.skip.update(layers=(0,), drop_ratio=(0.4,))
    kind = {
        "full": ((), "."),
        "lora": (("lora",), "^head"),
        "adalora": (("adalora",), "^head"),
        "skip": (("lora", "skip"), "^head"),
        "qat": (("quant",), "."),
        "qat in float32": (("quant",), "."),
        "static": (("quant",), "."),
        "int8": (("quant", "lora"), "^head"),
        "dora": (("dora",), "^head"),
    }[method]
    config.methods, config.train.trainable = kind
    config.dtype = "float64" if method in DOUBLE else "float32"
    if method == "static":
        config.quant.static = True
    if method == "int8":
        config.quant.base = "int8"
    config.train.accumulate = 2 if mesh == "all" and method != "lora" else 1  # else dropout would be another
    return config


def collectives(compiled):
    """What devices say to each other: (result type, operation)."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text())


def memory(mesh):
    """Bytes of a step of a small model on a mesh, and of its frozen leaves by name."""
    setting = scaling.Setting(
        "meshes_tiny", size=SIZE, batch=BATCH, devices=MESHES[mesh]["data"], fsdp=MESHES[mesh]["fsdp"]
    )
    _, (_, frozen, _) = scaling.shapes(setting)
    return dataclasses.asdict(scaling.memory(setting)) | {
        "frozen": {n: a.shape for n, a in tree.flatten(frozen).items()}
    }


def of_product(mesh):
    """Collectives of the backward pass of a product whose rows are cut."""
    config = configs.default()
    config.mesh.update(MESHES[mesh])
    layout = sharding.layout(config)

    def array(sharding, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    where = layout.by_rows, layout.everywhere
    arguments = array(where[0], 8, 5, 32), array(where[1], 32, 64), array(where[0], 8, 5, 64)
    gradients = jax.jit(lambda x, w, g: jax.vjp(product.matmul, x, w)[1](g), out_shardings=where)
    return {"collectives": collectives(gradients.lower(*arguments).compile())}


@functools.cache
def weights():
    """Pretrained weights, on the host."""
    model = {**TINY, "distilled": False, "layer_scale": False, "features": "cls", "eps": 1e-6}
    shapes = jax.eval_shape(vit.ViT(**model, classes=0).init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))[
        "params"
    ]
    rng = np.random.default_rng(0)
    params = {
        name: (name.endswith("scale") + 0.1 * rng.standard_normal(a.shape)).astype(np.float32)
        for name, a in tree.flatten(shapes).items()
    }
    half = (0.5, 0.5, 0.5)
    return pretrained.Pretrained(model, tree.unflatten(params), (), SIZE, half, half, False, "noise", "", "")


def trained(method, mesh):
    """As `_trained`, with 64 bits where `DOUBLE` says so; AQT knows none, so there our own product stands in for it."""
    if method not in DOUBLE:
        return _trained(method, mesh)
    jax.config.update("jax_enable_x64", True)
    try:
        with mock.patch.object(quant, "trained_product", quantizer.trained_product):
            return _trained(method, mesh)
    finally:
        jax.config.update("jax_enable_x64", False)


def _trained(method, mesh):
    """Losses of the steps, what AdaLoRA kept, and how the program looks."""
    config, images = config_of(method, mesh), dataset()
    source = None if method == "full" else weights()  # a whole model is drawn once: to compile that takes seconds
    built = calibration.calibrated(build(config, images, source), images, config)
    program, layout = built.program, built.program.layout
    part, parts = layout.reader
    batches = data.train_batches(
        images, batch_size=BATCH, image_size=SIZE, fit="squash", augment=config.augment, seed=0,
        process_index=part, process_count=parts,
    )  # fmt: skip
    state, losses, before = step.init_state(program, built.trainable), [], step.train_step._cache_size()
    advance, said = functools.partial(step.train_step, program=program), None
    for i in range(STEPS):
        rows = {key: value for key, value in next(batches).items() if key != "index"}
        batch = layout.batch(rows)
        if mesh == "data" and not i:
            advance = step.train_step.lower(state, built.frozen, batch, program=program).compile()
            said = collectives(advance)
        state, values = advance(state, built.frozen, batch)
        losses.append(values["loss"])
    batches.close()
    compilations = step.train_step._cache_size() - before
    told = {
        "losses": [float(loss) for loss in losses],
        "compilations": compilations,
        "collectives": said,
        "layout": {
            name: [str(leaf.sharding.spec), leaf.shape, leaf.addressable_shards[0].data.shape]
            for name, leaf in tree.flatten({"trainable": state.trainable, "frozen": built.frozen}).items()
            if layout.mesh is not None
        },
    }
    masks = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == bool and leaf.ndim == 2]
    return told | {"mask": masks[0].tolist() if masks else None}


def restored(mesh):
    """Losses of the last ten steps of twenty, on one device and on a mesh that reads the checkpoint of the first ten."""
    losses, images = {"one": [], mesh: []}, dataset()
    with tempfile.TemporaryDirectory() as folder:
        for place, found in losses.items():
            config = config_of("lora", place)
            config.train.accumulate = 1
            built = build(config, images, weights())
            state, layout = step.init_state(built.program, built.trainable), built.program.layout
            batches = data.train_batches(
                images, batch_size=BATCH, image_size=SIZE, fit="squash", augment=config.augment, seed=0
            )
            with Checkpoints(Path(folder)) as checkpoints:
                if place != "one":
                    like = state
                    state, loop = checkpoints.restore(like)
                    batches.set_state(loop["input"])
                    there = [
                        a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (state, like)), strict=True)
                    ]
                while int(state.step) < STEPS:
                    batch = layout.batch({key: value for key, value in next(batches).items() if key != "index"})
                    state, values = step.train_step(state, built.frozen, batch, program=built.program)
                    found += [float(values["loss"])] * (int(state.step) > STEPS // 2)
                    if place == "one" and int(state.step) == STEPS // 2:
                        checkpoints.save(state, {"input": batches.get_state()}, None)
            batches.close()
    return {"losses": losses[mesh], "of one": losses["one"], "in place": all(there)}


if __name__ == "__main__":
    vit.VARIANTS["meshes_tiny"] = TINY
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    processes.add_flags(parser)
    flags = parser.parse_args()
    processes.start(flags)
    for runs in flags.runs:
        names, places = (part.split(",") for part in runs.split(":"))
        for method, mesh in itertools.product(names, places):
            found = {"memory": memory, "product": of_product, "restored": restored}.get(
                method, functools.partial(trained, method)
            )
            print(json.dumps({"method": method, "mesh": mesh, **found(mesh)}), flush=True)
