"""Memory and time of a training step against everything that makes it larger, as Markdown tables on the screen.

    python scripts/scaling.py                                  # all tables, memory only: nothing runs, so any size fits
    python scripts/scaling.py batch remat --method full
    python scripts/scaling.py devices --time                   # also the time of a step, on a quiet machine
    python scripts/scaling.py --model vit_base_patch16 --batch 32 --dtype bfloat16

Bytes are those that one device holds, from the memory analysis of the compiled step: `base` (frozen weights), `state` (what
trains, with its optimiser state), `temporaries` (what forward and backward pass keep), and `peak`, their sum with the batch.
Devices are virtual ones of the CPU, which share its cores: their bytes are those of as many real ones, their time is not.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

CLASSES, DEVICES = 3, 8
TABLES: dict[str, tuple[dict[str, Any], ...]] = {
    "batch": tuple({"batch": n} for n in (4, 8, 16, 32)),
    "tokens": tuple({"size": n} for n in (112, 224, 448)),
    "rank": tuple({"rank": n} for n in (1, 8, 64)),
    "model": tuple({"model": f"vit_{name}_patch16"} for name in ("tiny", "small", "base", "large")),
    "accumulate": tuple({"accumulate": n} for n in (1, 2, 4)),
    "remat": tuple({"remat": name} for name in ("none", "dots", "full")),
    "devices": (
        {"devices": 1},
        *({"devices": n, "fsdp": fsdp} for fsdp in (False, True) for n in (2, 4, 8)),
        {"devices": 8, "fsdp": True, "remat": "full"},
        *({"devices": 1, "parallel": n} for n in (2, 3)),
    ),
}
"""What each table changes; each has a row for every method."""


@dataclass(frozen=True)
class Setting:
    """A training step.

    Attributes:
        model: A key of `vit.VARIANTS`.
        method: 'full', or a method over frozen weights.
        size: Side of the images, pixels.
        batch: Images per step, over all devices.
        rank: Of the adapters.
        devices: On the axis `data`.
        parallel: Devices on the axis `model`.
        fsdp: As ``mesh.fsdp``.
        remat: As the config's.
        accumulate: As ``train.accumulate``.
        dtype: As the config's.
    """

    model: str = "vit_small_patch16"
    method: str = "lora"
    size: int = 224
    batch: int = 8
    rank: int = 8
    devices: int = 1
    parallel: int = 1
    fsdp: bool = False
    remat: str = "none"
    accumulate: int = 1
    dtype: str = "float32"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    base: int
    state: int
    temporaries: int
    peak: int


def shapes(setting: Setting) -> tuple[Any, tuple[Any, Any, Any]]:
    """The program of a step, and the shapes of its state, frozen variables and batch, each with where it lies."""
    import jax
    import jax.numpy as jnp

    from vitft_jax import config as configs
    from vitft_jax import methods, optim, sharding, step, tree, vit

    config = configs.default()
    config.methods = () if setting.method == "full" else (setting.method,)
    config.lora.rank = config.adalora.init_r = setting.rank
    config.adalora.target_r = max(1, setting.rank // 2)
    config.mesh.update(data=setting.devices, model=setting.parallel, fsdp=setting.fsdp)
    method = methods.load(config)
    layout = sharding.layout(config, method.sharding)
    model = vit.ViT(
        **vit.VARIANTS[setting.model],
        classes=CLASSES,
        dtype=jnp.dtype(setting.dtype),
        dot_general_cls=layout.products(method.dot_general_cls),
        attend=method.attend,
        select=method.select,
        remat=setting.remat,
    )
    half = (0.5, 0.5, 0.5)
    tx = optim.optimizer(config, method, 1000)
    program = step.Program(model, method, tx, half, half, accumulate=setting.accumulate, layout=layout)
    images = jax.ShapeDtypeStruct((1, setting.size, setting.size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: method.prepare(model.init(jax.random.key(0), x)), images)
    trains = ("params",) if setting.method in ("full", "quant") else ("params/head", *method.collections)
    trainable, frozen = tree.split(variables, lambda name: name.startswith(trains))
    state = jax.eval_shape(lambda t: step.State(jnp.int32(0), t, program.tx.init(t)), trainable)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (setting.batch, setting.size, setting.size, 3), jnp.uint8, sharding=layout.by_rows
        ),
        "label": jax.ShapeDtypeStruct((setting.batch,), jnp.int32, sharding=layout.by_rows),
    }
    return program, (layout.shapes(state), layout.shapes(frozen), batch)


def memory(setting: Setting) -> Memory:
    """What a compiled step holds on one device."""
    import jax

    from vitft_jax import step

    program, (state, frozen, batch) = shapes(setting)
    found = step.train_step.lower(state, frozen, batch, program=program).compile().memory_analysis()

    def here(arrays: Any) -> int:
        return sum(a.dtype.itemsize * _product(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(arrays))

    arguments = found.argument_size_in_bytes
    peak = arguments + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(arguments - here(state) - here(batch), here(state), found.temp_size_in_bytes, peak)


def seconds(setting: Setting, steps: int = 5) -> float:
    """Median time of a step on numbers drawn at random, compilation left out."""
    import jax
    import jax.numpy as jnp

    from vitft_jax import runtime, step

    program, wanted = shapes(setting)
    keys = iter(range(10**6))

    def draw(a: Any) -> Any:
        if jnp.issubdtype(a.dtype, jnp.floating):
            return 0.02 * jax.random.normal(jax.random.key(next(keys)), a.shape, a.dtype)
        return jnp.ones(a.shape, a.dtype)

    (state, frozen, batch) = jax.jit(
        lambda: jax.tree.map(draw, wanted), out_shardings=jax.tree.map(lambda a: a.sharding, wanted)
    )()
    times = []
    for i in range(steps + 1):
        started = time.perf_counter()
        state, values = step.train_step(state, frozen, batch, program=program)
        jax.block_until_ready((state, values))
        if i:
            times.append(time.perf_counter() - started)
        else:
            runtime.release()  # compilation leaves much behind
    return statistics.median(times)


def table(name: str, base: Setting, methods: list[str], timed: bool) -> list[str]:
    """The lines of a table."""
    keys = list(dict.fromkeys(key for change in TABLES[name] for key in change))
    head = [*keys, "method", "base MiB", "state MiB", "temporaries MiB", "peak MiB", *["ms a step"] * timed]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(keys)} --- |{' ---: |' * (len(head) - len(keys) - 1)}"]
    for method in methods:
        for change in TABLES[name]:
            setting = replace(base, method=method, **change)
            found = memory(setting)
            cells = [str(getattr(setting, key)) for key in keys] + [method]
            cells += [f"{n / 2**20:.1f}" for n in (found.base, found.state, found.temporaries, found.peak)]
            if timed:
                cells.append(f"{1000 * seconds(setting):.0f}")
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1] if len(lines) > 3 else "\n".join(lines), flush=True)
    return lines


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("tables", nargs="*", default=list(TABLES), help=f"some of {', '.join(TABLES)}; default: all")
    arguments.add_argument("--time", action="store_true", help="also run the steps; needs the memory that they say")
    arguments.add_argument("--method", action="append", help="full, lora, adalora, quant, ...; may be repeated")
    for name, default in vars(Setting()).items():
        if name not in ("method", "fsdp"):
            arguments.add_argument(f"--{name}", type=type(default), default=default)
    arguments.add_argument("--fsdp", action="store_true")
    options = arguments.parse_args()
    if unknown := [name for name in options.tables if name not in TABLES]:
        arguments.error(f"unknown table {unknown[0]!r}; choose from {', '.join(TABLES)}")
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

    import jax

    from vitft_jax import report, runtime
    from vitft_jax.errors import InputError, nearest
    from vitft_jax.vit import VARIANTS

    if options.model not in VARIANTS:
        raise InputError(f"--model {options.model}; {nearest(options.model, VARIANTS)}")
    runtime.start()
    base = Setting(**{name: getattr(options, name) for name in vars(Setting()) if name != "method"})
    print(f"{base.model}, {base.size} px, batch {base.batch}, rank {base.rank}, {base.dtype}, remat {base.remat}")
    print(f"jax {jax.__version__}, {report.cpu()}")
    for name in options.tables:
        print(f"\n{name}\n")
        table(name, base, options.method or ["full", "lora"], options.time)


if __name__ == "__main__":
    from vitft_jax import cli

    cli.main(main)
