"""Who takes part in scripts/benchmark.py: ourselves, the peers in torch and ONNX Runtime, and parts of a layer alone.

A label names a contestant: ``[TASK/]NAME[:DTYPE]``, such as 'ours', 'ours:bfloat16' or 'int8/torch' within another task.
"""

import argparse
import importlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

CLASSES, LEARNING_RATE, RANK, ALPHA = 3, 1e-4, 8, 16.0
ADALORA = {"init_r": 12, "target_r": 8, "lora_alpha": 24}
STEPS = 10_000  # length of the run that a step is taken from: in AdaLoRA's, ranks begin to fall after a tenth
BATCHES_AT_ONCE = 100  # of the task `input`: the four that are read ahead between turns are few of them

SKIP_FORWARD = {"skip_1": 1, "skip_8": 8, "skip_32": 32}  # batch by task
# EViT prunes inside blocks 3, 6 and 9, before their MLP: its FLOPs lie between those of splits after them and before them.
SKIP = {  # after them; before them; after them, with all tokens back in the last block
    "dense": (),
    "prune": ("skip.layers=3,6,9", "skip.drop_ratio=0.3"),
    "early": ("skip.layers=2,5,8", "skip.drop_ratio=0.3"),
    "rejoin": ("skip.layers=3,6,9", "skip.drop_ratio=0.3", "skip.rejoin=11"),
}
FORWARD = ("forward", "int8", *SKIP_FORWARD)
LAYERS = ("attention", "gelu", "linear", "matmul", "peak")
PEERS = {  # contestants that are not ours, and the packages that they need
    "transformers": ("torch", "transformers"),
    "compiled": ("torch", "transformers"),
    "timm": ("torch", "timm"),
    "peft": ("torch", "transformers", "peft"),
    "torch": ("torch", "transformers"),
    "evit": ("torch",),
    "onnx": ("torch", "transformers", "onnx", "onnxruntime"),
}
GRAPHS = ("float32", "dynamic", "static")  # our ONNX graphs
STATIC, RANGE = "ours_static", 4.0  # our int8 with static ranges, here all the same


class Built(NamedTuple):
    """A contestant that is ready.

    Attributes:
        step: What is timed.
        facts: Numbers about it for the table, such as `megabytes`.
    """

    step: Callable[[], object]
    facts: dict[str, float]


class Label(NamedTuple):
    """The parts of a label."""

    task: str
    name: str
    dtype: str


def parse(task: str, label: str, dtype: str) -> Label:
    """A label of a task that runs in `dtype`."""
    rest, _, own_dtype = label.partition(":")
    own_task, slash, name = rest.rpartition("/")
    return Label(own_task if slash else task, name, own_dtype or dtype)


def images_of(task: str, batch: int) -> int:
    """Images per step: a task may fix it."""
    return {**SKIP_FORWARD, "skip_lora": 8, "input": BATCHES_AT_ONCE * batch}.get(task, batch)


def lacks(who: Label) -> str:
    """What a contestant needs and this machine has not; '' = nothing."""
    packages = ("onnx", "onnxruntime") if who.name in GRAPHS else PEERS.get(who.name, ())
    if who.task in LAYERS and who.name == "torch":
        packages = ("torch",)
    if who.name == "onnx" and who.task != "int8" and who.dtype != "float32":
        return "float32, the dtype of its graph"
    if missing := [package for package in packages if find_spec(package) is None]:
        return f"{', '.join(missing)} (extra `interop`)"
    if who.name == "compiled" and shutil.which("g++") is None:
        return "g++, with which torch.compile builds its kernels"
    return ""


def build(who: Label, options: argparse.Namespace) -> Built:
    """The contestant; imports its libraries, and no others."""
    if who.task in LAYERS:
        module: Any = "layers"
    elif who.name == "onnx" or who.name in GRAPHS:
        module = "onnx_peers"
    else:
        module = "torch_peers" if who.name in PEERS else "ours"
    return importlib.import_module(f"contestants.{module}").build(who, options)
