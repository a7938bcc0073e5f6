"""Times our steps against their peers, side by side in one run.

    python scripts/benchmark.py                                # forward, lora, full: ViT-S/16, 224 px, batch 8, float32
    python scripts/benchmark.py inference --json FILE          # every forward pass in one race: float32, bfloat16, int8
    python scripts/benchmark.py lora --batch 16 --rounds 15
    python scripts/benchmark.py attention gelu linear matmul   # a part of one layer; linear is the first MLP layer, forward
                                                               # and backward, matmul its product x @ W alone
    python scripts/benchmark.py skip                           # token skipping: forward at batch 1, 8 and 32, LoRA step at 8
    python scripts/benchmark.py lora --only ours --variant XLA_FLAGS=--xla_cpu_prefer_vector_width=512
    python scripts/benchmark.py lora --only ours --variant PYTHONPATH=OTHER_CHECKOUT

Contestants are processes that take turns (see contest.py); contestants/ says what each is. A row gives the median images per
second with its quartiles; the ratio to the peer (median over rounds, quartiles); the share of the processor's matrix peak; the
start-up, from the start of the process until its libraries are imported and until its first step is done, which includes
compilation; the peak memory of the process in its turns and before them; and the megabytes of its graph or its variables.

The peak is the best of JAX and torch at a square product of 2048 in the same dtype, measured at the beginning of the run (int8:
of JAX). The share is the operations of the step as flops.py counts them, of our own model for all, against that. Our own model
computes in its last block only what the head reads, 7 % of a forward pass less; the peers compute all of it. int8 products
sum in int32, and attention stays in float beside them.

--variant times the first contestant of a task a second time in another environment. Peers need the extra `interop`; what is
missing is named and left out. In the rows of `skip` the ratio is to our own dense model; beside each setting stands what its
FLOPs alone would give.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import contestants
from contest import Contestant, count, quartiles, race, serve, spread
from contestants import GRAPHS, LAYERS, SKIP, SKIP_FORWARD, Label, images_of, layers, parse

from vitft_jax.errors import InputError, nearest

SKIPPING = ("dense", "prune", "early", "rejoin")
TASKS = {  # task: labels of its contestants, the one that is compared with the others first
    "forward": ("ours", "transformers", "compiled", "timm", "onnx"),
    "lora": ("ours", "int8_lora/ours", "peft"),
    "full": ("ours", "qat/ours", "transformers"),
    "adalora": ("ours", "lora", "peft"),  # step, all with rank 12 on query, key and value
    # forward: int8 kernels, with dynamic and with static ranges; our float; peers' dynamic int8
    "int8": ("ours", "ours_static", "float", "torch", "onnx"),
    "export": (
        "dynamic",
        "static",
        "float32",
        "int8/ours",
        "int8/onnx",
    ),  # our ONNX graphs; our int8 in JAX; the peer's
    "inference": (
        "int8/ours",
        "forward/ours",
        "forward/ours:bfloat16",
        "forward/transformers",
        "forward/transformers:bfloat16",
        "forward/compiled",
        "forward/compiled:bfloat16",
        "forward/timm",
        "forward/timm:bfloat16",
        "forward/onnx",
        "int8/torch",
        "int8/onnx",
        "export/float32",
        "export/dynamic",
        "export/static",
    ),
    "int8_lora": ("ours", "float"),  # LoRA step over an int8 and over a float base
    "qat": ("ours", "float"),  # full step, with int8 products and without
    "attention": ("ours", "autodiff", "torch"),
    "gelu": ("ours", "autodiff", "torch"),
    "linear": ("ours", "autodiff", "torch"),
    "matmul": ("ours", "torch"),
    "input": ("ours", "step"),  # batches of the default run, read and augmented; and the LoRA step that they feed
    **dict.fromkeys(SKIP_FORWARD, (*SKIPPING, "evit")),
    "skip_lora": SKIPPING,
}
FAMILIES = {"skip": (*SKIP_FORWARD, "skip_lora")}
PACKAGES = ("jax", "torch", "transformers", "peft", "timm", "onnx", "onnxruntime")
HEAD = (
    "task", "contestant", "images/s (quartiles)", "first is faster by", "of the peak", "imports s", "first step s",
    "peak MiB", "at start-up", "MB",
)  # fmt: skip


def kept(task: str, options: argparse.Namespace) -> list[str]:
    """Labels of the contestants of a task that can run here and were asked for; says which cannot."""
    labels = []
    for label in TASKS[task]:
        who = parse(task, label, options.dtype)
        if options.only and who.name not in options.only and label not in options.only:
            continue
        if missing := contestants.lacks(who):
            print(f"{task}: {label} is left out; it needs {missing}", file=sys.stderr, flush=True)
        else:
            labels.append(label)
    return labels


def run(task: str, labels: Sequence[str], options: argparse.Namespace) -> list[Contestant]:
    """Lets contestants race."""

    def start(label: str, name: str, environment: Mapping[str, str]) -> Contestant:
        passed = [f"--{key}={getattr(options, key)}" for key in ("model", "size", "batch", "dtype", "turns")]
        passed.append(f"--shape={json.dumps(options.shape)}")
        return Contestant(name, [__file__, task, "--serve", label, *passed], environment)

    started = [start(label, label, {}) for label in labels]
    started += [
        start(labels[0], f"{labels[0]} {v}", dict([v.split("=", 1)])) for v in options.variant if task != "peak"
    ]
    race(started, options.rounds)
    return started


def peaks(dtypes: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """The processor's best matrix product by dtype, in GF/s (int8: in billions of such operations)."""
    labels = [f"{name}:{dtype}" for dtype in dtypes for name in ("ours", "torch")[: 1 + (dtype != "int8")]]
    labels = [label for label in labels if not contestants.lacks(parse("peak", label, ""))]
    best: dict[str, float] = {}
    for c in run("peak", labels, options):
        dtype = c.name.partition(":")[2]
        speed = layers.peak_operations() / 1e9 / quartiles(c.seconds["step"])[1]
        best[dtype] = max(best.get(dtype, 0.0), speed)
    return best


