"""What stands in the blocks that `readme.py` writes: the files of docs/results of each, its lines, and what makes a file."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

COMMANDS = {  # a file of a benchmark, without its ending: what makes it
    "inference": "inference --rounds 5",
    "int8": "int8 --rounds 11 --turns 2",
    "vit_b": "int8 --model vit_base_patch16 --rounds 5 --turns 2",
    "float32": "lora full adalora --rounds 5 --turns 2",
    "bfloat16": "lora full adalora --rounds 5 --turns 2 --dtype bfloat16",
    "skip": "skip --rounds 5 --turns 1",
    "layers": "linear attention gelu matmul --turns 10",
    "layers_bfloat16": "linear attention gelu matmul --turns 10 --dtype bfloat16",
    "input": "input --batch 16 --rounds 5 --turns 1",
}
SWEEPS = {  # by the name of what it publishes: its file in configs/sweeps, and what its command adds ($BUSI: docs/results.md)
    "methods_demo": ("methods_demo", ""),
    "methods_busi": ("methods", " $BUSI --set dtype=bfloat16 --set QAT:train.epochs=2 --set seed=0"),
    "rank_attention_vit": ("rank_attention_vit", " --set train.lr=1e-3"),
    "rank_encoder_vit": ("rank_encoder_vit", " --set train.lr=1e-3"),
    "rank_attention_busi": ("rank_attention_vit", " $BUSI --set dtype=bfloat16 --set seed=0"),
    "rank_encoder_busi": ("rank_encoder_vit", " $BUSI --set dtype=bfloat16 --set seed=0 --set lora.rank=2,8,32"),
    "multilabel": ("multilabel", ""),
    "chain_demo": ("chain_demo", ""),
    "chain_busi": ("chain", " $BUSI --set seed=0"),  # and seed 1 of some arms, see docs/results.md
}
RACES = {  # by the name of what it publishes: its command, as above
    "chain_busi_speed": (
        "chain.py runs/chain_busi --arms full int8 int8-static earlier-int8-static earlier-qkv-int8-static --rounds 7"
    ),
    "chain_demo_speed": "chain.py runs/chain_demo",
    "race": "accuracy_race.py --output runs/race --methods lora,adalora,full --seeds 0,1,2",
    "race_busi": (
        "accuracy_race.py --output runs/race_busi --methods lora --seeds 0 $DATA --config.dtype=bfloat16"
        " --config.train.epochs=4"
    ),
}


def command(alias: str) -> str:
    """What makes a file of a benchmark, a sweep or a race."""
    if alias in RACES:
        return f"python scripts/{RACES[alias]} --publish docs/results"
    if alias in SWEEPS:
        file, sets = SWEEPS[alias]
        return f"python scripts/sweep.py configs/sweeps/{file}.toml --output runs/{alias}{sets} --publish docs/results"
    return f"python scripts/benchmark.py {COMMANDS[alias]} --json docs/results/benchmark_{alias}.json"


class Block(NamedTuple):
    """What stands between two markers: lines, made of these files of docs/results."""

    files: Mapping[str, str]
    lines: Sequence[str]


def _table(head: str, rows: Sequence[Sequence[str]], *after: str) -> list[str]:
    """A Markdown table, and lines after it."""
    columns = [part.strip() for part in head.split("|")]
    lines = [" | ".join(columns), "---|" * (len(columns) - 1) + "---", *(" | ".join(row) for row in rows)]
    return [
        *(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines)),
        *(["", *after] if after else []),
    ]


def _benchmark(*names: str) -> dict[str, str]:
    return {name: f"benchmark_{name}.json" for name in names}


def _inference(label: str, who: str) -> list[str]:
    of = f"inference {who}"
    cells = [f"{{inference:speed {of}}}", f"{{inference:ratio {of} forward/transformers}}"]
    return [
        label,
        *cells,
        *(f"{{inference:{kind} {of}}}" for kind in ("share", "imported", "first", "memory", "megabytes")),
    ]


def _training(dtype: str, label: str, task: str, who: str, first: str = "ours") -> list[str]:
    ratio = "" if who == first else f"{{{dtype}:ratio {task} {first} {who}}}"
    kinds = ("share", "imported", "first", "memory")
    return [label, f"{{{dtype}:speed {task} {who}}}", ratio, *(f"{{{dtype}:{kind} {task} {who}}}" for kind in kinds)]


def _train(dtype: str) -> Block:
    rows = [
        _training(dtype, "LoRA step, ours", "lora", "ours"),
        _training(dtype, "the same over an int8 base", "lora", "int8_lora/ours"),
        _training(dtype, "PEFT", "lora", "peft"),
        _training(dtype, "AdaLoRA step, ours", "adalora", "ours"),
        _training(dtype, "our LoRA of the same layers and rank", "adalora", "lora"),
        _training(dtype, "PEFT", "adalora", "peft"),
        _training(dtype, "full step, ours", "full", "ours"),
        _training(dtype, "the same with int8 products (QAT)", "full", "qat/ours"),
        _training(dtype, "transformers", "full", "transformers"),
    ]
    head = " | images/s | ours is | of the peak | imports s | first step s | peak MiB"
    base = (
        f"The base of the LoRA step: {{{dtype}:megabytes lora ours frozen_megabytes}} MB, over int8 "
        f"{{{dtype}:megabytes lora int8_lora/ours frozen_megabytes}} MB."
    )
    return Block(_benchmark(dtype), _table(head, rows, base, f"{{{dtype}:source}}"))


def _int8(alias: str, *more: tuple[str, str]) -> Block:
    who = [
        ("ours, int8, a scale per token", "ours"),
        *more,
        ("ours, float32", "float"),
        ("torch dynamic int8", "torch"),
        ("ONNX Runtime dynamic int8", "onnx"),
    ]
    rows = [
        [
            label,
            f"{{{alias}:speed int8 {name}}}",
            "" if name == "ours" else f"{{{alias}:ratio int8 ours {name}}}",
            "" if name == "onnx" else f"{{{alias}:ratio int8 {name} onnx}}",
            f"{{{alias}:share int8 {name}}}",
            f"{{{alias}:memory int8 {name}}}",
        ]
        for label, name in who
    ]
    head = " | images/s | ours is | times ONNX Runtime | of the peak | peak MiB"
    return Block(_benchmark(alias), _table(head, rows, f"{{{alias}:source}}"))


def _skip(label: str, who: str) -> list[str]:
    tasks = ("skip_1", "skip_8", "skip_32", "skip_lora")
    if who == "dense":
        return [label, "", *(f"{{skip:speed {task} dense}}" for task in tasks)]
    if who == "evit":
        return [
            label,
            "{skip:flops skip_8 dense prune}",
            *(f"{{skip:ratio {task} evit dense}}" for task in tasks[:3]),
            "",
        ]
    return [label, f"{{skip:flops skip_8 dense {who}}}", *(f"{{skip:ratio {task} {who} dense}}" for task in tasks)]


def _layer(label: str, task: str) -> list[str]:
    cells = [label]
    for dtype in ("layers", "layers_bfloat16"):
        cells.append("" if task == "matmul" else f"{{{dtype}:ratio {task} ours autodiff}}")
        cells.append(f"{{{dtype}:ratio {task} ours torch}}")
    return cells


_BUSI = {  # rows of README: arms of the sweep, and what they are called there
    "head only": "the head alone",
    "full": "everything",
    "LoRA": "LoRA on query, key and value",
    "AdaLoRA": "AdaLoRA at the same budget",
    "LoRA, skipping": "LoRA, 35 % of the patches skip twice",
    "PTQ": "LoRA, then `vitft_jax.quantize` to int8",
    "QAT": "LoRA, then QAT of new adapters",
    "LoRA over int8": "LoRA over an int8 base",
}
BLOCKS = {
    "busi": Block(
        {"methods_busi": "methods_busi.csv"},
        _table(
            " | trains, % | weights, MB | test accuracy | AUROC",
            [
                [
                    label,
                    f"{{methods_busi:value trainable_percent {arm}}}",
                    f"{{methods_busi:value megabytes {arm}}}",
                    f"{{methods_busi:measured accuracy {arm}}}",
                    f"{{methods_busi:measured auroc {arm}}}",
                ]
                for arm, label in _BUSI.items()
            ],
        ),
    ),
    "speed": Block(
        _benchmark("inference", "int8", "float32", "bfloat16"),
        [
            "Speed as a multiple of the peers', side by side on {inference:machine}"
            " ([docs/benchmarks.md](docs/benchmarks.md)): a LoRA step",
            "{float32:times lora ours peft} PEFT's in float32 and {bfloat16:times lora ours peft} in bfloat16,"
            " over an int8 base {float32:times lora int8_lora/ours ours} and"
            " {bfloat16:times lora int8_lora/ours ours} our own;",
            "AdaLoRA {float32:times adalora ours peft} and {bfloat16:times adalora ours peft} PEFT's; a full step"
            " {float32:times full ours transformers} and {bfloat16:times full ours transformers} transformers'.",
            "Inference: {inference:times inference forward/ours forward/transformers} transformers in float32 and"
            " {inference:times inference forward/ours:bfloat16 forward/transformers:bfloat16} in bfloat16, compiled by"
            " torch {inference:times inference forward/ours forward/compiled} and"
            " {inference:times inference forward/ours:bfloat16 forward/compiled:bfloat16};",
            "{inference:ratio inference forward/ours forward/onnx} ONNX Runtime in float32. int8:"
            " {int8:times int8 ours float} our own float32, {int8:times int8 ours torch} torch's int8,",
            "{int8:ratio int8 ours onnx} ONNX Runtime's, and with static ranges {int8:ratio int8 ours_static onnx};"
            " medians of the rounds, with quartiles where they come near 1.",
        ],
    ),
    "inference": Block(
        _benchmark("inference"),
        _table(
            " | images/s | times transformers, float32 | of the peak | imports s | first step s | peak MiB | MB",
            [
                _inference("ours, float32", "forward/ours"),
                _inference("ours, bfloat16", "forward/ours:bfloat16"),
                _inference("ours, int8, a scale per token", "int8/ours"),
                _inference("transformers, float32", "forward/transformers"),
                _inference("transformers, bfloat16", "forward/transformers:bfloat16"),
                _inference("transformers, torch.compile, float32", "forward/compiled"),
                _inference("transformers, torch.compile, bfloat16", "forward/compiled:bfloat16"),
                _inference("timm, float32", "forward/timm"),
                _inference("timm, bfloat16", "forward/timm:bfloat16"),
                _inference("torch dynamic int8", "int8/torch"),
                _inference("ONNX Runtime, float32, exported by torch", "forward/onnx"),
                _inference("ONNX Runtime, dynamic int8 of the same", "int8/onnx"),
                _inference("ONNX Runtime, our graph, float32", "export/float32"),
                _inference("ONNX Runtime, our graph, int8, a scale per token", "export/dynamic"),
                _inference("ONNX Runtime, our graph, int8, static ranges", "export/static"),
            ],
            "{inference:source}",
        ),
    ),
    "int8": _int8("int8", ("ours, int8, static ranges", "ours_static")),
    "vit_b": _int8("vit_b"),
    "training_float32": _train("float32"),
    "training_bfloat16": _train("bfloat16"),
    "layers": Block(
        _benchmark("layers", "layers_bfloat16"),
        _table(
            " | float32: autodiff | torch | bfloat16: autodiff | torch",
            [
                _layer("linear layer, forward and backward", "linear"),
                _layer("attention, forward and backward", "attention"),
                _layer("GELU, forward and backward", "gelu"),
                _layer("one matrix product", "matmul"),
            ],
            "{layers:source}",
            "",
            "{layers_bfloat16:source}",
        ),
    ),
    "skip": Block(
        _benchmark("skip"),
        _table(
            " | FLOPs alone | forward, batch 1 | batch 8 | batch 32 | LoRA step, batch 8",
            [
                _skip("dense, images/s", "dense"),
                _skip("after 2, 5, 8", "early"),
                _skip("after 3, 6, 9", "prune"),
                _skip("after 3, 6, 9, back before 11", "rejoin"),
                _skip("plain EViT in torch, after 3, 6, 9", "evit"),
            ],
            "{skip:source}",
        ),
    ),
    "input": Block(
        _benchmark("input"),
        [
            "Reading and augmenting gives {input:speed input ours} images/s, {input:ratio input ours step} what its LoRA step",
            "takes in. {input:source}",
        ],
    ),
}


for _name in SWEEPS:
    BLOCKS[_name] = Block({_name: f"{_name}.md"}, [f"{{{_name}:text}}", "", f"![{_name}](results/{_name}.png)"])
for _name in RACES:
    BLOCKS[_name] = Block({_name: f"{_name}.md"}, [f"{{{_name}:text}}"])
