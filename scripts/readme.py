"""Writes the tables of README.md, docs/benchmarks.md and docs/results.md from the files in docs/results.

    python scripts/readme.py            # writes what stands between the markers
    python scripts/readme.py --check    # only says what is out of date; exit code 2 then

A block lies between the lines ``<!-- results:NAME -->`` and ``<!-- end -->``. `BLOCKS` says what each contains: its files in
docs/results and its lines, in which a field ``{FILE:KIND ARGUMENTS}`` stands for a number. `Benchmark`, `Rows` and `Page` have
the kinds. A block whose file is not there yet says which command makes it.
"""

import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contest import spread

from vitft_jax import cli, report
from vitft_jax.errors import InputError, nearest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/results.md")
COMMANDS = {  # a file of a benchmark, without its ending: what makes it
    "inference": "inference --rounds 5",
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
    "rank_attention_vit": ("rank_attention_vit", " --set train.lr=1e-3"),
    "rank_encoder_vit": ("rank_encoder_vit", " --set train.lr=1e-3"),
    "multilabel": ("multilabel", ""),
    "chain_demo": ("chain_demo", ""),
    "chain_busi": ("chain", " $BUSI --set seed=0"),
}
_MARKED = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_FIELD = re.compile(r"\{(\w+):(\w+)(?: ([^{}]+))?\}")


class Benchmark:
    """What scripts/benchmark.py --json wrote. Arguments of the kinds: a task and labels of contestants."""

    def __init__(self, text: str) -> None:
        self.told = json.loads(text)

    def row(self, task: str, contestant: str) -> dict[str, Any]:
        """What was measured of a contestant."""
        rows = {(row["task"], row["contestant"]): row for row in self.told["rows"]}
        if (task, contestant) not in rows:
            raise InputError(f"no {task} {contestant}; {nearest(contestant, [c for t, c in rows if t == task])}")
        return rows[task, contestant]

    def ratios(self, task: str, one: str, other: str) -> list[float]:
        """Of the speeds, round by round."""
        speeds = [self.row(task, name)["images_per_second"] for name in (one, other)]
        return [a / b for a, b in zip(*speeds, strict=True)]

    def speed(self, task: str, contestant: str) -> str:
        """Images per second, median with quartiles."""
        return spread(self.row(task, contestant)["images_per_second"], digits=1)

    def ratio(self, task: str, one: str, other: str) -> str:
        """Speed of one as a multiple of another's, median over the rounds with quartiles."""
        return spread(self.ratios(task, one, other), "x")

    def times(self, task: str, one: str, other: str) -> str:
        """The same, the median alone."""
        return f"{statistics.median(self.ratios(task, one, other)):.2f}x"

    def share(self, task: str, contestant: str) -> str:
        """Of the matrix peak."""
        value = self.row(task, contestant)["share_of_peak"]
        return "" if value is None else f"{100 * value:.0f} %"

    def imported(self, task: str, contestant: str) -> str:
        """Seconds until the libraries are imported."""
        return f"{self.row(task, contestant)['imported_seconds']:.1f}"

    def first(self, task: str, contestant: str) -> str:
        """Seconds until the first step is done."""
        return f"{self.row(task, contestant)['first_step_seconds']:.1f}"

    def memory(self, task: str, contestant: str) -> str:
        """Peak memory in its turns, MiB."""
        return f"{self.row(task, contestant)['peak_mib']:.0f}"

    def megabytes(self, task: str, contestant: str, of: str = "megabytes") -> str:
        """Of the graph or the variables; of='frozen_megabytes': of the base."""
        value = self.row(task, contestant).get(of)
        return "" if value is None else f"{value:.1f}"

    def flops(self, task: str, one: str, other: str) -> str:
        """How many times the operations of another it has."""
        return f"{self.row(task, one)['gflop_per_image'] / self.row(task, other)['gflop_per_image']:.2f}x"

    def machine(self) -> str:
        """The processor."""
        return self.told["cpu"]

    def source(self) -> str:
        """Command, machine, versions and peak."""
        told = self.told
        versions = ", ".join(f"{k} {v}" for k, v in told["versions"].items() if v != "not installed")
        peak = ", ".join(f"{name} {value:,.0f}" for name, value in told["peak_gflops"].items())
        peak = f" Matrix peak, GF/s: {peak}." if peak else ""
        where = f"{told['model']}, {told['size']} px, {told['cpu']}, Python {told['python']}, {versions}"
        return f"`{told['command']}`: {where}.{peak}"


class Rows:
    """A table with a column `row`. Arguments of the kinds: a column, and the row."""

    def __init__(self, text: str) -> None:
        self.rows = {row["row"]: row for row in csv.DictReader(text.splitlines())}

    def value(self, column: str, *row: str) -> str:
        """A cell as it stands there."""
        return self._row(row)[column]

    def measured(self, column: str, *row: str) -> str:
        """A value with its 95 % interval, or of several seeds with their range."""
        found = self._row(row)
        value, low, high = (found[f"{column}{end}"] for end in ("", "_low", "_high"))
        return f"{value} [{low} to {high}]" if int(found["seeds"]) > 1 else f"{value} ({low} to {high})"

    def _row(self, words: Sequence[str]) -> dict[str, str]:
        name = " ".join(words)
        if name not in self.rows:
            raise InputError(f"no row {name!r}; {nearest(name, self.rows)}")
        return self.rows[name]