def dtype_of(who: Label) -> str:
    """In which its large products are."""
    int8 = who.task in ("int8", "int8_lora", "qat") and who.name != "float"
    return "int8" if int8 or who.name in ("dynamic", "static") else "float32" if who.name == "float32" else who.dtype


def operations(who: Label, options: argparse.Namespace) -> float | None:
    """Of one image in a step of our model that does this work; None of what is no step."""
    if who.task in (*LAYERS, "input"):
        return None
    from contestants import ours

    from vitft_jax import flops

    name = who.name if who.name in SKIP else "prune" if who.name == "evit" else "float"
    model = ours.our_model(who._replace(name=name), options)[2]
    if who.task in (*contestants.FORWARD, "export"):
        return flops.forward(model, options.size)
    return flops.train_step(model, options.size, full=who.task in ("full", "qat"))


def rows(
    task: str, labels: Sequence[str], peak: Mapping[str, float], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Runs a task; returns what the JSON file says of each contestant."""
    found = []
    for c in run(task, labels, options):
        who = parse(task, c.name.partition(" ")[0], options.dtype)
        speeds = [images_of(task, options.batch) / s for s in c.seconds["step"]]
        work, dtype = operations(who, options), dtype_of(who)
        # A step over int8 is a mixture: its backward pass is in float. Only a forward pass has one peak.
        one_dtype = who.task not in ("int8_lora", "qat") and dtype in peak
        found.append(
            {
                "task": task,
                "contestant": c.name,
                "dtype": who.dtype,
                "images_per_second": speeds,
                "gflop_per_image": work and work / 1e9,
                "share_of_peak": quartiles(speeds)[1] * work / 1e9 / peak[dtype] if work and one_dtype else None,
                "imported_seconds": c.imported,
                "first_step_seconds": c.start_up,
                "peak_mib": c.peak_mib,
                "start_mib": c.start_mib,
                **c.facts,
            }
        )
    return found


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the table of a task."""
    first, table = found[0], []
    for row in found:
        ratios = [a / b for a, b in zip(first["images_per_second"], row["images_per_second"], strict=True)]
        ratio, label = "" if row is first else spread(ratios, "x"), row["contestant"]
        if row is not first and first["contestant"] == "dense":  # here it is the first that is to be beaten
            ratio = f"{spread([1 / r for r in ratios], 'x')} the speed of dense"
            label = f"{label} (FLOPs: {first['gflop_per_image'] / row['gflop_per_image']:.2f}x)"
        cells = [
            row["task"],
            label,
            spread(row["images_per_second"]),
            ratio,
            "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}",
            "" if row["imported_seconds"] is None else f"{row['imported_seconds']:.1f}",
            f"{row['first_step_seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['start_mib']:.0f}",
            f"{row['megabytes']:.1f}" if "megabytes" in row else "",
        ]
        table.append(f"| {' | '.join(cells)} |")
    return table


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: A task or model is unknown, or a variant is no assignment.
    """
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("tasks", nargs="*", default=["forward", "lora", "full"], help=", ".join([*TASKS, *FAMILIES]))
    arguments.add_argument("--model", default="vit_small_patch16", help="a key of vit.VARIANTS (plain ViT)")
    arguments.add_argument("--size", type=count, default=224, help="pixels")
    arguments.add_argument("--batch", type=count, default=8)
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments.add_argument("--rounds", type=count, default=9)
    arguments.add_argument("--turns", type=count, default=3, help="steps per round; the round counts their median")
    arguments.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...", help="of the contestants")
    arguments.add_argument("--variant", action="append", default=[], metavar="NAME=VALUE", help="see above; repeatable")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also writes the rows there, each round of them")
    arguments.add_argument("--serve", help=argparse.SUPPRESS)
    arguments.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)  # of the model, for a contestant
    options = arguments.parse_args(argv)
    options.tasks = [task for name in options.tasks for task in FAMILIES.get(name, (name,))]
    for task in options.tasks:
        if task not in (*TASKS, "peak"):
            raise InputError(f"unknown task {task!r}; {nearest(task, [*TASKS, *FAMILIES])}")
    if wrong := [variant for variant in options.variant if "=" not in variant]:
        raise InputError(f"--variant {wrong[0]}: give NAME=VALUE, such as XLA_FLAGS=--xla_cpu_prefer_vector_width=512")
    if options.json and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: no such folder")
    return options


def serve_one(options: argparse.Namespace) -> None:
    """The process of a contestant. It imports its own libraries alone, since their time and memory count."""
    who = parse(options.tasks[0], options.serve, options.dtype)
    built = contestants.build(who, options)

    def release() -> None:
        """Gives memory back as train.py does after its first step."""
        from vitft_jax import runtime

        runtime.release()

    tidy = release if "jax" in sys.modules and who.name not in GRAPHS else lambda: None
    serve({"step": built.step}, steps=options.turns, tidy=tidy, facts=built.facts)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from vitft_jax import report
    from vitft_jax.vit import VARIANTS

    options = arguments_of(argv)
    if options.model not in VARIANTS:
        raise InputError(f"--model {options.model}; {nearest(options.model, VARIANTS)}")
    options.shape = VARIANTS[options.model]
    chosen = {task: labels for task in options.tasks if (labels := kept(task, options))}
    if not chosen:
        raise InputError(f"no contestant is left in {', '.join(options.tasks)}; see above, and --only")
    who = [parse(task, label, options.dtype) for task, labels in chosen.items() for label in labels]
    dtypes = sorted({dtype_of(one) for one in who if one.task not in (*LAYERS, "input")})
    told = {
        "command": "python scripts/benchmark.py " + " ".join(_without_json(sys.argv[1:] if argv is None else argv)),
        "cpu": report.cpu(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        **{key: getattr(options, key) for key in ("model", "size", "batch", "dtype", "rounds", "turns")},
        "peak_gflops": peaks(dtypes, options) if dtypes else {},
        "rows": [],
    }
    print(f"{options.model}, {options.size} px, batch {options.batch}, {options.dtype}; {told['cpu']}")
    print(f"Python {told['python']}, " + ", ".join(f"{k} {v}" for k, v in told["versions"].items()))
    if told["peak_gflops"]:
        print("matrix peak, GF/s: " + ", ".join(f"{k} {v:.0f}" for k, v in told["peak_gflops"].items()))
    print(f"\n| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    for task, labels in chosen.items():
        found = rows(task, labels, told["peak_gflops"], options)
        told["rows"] += found
        print("\n".join(lines(found)), flush=True)
        if options.json:
            report.write_json(options.json, told)


def _without_json(argv: Sequence[str]) -> list[str]:
    """Arguments without --json, which says nothing of what was measured."""
    found, skip = [], False
    for argument in argv:
        if not skip and not argument.startswith("--json"):
            found.append(argument)
        skip = argument == "--json"
    return found


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve_one(arguments_of(None))
    else:
        from vitft_jax import cli

        cli.main(main)
