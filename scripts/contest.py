"""Times contestants side by side: each is a process of its own, and only one of them computes at a time.

A contestant does its work once, which compiles it, and a few times more to warm up; then it waits for its turns. The rounds go
through all contestants, so each ratio compares neighbours in time and a machine that slows down slows everybody.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Work = Callable[[], object]
WARM_UP = 4
_marks: dict[str, float] = {}


def count(text: str) -> int:
    """A flag's number of rounds, steps or images: at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 is needed")
    return int(text)


def imported() -> None:
    """A contestant calls it when its libraries are imported, so that this is told apart from what comes after."""
    _marks.setdefault("imported", time.time())


def serve(
    works: Mapping[str, Work],
    *,
    steps: int,
    tidy: Callable[[], None] = lambda: None,
    lean: bool = False,
    facts: Mapping[str, float] | None = None,
) -> None:
    """A contestant's process: warms up, then answers each line on its input, the name of a work, with the seconds of a step.

    Standard output is for the answers; what works print there goes to standard error.

    Args:
        works: What it can do, by name.
        steps: In a turn; the answer is their median.
        tidy: Called after each work's first step, which leaves a compiler's memory behind.
        lean: Also between turns, so that those who wait hold little memory; the first step of a turn, which fetches it
            again, is then not timed.
        facts: Numbers about the contestant, handed on to the parent.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    first = None
    for work in works.values():
        work()
        first = first or time.time()
        tidy()
        for _ in range(WARM_UP):
            work()
        if lean:
            tidy()
    marks = {"imported": _marks.get("imported"), "first_step": first}
    answer(**marks, works=list(works), peak_mib=peak_mib(), facts=dict(facts or {}))
    forget_peak()
    for line in sys.stdin:
        work = works[line.rstrip("\n")]
        if lean:
            work()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        if lean:
            tidy()
        answer(seconds=statistics.median(seconds), peak_mib=peak_mib())


def peak_mib() -> float:
    """Peak memory of this process, since it started or since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says is inherited from the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))[1]) / 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> None:
    """Lets the peak begin anew from what is held now, on Linux; elsewhere it stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Contestant:
    """The parent's side of `serve`.

    Attributes:
        name: Of the contestant.
        works: What it can do.
        seconds: Of a step, by work, one value a round.
        imported: Seconds from the start of the process until it has called `imported`; None where it does not.
        start_up: Seconds from the start of the process until its first step is done.
        facts: What it said of itself.
        start_mib: Its peak memory until it was warm: start-up and compilation.
        peak_mib: Its peak memory since then.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts the process, a Python script with its arguments that calls `serve`, and waits until it is warm.

        `environment` is put over that of this process.
        """
        started = time.time()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.name = name
        ready = self._read()
        self.facts: dict[str, float] = ready["facts"]
        self.imported = ready["imported"] and ready["imported"] - started
        self.start_up = ready["first_step"] - started
        self.works: list[str] = ready["works"]
        self.seconds: dict[str, list[float]] = {work: [] for work in self.works}
        self.start_mib = ready["peak_mib"]
        self.peak_mib = 0.0

    def turn(self, work: str) -> None:
        """Takes one turn and notes it."""
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        answer = self._read()
        self.seconds[work].append(answer["seconds"])
        self.peak_mib = answer["peak_mib"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended early; its error stands above")
        return json.loads(line)


def race(contestants: Sequence[Contestant], rounds: int) -> None:
    """Lets every contestant take a turn at all of its works in each round, work by work, and ends their processes."""
    works = dict.fromkeys(work for contestant in contestants for work in contestant.works)
    for _ in range(rounds):
        for work in works:
            for contestant in contestants:
                if work in contestant.works:
                    contestant.turn(work)
    for contestant in contestants:
        contestant.close()


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The lower one, the median and the upper one."""
    values = sorted(values)
    if len(values) < 3:  # of which quantiles() would go beyond the data
        return values[0], statistics.median(values), values[-1]
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def spread(values: Iterable[float], unit: str = "", digits: int = 2) -> str:
    """Median with quartiles, as text."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"