class Page:
    """Tables that scripts/sweep.py --publish wrote, as they are."""

    def __init__(self, text: str) -> None:
        self.tables = text.strip()

    def text(self) -> str:
        """All of it."""
        return self.tables


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


_BUSI = {"busi": "busi.csv"}
BLOCKS = {
    "busi": Block(
        _BUSI,
        _table(
            " | trains, % | weights, MB | test accuracy | AUROC",
            [
                [
                    row,
                    f"{{busi:value trainable_percent {row}}}",
                    f"{{busi:value megabytes {row}}}",
                    f"{{busi:measured accuracy {row}}}",
                    f"{{busi:measured auroc {row}}}",
                ]
                for row in (
                    "head only",
                    "everything",
                    "LoRA on query, key and value",
                    "the same, then `vitft_jax.quantize` to int8",
                    "LoRA over an int8 base",
                    "LoRA, 35 % of the patches skip twice (1 seed)",
                )
            ],
        ),
    ),
    "speed": Block(
        _benchmark("inference", "float32", "bfloat16"),
        [
            "Speed as a multiple of the peers', side by side on {inference:machine}"
            " ([docs/benchmarks.md](docs/benchmarks.md)): a LoRA step",
            "{float32:times lora ours peft} PEFT's in float32 and {bfloat16:times lora ours peft} in bfloat16,"
            " over an int8 base {float32:times lora int8_lora/ours ours} and"
            " {bfloat16:times lora int8_lora/ours ours} our own;",
            "AdaLoRA {float32:times adalora ours peft} and {bfloat16:times adalora ours peft} PEFT's; a full step"
            " {float32:times full ours transformers} and {bfloat16:times full ours transformers} transformers'.",
            "Inference: {inference:times inference forward/ours forward/transformers} transformers in float32 and"
            " {inference:times inference forward/ours:bfloat16 forward/transformers:bfloat16} in bfloat16,"
            " {inference:times inference forward/ours forward/onnx} ONNX Runtime",
            "in float32; in int8 {inference:times inference int8/ours forward/ours} our own float32,"
            " {inference:times inference int8/ours int8/torch} torch's int8 and"
            " {inference:times inference int8/ours int8/onnx} ONNX Runtime's.",
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
    "vit_b": Block(
        _benchmark("vit_b"),
        _table(
            " | images/s | ours is | of the peak | peak MiB",
            [
                [
                    label,
                    f"{{vit_b:speed int8 {who}}}",
                    "" if who == "ours" else f"{{vit_b:ratio int8 ours {who}}}",
                    f"{{vit_b:share int8 {who}}}",
                    f"{{vit_b:memory int8 {who}}}",
                ]
                for label, who in (
                    ("ours, int8", "ours"),
                    ("ours, float32", "float"),
                    ("torch dynamic int8", "torch"),
                    ("ONNX Runtime dynamic int8", "onnx"),
                )
            ],
            "{vit_b:source}",
        ),
    ),
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
KINDS = {".json": Benchmark, ".csv": Rows, ".md": Page}


def opened(folder: Path, name: str) -> Benchmark | Rows | Page:
    """A file of docs/results.

    Raises:
        InputError: It is no such file.
    """
    try:
        text = (folder / name).read_text(encoding="utf-8")
        return KINDS[Path(name).suffix](text)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / name}: no file of results: {error!r}") from None


def render(block: Block, folder: Path) -> str:
    """The text of a block.

    Raises:
        InputError: A file is damaged, or has not what the block asks for.
    """
    if missing := [alias for alias, name in block.files.items() if not (folder / name).exists()]:
        return "".join(f"Not measured yet: `{command(alias)}`\n" for alias in missing)
    files = {alias: opened(folder, name) for alias, name in block.files.items()}

    def field(match: re.Match[str]) -> str:
        alias, kind, arguments = match.groups("")
        found: Callable[..., str] = getattr(files[alias], kind)
        try:
            return found(*arguments.split())
        except (InputError, KeyError, TypeError) as error:
            raise InputError(f"{folder / block.files[alias]}: {match.group()}: {error}") from None

    return "".join(f"{_FIELD.sub(field, line)}\n" for line in block.lines)


def command(alias: str) -> str:
    """What makes a file of a benchmark or a sweep."""
    if alias in SWEEPS:
        file, sets = SWEEPS[alias]
        return f"python scripts/sweep.py configs/sweeps/{file}.toml --output runs/{alias}{sets} --publish docs/results"
    return f"python scripts/benchmark.py {COMMANDS[alias]} --json docs/results/benchmark_{alias}.json"


def rendered(text: str, folder: Path) -> str:
    """A page with its blocks made anew.

    Raises:
        InputError: A block has no entry in `BLOCKS`; or as `render`.
    """

    def fill(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise InputError(f"<!-- results:{name} -->: no such block; {nearest(name, BLOCKS)}")
        return start + render(BLOCKS[name], folder) + end

    return _MARKED.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = cli.parser(__doc__, "python scripts/readme.py --check")
    arguments.add_argument("--check", action="store_true", help="write nothing")
    options = arguments.parse_args(argv)
    stale = []
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = rendered(before, ROOT / "docs" / "results")
        if before != after:
            stale.append(page)
            if not options.check:
                report.write_text(ROOT / page, after)
                print(f"{page}: written")
    if stale and options.check:
        raise InputError(f"{', '.join(stale)}: not what docs/results says; run python scripts/readme.py")


if __name__ == "__main__":
    cli.main(main)
