"""Writes the tables of README.md, docs/benchmarks.md and docs/results.md from the files in docs/results.

    python scripts/readme.py            # writes what stands between the markers
    python scripts/readme.py --check    # only says what is out of date; exit code 2 then

A block lies between the lines ``<!-- results:NAME -->`` and ``<!-- end -->``. `readme_blocks.BLOCKS` says what each contains:
its files in docs/results and its lines, in which a field ``{FILE:KIND ARGUMENTS}`` stands for a number. `Benchmark`, `Runs` and
`Page` have the kinds. A block whose file is not there yet says which command makes it.
"""

import csv
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contest import spread
from readme_blocks import BLOCKS, Block, command

from vitft_jax import cli, report
from vitft_jax.errors import InputError, nearest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/results.md")
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
        default = all(row["task"] == "input" for row in told["rows"])  # of the default run, whatever --model says
        model = "the bundled micro ViT" if default else f"{told['model']}, {told['size']} px"
        where = f"{model}, {told['cpu']}, Python {told['python']}, {versions}"
        return f"`{told['command']}`: {where}.{peak}"


class Runs:
    """The runs of a sweep, a line each. Arguments of the kinds: a column, and an arm."""

    def __init__(self, text: str) -> None:
        self.arms: dict[str, list[dict[str, str]]] = {}
        for line in csv.DictReader(text.splitlines()):
            self.arms.setdefault(line["arm"], []).append(line)

    def value(self, column: str, *arm: str) -> str:
        """A cell of the first run, as it stands there."""
        return self._runs(arm)[0][column]

    def measured(self, column: str, *arm: str) -> str:
        """The value of a run with its 95 % interval, or the mean of several with their range."""
        runs = self._runs(arm)
        values = [float(run[column]) for run in runs]
        if len(runs) > 1:
            return f"{statistics.fmean(values):.3f} [{min(values):.3f} to {max(values):.3f}]"
        low, high = (float(runs[0][f"{column}_{end}"]) for end in ("low", "high"))
        return f"{values[0]:.3f} ({low:.3f} to {high:.3f})"

    def _runs(self, words: Sequence[str]) -> list[dict[str, str]]:
        name = " ".join(words)
        if name not in self.arms:
            raise InputError(f"no arm {name!r}; {nearest(name, self.arms)}")
        return self.arms[name]


class Page:
    """Tables that a script wrote with --publish, as they are."""

    def __init__(self, text: str) -> None:
        self.tables = text.strip()

    def text(self) -> str:
        """All of it."""
        return self.tables


KINDS = {".json": Benchmark, ".csv": Runs, ".md": Page}


def opened(folder: Path, name: str) -> Benchmark | Runs | Page:
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
