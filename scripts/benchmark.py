"""Times our steps against their peers, side by side in one run.

    python scripts/benchmark.py                                # forward, lora, full: ViT-S/16, 224 px, batch 8, float32
    python scripts/benchmark.py lora --batch 16 --rounds 15
    python scripts/benchmark.py attention gelu linear matmul   # a part of one layer; linear is the first MLP layer, forward and
                                                               # backward, matmul its product x @ W alone
    python scripts/benchmark.py skip                           # token skipping: forward at batch 1, 8 and 32, LoRA step at 8

Contestants are processes that take turns (see contest.py). A row gives the median images per second with its quartiles, the
ratio to the peer (median over rounds, quartiles), the peak memory of the process in its turns and before them, which includes
compilation, and the start-up: from the start of the process until its first step is done. Peers need the extra `interop`.

In the rows of `skip` the ratio is to our own dense model; beside each setting stands what its FLOPs alone would give.
"""

import argparse
import os
import platform
from importlib import metadata
from typing import Any

from contest import Contestant, Work, race, serve, spread

CLASSES, LEARNING_RATE, RANK, ALPHA = 3, 1e-4, 8, 16.0
ADALORA = {"init_r": 12, "target_r": 8, "lora_alpha": 24}
STEPS = 10_000  # length of the run that a step is taken from: in AdaLoRA's, ranks begin to fall after a tenth
TASKS = {  # task: contestants, ours first
    "forward": ("ours", "transformers", "timm"),
    "lora": ("ours", "peft"),
    "full": ("ours", "transformers"),
    "adalora": ("ours", "lora", "peft"),  # step, all with rank 12 on query, key and value
    "int8": ("ours", "float", "torch", "onnx"),  # forward: int8 kernels, dynamic ranges; our float; peers' dynamic int8
    "export": (
        "dynamic",
        "static",
        "float32",
        "jax",
        "onnx",
    ),  # our ONNX graphs in ONNX Runtime; our int8 in JAX; its own
    "int8_lora": ("ours", "float"),  # LoRA step over an int8 and over a float base
    "attention": ("ours", "autodiff", "torch"),
    "gelu": ("ours", "autodiff", "torch"),
    "linear": ("ours", "autodiff", "torch"),
    "matmul": ("ours", "torch"),
    "input": ("ours", "step"),  # batches of the default run, read and augmented; and the LoRA step that they feed
    **dict.fromkeys(("skip_1", "skip_8", "skip_32", "skip_lora"), ("dense", "prune", "early", "rejoin")),
}
FAMILIES = {"skip": ("skip_1", "skip_8", "skip_32", "skip_lora")}
# EViT prunes inside blocks 3, 6 and 9, before their MLP: its FLOPs lie between those of splits after them and before them.
SKIP = {  # after them; before them; after them, with all tokens back in the last block
    "dense": (),
    "prune": ("skip.layers=3,6,9", "skip.drop_ratio=0.3"),
    "early": ("skip.layers=2,5,8", "skip.drop_ratio=0.3"),
    "rejoin": ("skip.layers=3,6,9", "skip.drop_ratio=0.3", "skip.rejoin=11"),
}


def batch_of(task: str, options: argparse.Namespace) -> int:
    """Images per step: a task may fix it."""
    return {"skip_1": 1, "skip_8": 8, "skip_32": 32, "skip_lora": 8, "input": 20 * options.batch}.get(
        task, options.batch
    )


