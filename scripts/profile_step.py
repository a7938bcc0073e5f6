"""Where the time of a step of ours goes, by kind of operation, from a trace of XLA.

    python scripts/profile_step.py                      # LoRA step and int8 forward pass: ViT-S/16, 224 px, batch 8
    python scripts/profile_step.py full --dtype bfloat16

An operation is of the kind of the first rule in `KINDS` that is found in what XLA says of its origin, which for a fusion is
its last operation. Where operations run at once they share the time. An operation ends when the first that reads its result
starts: XLA marks the end of one after it has run what follows it on the same thread. Times are of a step, the mean of those
traced; what no operation accounts for is 'between'. The last line is the same step without a trace: where it is much faster, as
in bfloat16 on a CPU, whose products are traced tile by tile, the shares are of the trace rather than of the step.
"""

import argparse
import re
import statistics
import tempfile
import time
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import jax
from contestants import FORWARD, ours, parse

from vitft_jax import cli, report, runtime, step
from vitft_jax.errors import InputError, nearest
from vitft_jax.vit import VARIANTS

TASKS = {
    "lora": "lora/ours",
    "int8": "int8/ours",
    "forward": "forward/ours",
    "full": "full/ours",
    "int8_lora": "int8_lora/ours",
}
KINDS = (  # kind: regex on 'OPCODE ORIGIN', such as 'dot jit(train_step)/.../blocks_0/mlp/fc1/dot_general'
    (
        "products of linear layers",
        r"^(dot|custom-call) .*(query|key|value|out|fc1|fc2|patch|head)/|/(fc1|fc2|query|key|value|out|patch)/.*dot_general",
    ),
    ("products of attention", r"bhn|bhm|bhd|^dot "),
    ("copies and transpositions", r"^(copy|transpose|bitcast) |/transpose$|with_layout_constraint"),
    ("layer norm", r"/norm\d?/"),
    ("around linear layers: bias, int8 scales, casts", r"/(fc1|fc2|query|key|value|out|patch|head)/"),
    ("softmax", r"/attn"),
    ("GELU", r"/mlp/"),
    ("residual sums", r"/blocks_\d+/"),
)  # fmt: skip
_OPERAND = re.compile(r"%([\w.-]+)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \S+ ([\w-]+)\(.*?(?:op_name=\"([^\"]*)\"|$)", re.MULTILINE)


def kinds(text: str) -> dict[str, str]:
    """Kind by name of an instruction, of a compiled program."""
    found = {}
    for name, opcode, origin in _INSTRUCTION.findall(text):
        kind = (kind for kind, rule in KINDS if re.search(rule, f"{opcode} {origin}"))
        found[name] = next(kind, "loss, optimiser and the rest")
    return found


def readers(text: str) -> dict[str, list[str]]:
    """Names of the instructions that read the result of an instruction, by its name, of a compiled program."""
    found = defaultdict(list)
    for match in _INSTRUCTION.finditer(text):
        for operand in _OPERAND.findall(match[0].partition(" = ")[2]):
            found[operand].append(match[1])
    return found


def clipped(
    found: Sequence[tuple[str, float, float]], readers: Mapping[str, Sequence[str]]
) -> list[tuple[str, float, float]]:
    """Spans that end where the first reader of their result starts, if that is before their own end."""
    starts = defaultdict(list)
    for name, start, _ in found:
        starts[name].append(start)
    for times in starts.values():
        times.sort()
    ends = []
    for name, start, end in found:
        after = [times[k] for r in readers.get(name, ()) if (k := bisect(times := starts[r], start)) < len(times)]
        ends.append((name, start, min([end, *after])))
    return ends


def spans(trace: Path) -> list[tuple[str, float, float]]:
    """Operations in a trace, with their start and end in ns: an asynchronous one ends with its mark 'end: NAME'."""
    found, begun = [], defaultdict(list)
    data = jax.profiler.ProfileData.from_file(str(next(trace.rglob("*.xplane.pb"))))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    for event in sorted(events, key=lambda event: event.start_ns):
        name = event.name.removeprefix("end: ")
        if name != event.name and begun[name]:
            start = begun[name].pop(0)
            found.append((name, start, max(event.end_ns, start)))
        elif name == event.name:
            begun[name].append(event.start_ns)
    return found


def shares(found: Iterable[tuple[str, float, float]], kind_of: Mapping[str, str]) -> Counter[str]:
    """Seconds by kind; each moment is shared by the operations that run in it."""
    marks = sorted((t, sign, kind_of[name]) for name, a, b in found if name in kind_of for t, sign in ((a, 1), (b, -1)))
    running, seconds = Counter(), Counter()
    for (t, sign, kind), (after, *_) in pairwise(marks):
        running[kind] += sign
        for name, count in running.items():
            seconds[name] += (after - t) / 1e9 * count / (running.total() or 1)
    return seconds


def table(task: str, options: argparse.Namespace) -> list[str]:
    """Lines of the table of a step."""
    who = parse(task, TASKS[task], options.dtype)
    program, trainable, frozen, batch = ours.prepared(who, options)
    forward = who.task in FORWARD
    state = trainable if forward else step.init_state(program, trainable)
    given = batch["image"] if forward else batch
    compiled = (step.eval_step if forward else step.train_step).lower(state, frozen, given, program=program).compile()
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0

    def turn() -> None:
        nonlocal state
        out = jax.block_until_ready(compiled(state, frozen, given))
        state = state if forward else out[0]

    for _ in range(3):
        turn()
    runtime.release()
    turn()
    untraced = []
    for _ in range(options.steps):
        started = time.perf_counter()
        turn()
        untraced.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=settings):
            for _ in range(options.steps):
                turn()
        found = spans(Path(folder))
    kind_of = kinds(compiled.as_text())
    found = clipped(found, readers(compiled.as_text()))
    seconds = shares(found, kind_of)
    mine = [span for span in found if span[0] in kind_of]
    whole = (max(b for *_, b in mine) - min(a for _, a, _ in mine)) / 1e9
    seconds["between"] = whole - seconds.total()
    lines = [f"| {task}, {options.dtype} | ms | share |", "|---|---|---|"]
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"| {kind} | {1e3 * value / options.steps:.1f} | {value / whole:.0%} |")
    lines.append(f"| step | {1e3 * whole / options.steps:.1f} | |")
    return [*lines, f"| step, not traced (median) | {1e3 * statistics.median(untraced):.1f} | |", ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("tasks", nargs="*", default=["lora", "int8"], help=", ".join(TASKS))
    arguments.add_argument("--model", default="vit_small_patch16", help="a key of vit.VARIANTS")
    arguments.add_argument("--size", type=int, default=224, help="pixels")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments.add_argument("--steps", type=int, default=10, help="that are traced")
    options = arguments.parse_args(argv)
    if unknown := set(options.tasks) - set(TASKS):
        raise InputError(f"unknown task {min(unknown)!r}; {nearest(min(unknown), TASKS)}")
    if options.model not in VARIANTS:
        raise InputError(f"--model {options.model}; {nearest(options.model, VARIANTS)}")
    runtime.start()
    print(f"{options.model}, {options.size} px, batch {options.batch}; {report.cpu()}; jax {jax.__version__}\n")
    for task in options.tasks:
        print("\n".join(table(task, options)), flush=True)


if __name__ == "__main__":
    cli.main(main)
