"""Our own steps: those that `vitft_jax.train` and `vitft_jax.evaluate` run."""

import argparse
from typing import Any

import contest
import jax
import jax.numpy as jnp
import numpy as np

from contestants import (
    ADALORA,
    ALPHA,
    BATCHES_AT_ONCE,
    CLASSES,
    FORWARD,
    LEARNING_RATE,
    RANGE,
    RANK,
    SKIP,
    STATIC,
    STEPS,
    Built,
    Label,
    images_of,
)  # fmt: skip
from vitft_jax import config as configs
from vitft_jax import data, methods, optim, quantizer, run, runtime, step, tree, vit
from vitft_jax.build import build as build_run
from vitft_jax.methods import quant


def build(who: Label, options: argparse.Namespace) -> Built:
    """A forward pass, a train step, or what the input pipeline does."""
    contest.imported()
    runtime.start()
    if who.task == "input":
        return default_run(who, options)
    program, trainable, frozen, batch = prepared(who, options)
    base = tree.nbytes(frozen) / 1e6
    facts = {"megabytes": base + tree.nbytes(trainable) / 1e6, "frozen_megabytes": base}
    if who.task in FORWARD:
        images = batch["image"]
        return Built(lambda: jax.block_until_ready(step.eval_step(trainable, frozen, images, program=program)), facts)
    holder = [step.init_state(program, trainable)]

    def turn() -> None:
        holder[0], _ = step.train_step(holder[0], frozen, batch, program=program)
        jax.block_until_ready(holder[0])

    return Built(turn, facts)


def prepared(who: Label, options: argparse.Namespace) -> tuple[step.Program, tree.Tree, tree.Tree, step.Batch]:
    """Program, what trains, what is frozen, and a batch."""
    config, method, model = our_model(who, options)
    size, rows = options.size, images_of(who.task, options.batch)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    variables = _with_ranges(variables) if who.name == STATIC else method.prepare(variables)
    trains = "" if who.task in ("full", "qat") else "head"
    trainable, frozen = tree.split(variables, lambda name: name.startswith(method.collections) or trains in name)
    program = step.Program(model, method, optim.optimizer(config, method, STEPS), (0.5,) * 3, (0.5,) * 3)
    images = np.random.default_rng(0).integers(0, 255, (rows, size, size, 3), np.uint8)
    return program, trainable, frozen, {"image": images, "label": np.arange(rows) % CLASSES}


def _with_ranges(variables: methods.Variables) -> methods.Variables:
    """Kernels in integers and some static range for each layer, as `vitft_jax.quantize --static` leaves them."""
    kernels = {path: tree.flatten(variables["params"])[f"{path}/kernel"] for path in quant.layers(variables)}
    whole = {path: quantizer.quantise_kernel(kernel) for path, kernel in kernels.items()}
    return quant.insert(variables, whole, {path: jnp.float32(RANGE) for path in whole})


def our_model(who: Label, options: argparse.Namespace) -> tuple[configs.Config, methods.Method, vit.ViT]:
    """The config of a contestant of ours, its method and its model."""
    config = configs.default()
    overrides = SKIP.get(who.name, ())
    configs.override(config, overrides)
    quantised = who.name in ("ours", STATIC) and (who.task.startswith("int8") or who.task == "qat")
    adapter = ("adalora",) if who.task == "adalora" and who.name == "ours" else ("lora",) * who.task.endswith("lora")
    config.methods = ("quant",) * quantised + adapter + ("skip",) * bool(overrides)
    config.quant.base = "float" if who.task == "qat" else "int8"
    config.quant.static = who.name == STATIC
    config.lora.rank, config.lora.alpha, config.train.lr = RANK, ALPHA, LEARNING_RATE
    if who.task == "qat":
        config.train.trainable = "."
    if who.task == "adalora":
        config.lora.rank, config.lora.alpha, config.lora.targets = ADALORA["init_r"], ADALORA["lora_alpha"], "qkv"
        config.adalora.init_r, config.adalora.target_r = ADALORA["init_r"], ADALORA["target_r"]
    method = methods.load(config)
    model = vit.ViT(
        **vit.VARIANTS[options.model],
        classes=CLASSES,
        dtype=jnp.dtype(who.dtype),
        dot_general_cls=method.dot_general_cls,
        attend=method.attend,
        select=method.select,
    )
    return config, method, model


def default_run(who: Label, options: argparse.Namespace) -> Built:
    """Batches from the input pipeline of the default run, or its LoRA step on one, `BATCHES_AT_ONCE` times."""
    config = configs.default()
    config.methods, config.train.batch_size = ("lora",), options.batch
    config, source = run.resolve(config)
    dataset = data.load(config.data, seed=0)
    dataset.images.check()  # decodes the images and keeps them, as before training
    batches = data.train_batches(
        dataset,
        batch_size=options.batch,
        image_size=config.data.image_size,
        fit=config.data.fit,
        augment=config.augment,
        seed=0,
    )
    if who.name == "ours":
        return Built(lambda: [next(batches) for _ in range(BATCHES_AT_ONCE)], {})
    built = build_run(config, dataset, source)
    batch: dict[str, Any] = {key: value for key, value in next(batches).items() if key != "index"}
    batches.close()
    holder = [step.init_state(built.program, built.trainable)]

    def turn() -> None:
        for _ in range(BATCHES_AT_ONCE):
            holder[0], _ = step.train_step(holder[0], built.frozen, batch, program=built.program)
        jax.block_until_ready(holder[0])

    return Built(turn, {})