def our_model(task: str, name: str, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The config of a contestant of ours, its method and its model."""
    import jax.numpy as jnp

    from vitft_jax import config as configs
    from vitft_jax import methods, vit

    config = configs.default()
    overrides = SKIP.get(name, ())
    configs.override(config, overrides)
    first = ("quant",) * (task.startswith("int8") and name == "ours")
    adapter = ("adalora",) if task == "adalora" and name == "ours" else ("lora",) * task.endswith("lora")
    config.methods = first + adapter + ("skip",) * bool(overrides)
    config.quant.base = "int8"
    config.lora.rank, config.lora.alpha, config.train.lr = RANK, ALPHA, LEARNING_RATE
    if task == "adalora":
        config.lora.rank, config.lora.alpha, config.lora.targets = ADALORA["init_r"], ADALORA["lora_alpha"], "qkv"
        config.adalora.init_r, config.adalora.target_r = ADALORA["init_r"], ADALORA["target_r"]
    method = methods.load(config)
    model = vit.ViT(
        **vit.VARIANTS[options.model],
        classes=CLASSES,
        dtype=jnp.dtype(options.dtype),
        dot_general_cls=method.dot_general_cls,
        attend=method.attend,
        select=method.select,
    )
    return config, method, model


def ours(task: str, name: str, options: argparse.Namespace) -> Work:
    """The steps that `vitft_jax.train` and `vitft_jax.evaluate` run."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vitft_jax import optim, runtime, step, tree

    runtime.start()
    config, method, model = our_model(task, name, options)
    size = options.size
    variables = method.prepare(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3))))
    trains = "." if task == "full" else "head"
    trainable, frozen = tree.split(
        variables, lambda name: name.startswith(method.collections) or trains in name or trains == "."
    )
    program = step.Program(model, method, optim.optimizer(config, method, STEPS), (0.5,) * 3, (0.5,) * 3)
    rows = batch_of(task, options)
    images = np.random.default_rng(0).integers(0, 255, (rows, size, size, 3), np.uint8)
    if task in ("forward", "int8", *FAMILIES["skip"][:3]):
        return lambda: jax.block_until_ready(step.eval_step(trainable, frozen, images, program=program))
    batch = {"image": images, "label": np.arange(rows) % CLASSES}
    holder = [step.init_state(program, trainable)]

    def turn() -> None:
        holder[0], _ = step.train_step(holder[0], frozen, batch, program=program)
        jax.block_until_ready(holder[0])

    return turn


