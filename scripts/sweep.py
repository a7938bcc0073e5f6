"""Trains a grid of runs, one after the other, and tabulates what they say.

    python scripts/sweep.py configs/sweeps/rank_attention_vit.toml --output runs/rank_attention_vit
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --set data.path=IMAGES --set seed=0
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --table     # of what is done so far

In the background, and what it does from another terminal:

    nohup python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods > methods.log 2>&1 &
    python scripts/sweep.py configs/sweeps/methods.toml --output runs/methods --status

Runs of one seed come before those of the next, so that a sweep that ends early has whole rows. Started again, the same command
skips what is done and goes on with what was begun; with other settings it says so and does nothing. A run that fails is named
and does not stop the others; its output is beside it in NAME.log. At the end, and with --table, the folder gets results.csv (a
line a run), results.md (a line a row of seeds), figure.png and comparison.html; see `sweep_results`.

--set KEY=VALUE puts a key over those of base, or other values (seed=0,1) in the place of those of the grid. Where an arm has
the key itself, --set ARM:KEY=VALUE must say what it gets there, unless that is the run of another arm. --only ARM, as often as
you like, makes the runs of these arms and those that they are made from; tables have all that is there. What a file may say is
in `sweep_file`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from sweep_file import Sweep, check_metrics, of_arms, read
from sweep_progress import STATUS, done_before, progress, results

from vitft_jax import cli, report
from vitft_jax import config as configs
from vitft_jax.errors import InputError

ENDED = (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""How a run ends that was ended from outside, as the whole sweep then is; what kills one run, such as a lack of memory, is not
among them."""
POLL = 1.0  # seconds between looks at the run that goes on


def notes(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """What NAME.json says of each run, by name: what made it, and what made the run that it is made from."""
    found: dict[str, dict[str, Any]] = {}
    for job in sweep.jobs:
        found[job.name] = {**job.made, **({"from": found[job.after]} if job.after else {})}
    return found


def check(sweep: Sweep, output: Path) -> None:
    """Makes sure that the runs in a folder are those of this sweep, and have the metrics to show.

    Raises:
        InputError: A run was made with other settings; or its task has no metric of such a name.
    """
    for name, now in notes(sweep).items():
        path = output / f"{name}.json"
        if not (path.is_file() and (output / name).exists()):
            continue
        then = json.loads(path.read_text(encoding="utf-8"))
        if differ := _differences(then, now):
            raise InputError(
                f"{output / name}: was made with other settings: {'; '.join(differ[:5])}. "
                "Choose another --output, or delete this run and those made from it"
            )
    for job in sweep.jobs:
        if told := results(output, job):
            check_metrics(sweep, told)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> list[str]:
    found = []
    for key in {**then, **now}:
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, "of the run that it is made from, " if key == "from" else of)
        elif a != b and not key.startswith(configs.ON_RESUME):
            found.append(f"{of}{key} {a!r} there, {b!r} here")
    return found


def run(sweep: Sweep, output: Path, only: Sequence[str] = ()) -> dict[str, str]:
    """Makes the runs that are not done yet; returns what came of each: 'done', 'failed: ...' or 'left out: ...'.

    Args:
        sweep: What to run.
        output: Folder of the runs.
        only: Arms to run; () = all.

    Raises:
        InputError: As `check` and `of_arms`; a metric that the task does not have is found once the first run is done.
    """
    jobs, earlier = of_arms(sweep, only), done_before(output)
    output.mkdir(parents=True, exist_ok=True)
    check(sweep, output)
    noted = notes(sweep)
    state = {job.name: "done" if results(output, job) else "waits" for job in jobs}
    console = Console()
    with Live(console=console, auto_refresh=False) as live:

        def show(name: str, value: str) -> None:
            state[name] = value
            known = earlier | state  # in the order of the sweep, then those of other grids
            runs = {n: known[n] for n in dict.fromkeys([*(job.name for job in sweep.jobs), *known]) if n in known}
            report.write_json(output / STATUS, {"process": os.getpid(), "since": time.time(), "runs": runs})
            if not console.is_terminal:
                print(f"{sum(v == 'done' for v in state.values())}/{len(state)} done; {name}: {value}", flush=True)
            look()

        def look() -> None:
            if console.is_terminal:
                live.update(progress(sweep, output, console.size.height), refresh=True)

        for job in jobs:
            if state[job.name] == "done":
                continue
            if job.after and state[job.after] != "done":
                show(job.name, f"left out: {job.after} is not there")
                continue
            show(job.name, "runs")
            report.write_json(output / f"{job.name}.json", noted[job.name])
            log = output / f"{job.name}.log"
            code = _wait_for([sys.executable, *(_placed(part, output) for part in job.command)], log, look)
            if code in ENDED:
                show(job.name, "was ended")
                raise KeyboardInterrupt
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            failed = last if code > 0 else f"killed by {signal.Signals(-code).name}; {last}" if code else ""
            show(job.name, f"failed: {failed}" if code else "done")
            if told := results(output, job):
                check_metrics(sweep, told)
    return state


def _wait_for(command: Sequence[str], log: Path, look: Any) -> int:
    """Runs a command, looking at it from time to time; it ends with us, and saves before that what it can."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    return process.wait(POLL)
                except subprocess.TimeoutExpired:
                    look()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _placed(part: str, output: Path) -> str:
    """An argument with '@/' for the folder of the sweep."""
    flag, equals, value = part.rpartition("=")
    return f"{flag}{equals}{output / value[2:]}" if value.startswith("@/") else part


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sweep", type=Path, help="a TOML file, such as configs/sweeps/methods.toml")
    arguments.add_argument("--output", required=True, type=Path, help="folder of the runs")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="[ARM:]KEY=VALUE", help="put over base, grid or an arm"
    )
    arguments.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm and not all")
    arguments.add_argument("--table", action="store_true", help="train nothing: tables and figure of what is done")
    arguments.add_argument("--status", action="store_true", help="train nothing: how far it has come")
    arguments.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="copy the tables and the figure there, by the name of --output"
    )
    options = arguments.parse_args(argv)
    sweep = read(options.sweep, options.set)
    if options.status:
        console = Console()
        return console.print(progress(sweep, options.output, console.size.height if console.is_terminal else 10**6))
    if options.table:
        check(sweep, options.output)
    state = {} if options.table else run(sweep, options.output.absolute(), options.only)

    import sweep_results  # slow to import, and after hours of training first

    sweep_results.write(sweep, options.output)
    if options.publish:
        sweep_results.publish(options.output, options.publish)
    if failed := {name: text for name, text in state.items() if text != "done"}:
        raise InputError(
            f"{len(failed)} of {len(state)} runs are missing: "
            + "; ".join(f"{name} {text}" for name, text in list(failed.items())[:5])
            + f". See {options.output}/NAME.log; the same command tries them again"
        )
    return None


if __name__ == "__main__":
    cli.main(main)