def torch_peer(task: str, name: str, options: argparse.Namespace) -> Work:
    """The same work by transformers (with PEFT for adapters), timm or ONNX Runtime."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    from vitft_jax.vit import VARIANTS

    shape = VARIANTS[options.model]
    if name == "timm":
        import timm

        model = timm.create_model(f"{options.model}_{options.size}", num_classes=CLASSES)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=shape["width"],
                num_hidden_layers=shape["depth"],
                num_attention_heads=shape["heads"],
                intermediate_size=shape["hidden"],
                patch_size=shape["patch"],
                image_size=options.size,
                num_labels=CLASSES,
            )
        )
    if task == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        )
    if task == "adalora":
        from peft import AdaLoraConfig, get_peft_model

        targets, warm, last = ["q_proj", "k_proj", "v_proj"], STEPS // 10, STEPS // 5 * 2
        model = get_peft_model(
            model,
            AdaLoraConfig(
                **ADALORA,
                target_modules=targets,
                tinit=warm,
                tfinal=last,
                total_step=STEPS,
                modules_to_save=["classifier"],
            ),
        )
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.arange(options.batch) % CLASSES
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")

    def logits() -> Any:
        out = model(images)
        return out if name == "timm" else out.logits

    if name == "onnx":
        return onnx_peer(model.eval(), images)
    if task == "int8":
        model = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear}, dtype=torch.qint8)
    if task in ("forward", "int8"):
        model.eval()

        def forward() -> None:
            with torch.inference_mode(), cast:
                logits()

        return forward
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01)
    done = 0

    def turn() -> None:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        with cast:
            if task == "adalora":  # called past the outer model, which has no penalty for images
                loss = model.base_model(images, labels=labels).loss
            else:
                loss = torch.nn.functional.cross_entropy(logits().float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if task == "adalora":
            model.base_model.update_and_allocate(done)
            done += 1

    return turn


def onnx_peer(model: Any, images: Any) -> Work:
    """The torch model exported to ONNX and quantised dynamically by ONNX Runtime, with its defaults."""
    import tempfile
    from pathlib import Path

    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = Path(tempfile.mkdtemp())
    torch.onnx.export(model, (images,), folder / "float.onnx", dynamo=False)
    quantize_dynamic(folder / "float.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    return onnx_session(folder / "int8.onnx", images.numpy())


def exported(name: str, options: argparse.Namespace) -> Work:
    """Our ONNX graph in ONNX Runtime with its defaults: float32, or int8 with dynamic or static ranges."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vitft_jax import quantizer, tree, vit
    from vitft_jax.export import onnx_graph
    from vitft_jax.methods import quant

    size = options.size
    model = vit.ViT(**vit.VARIANTS[options.model], classes=CLASSES)
    params = tree.flatten(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"])
    settings, ranges = quant.Settings(base="int8", static=name == "static"), {}
    for path in [n.removesuffix("/kernel") for n in params if n.endswith("/kernel")]:
        if name != "float32" and settings.converts(path):
            params[f"{path}/kernel"], scale = quantizer.quantise_kernel(params[f"{path}/kernel"])
            ranges |= {f"{path}/quant/scale": scale, f"{path}/quant/bound": jnp.float32(4.0)}
    variables = {"params": tree.unflatten(params), quant.COLLECTION: tree.unflatten(ranges)}
    proto = onnx_graph.build(
        model, variables, size, (0.5,) * 3, (0.5,) * 3, settings=None if name == "float32" else settings
    )
    return onnx_session(
        proto.SerializeToString(), np.random.default_rng(0).integers(0, 255, (options.batch, size, size, 3), np.uint8)
    )


def onnx_session(model: Any, images: Any) -> Work:
    """A step of ONNX Runtime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def layer_shape(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """Tokens, width, heads and hidden channels of a layer."""
    from vitft_jax.vit import VARIANTS

    shape = VARIANTS[options.model]
    return (options.size // shape["patch"]) ** 2 + 1, shape["width"], shape["heads"], shape["hidden"]


def torch_layer(task: str, options: argparse.Namespace) -> Work:
    """Forward and backward of a part of a layer by torch; of the product, forward alone."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokens, width, heads, hidden = layer_shape(options)
    torch.set_default_dtype(getattr(torch, options.dtype))
    if task == "matmul":
        x, kernel = torch.randn(options.batch * tokens, width), torch.randn(width, hidden)
        return lambda: x @ kernel
    if task == "gelu":
        x, g = torch.randn(2, options.batch, tokens, hidden)
        x.requires_grad_()
        return lambda: torch.autograd.grad(torch.nn.functional.gelu(x), x, g)
    if task == "linear":
        x, kernel = torch.randn(options.batch * tokens, width), torch.randn(width, hidden)
        x.requires_grad_(), kernel.requires_grad_()
        g = torch.randn(options.batch * tokens, hidden)
        return lambda: torch.autograd.grad(x @ kernel, (x, kernel), g)
    qkv = [torch.randn(options.batch, tokens, width).requires_grad_() for _ in range(3)]
    g = torch.randn(options.batch, tokens, width)

    def turn() -> None:
        split = [x.view(options.batch, tokens, heads, -1).transpose(1, 2) for x in qkv]
        out = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(g.shape)
        torch.autograd.grad(out, qkv, g)

    return turn


def jax_layer(task: str, options: argparse.Namespace, autodiff: bool) -> Work:
    """Forward and backward of a part of a layer: ours, or JAX's own."""
    import jax
    import jax.numpy as jnp

    from vitft_jax import attention, gelu, product, runtime

    runtime.start()
    tokens, width, heads, hidden = layer_shape(options)

    if task == "matmul":
        x, kernel = (jnp.ones(s, options.dtype) for s in ((options.batch * tokens, width), (width, hidden)))
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(x, kernel))

    def attend(*qkv: Any) -> Any:
        split = [x.reshape(options.batch, tokens, heads, -1) for x in qkv]
        if autodiff:
            return jax.nn.dot_product_attention(*split).reshape(qkv[0].shape)
        return attention.attend(*(x.swapaxes(1, 2) for x in split)).swapaxes(1, 2).reshape(qkv[0].shape)

    def activate(x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False) if autodiff else gelu.gelu(x)

    def linear(x: Any, kernel: Any) -> Any:
        return x @ kernel if autodiff else product.matmul(x, kernel)

    rows = (options.batch, tokens)
    layer, *shapes = {
        "attention": (attend, *[(*rows, width)] * 4),
        "gelu": (activate, *[(*rows, hidden)] * 2),
        "linear": (linear, (*rows, width), (width, hidden), (*rows, hidden)),
    }[task]
    *x, g = (jax.random.normal(jax.random.key(i), s, jnp.dtype(options.dtype)) for i, s in enumerate(shapes))

    @jax.jit
    def both(x: Any, g: Any) -> Any:
        out, pull = jax.vjp(layer, *x)
        return out, pull(g)

    return lambda: jax.block_until_ready(both(x, g))


def default_run(name: str, options: argparse.Namespace) -> Work:
    """A batch from the input pipeline of the default run, or its LoRA step on one."""
    import jax

    from vitft_jax import config as configs
    from vitft_jax import data, run, runtime, step

    runtime.start()
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
    if name == "ours":
        return lambda: [next(batches) for _ in range(20)]  # more than are read ahead between turns
    built = run.build(config, dataset, source)
    batch = {key: value for key, value in next(batches).items() if key != "index"}
    batches.close()
    holder = [step.init_state(built.program, built.trainable)]

    def turn() -> None:
        for _ in range(20):
            holder[0], _ = step.train_step(holder[0], built.frozen, batch, program=built.program)
        jax.block_until_ready(holder[0])

    return turn


def contestant(task: str, name: str, options: argparse.Namespace) -> Work:
    """The work of one contestant as a function to be timed."""
    if task == "input":
        return default_run(name, options)
    if task in ("attention", "gelu", "linear", "matmul"):
        return torch_layer(task, options) if name == "torch" else jax_layer(task, options, name == "autodiff")
    if name in ("dynamic", "static", "float32"):
        return exported(name, options)
    if name == "jax":
        return ours("int8", "ours", options)
    mine = name in ("ours", "float", "lora", *SKIP)
    return ours(task, name, options) if mine else torch_peer(task, name, options)


def rows(task: str, options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Runs the contestants of a task in turn; returns the rows of its table."""
    contestants = [Contestant(name, [__file__, task, "--serve", name, *arguments]) for name in TASKS[task]]
    race(contestants, options.rounds)
    mine, found = contestants[0], []
    for c in contestants:
        speeds = [batch_of(task, options) / s for s in c.seconds[task]]
        ratios = [theirs / ours_ for theirs, ours_ in zip(c.seconds[task], mine.seconds[task], strict=True)]
        ratio, label = "" if c is mine else spread(ratios, "x"), c.name
        if c is not mine and mine.name == "dense":  # here it is the first that is to be beaten
            ratio = f"{spread([1 / r for r in ratios], 'x')} the speed of dense"
            label = f"{c.name} (FLOPs: {1 / flops_ratio(task, c.name, options):.2f}x)"
        found.append(
            f"| {task} | {label} | {spread(speeds)} | {ratio} | {c.peak_mib:.0f} | {c.start_mib:.0f} | {c.start_up:.1f} |"
        )
    return found


def flops_ratio(task: str, name: str, options: argparse.Namespace) -> float:
    """FLOPs of a forward pass over those of the dense model."""
    from vitft_jax import flops

    return flops.report(our_model(task, name, options)[2], options.size)["ratio"]


def release() -> None:
    """Gives memory back as train.py does after its first step."""
    from vitft_jax import runtime

    runtime.release()


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("tasks", nargs="*", default=["forward", "lora", "full"], help=", ".join([*TASKS, *FAMILIES]))
    arguments.add_argument("--model", default="vit_small_patch16", help="a key of vit.VARIANTS (plain ViT)")
    arguments.add_argument("--size", type=int, default=224, help="pixels")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--turns", type=int, default=3, help="steps per round; the round counts their median")
    arguments.add_argument("--serve", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    options.tasks = [task for name in options.tasks for task in FAMILIES.get(name, (name,))]
    for task in options.tasks:
        if task not in TASKS:
            arguments.error(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if options.serve:
        task, name = options.tasks[0], options.serve
        tidy = release if name in ("ours", "float", "lora", "jax", *SKIP) else lambda: None
        return serve({task: contestant(task, name, options)}, steps=options.turns, tidy=tidy)

    versions = {
        name: metadata.version(name) for name in ("jax", "torch", "transformers", "peft", "timm", "onnxruntime")
    }
    from vitft_jax.report import cpu

    print(f"{options.model}, {options.size} px, batch {options.batch}, {options.dtype}; {cpu()}")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "\n")
    print("| task | contestant | images/s (quartiles) | ours is faster by | peak MiB | at start-up | start-up s |")
    print("|---|---|---|---|---|---|---|")
    passed = [f"--{key}={getattr(options, key)}" for key in ("model", "size", "batch", "dtype", "turns")]
    for task in options.tasks:
        for row in rows(task, options, passed):
            print(row, flush=True)
    return None


if __name__ == "__main__":
    main()
