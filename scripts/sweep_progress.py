"""How far a sweep has come, from what it writes."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from sweep_file import Job, Sweep

from vitft_jax.errors import InputError
from vitft_jax.folder import Folder

STATUS = "status.json"


def results(output: Path, job: Job) -> dict[str, Any] | None:
    """The summary of a run that this sweep has done; None of others."""
    path = output / job.name / "summary.json"
    if not (path.is_file() and (output / f"{job.name}.json").is_file()):
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def done_before(output: Path) -> dict[str, str]:
    """What earlier calls have done in the folder of a sweep, such as of other arms: 'done', by name of the run."""
    path = output / STATUS
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else {}
    return {name: state for name, state in runs.items() if state == "done" and (output / name).exists()}


def progress(sweep: Sweep, output: Path, height: int) -> Table:
    """The newest lines around the run that goes on, as high as the terminal, from what the sweep writes.

    Raises:
        InputError: No sweep was started in the folder.
    """
    try:
        status = json.loads((output / STATUS).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{output}: no sweep was started there") from None
    told = {job.name: results(output, job) for job in sweep.jobs}
    done = [one["timing"]["seconds"] for one in told.values() if one]
    title = f"{sweep.title}: {len(done)} of {len(sweep.jobs)}"
    if done:
        left = sum(status["runs"].get(job.name) in ("waits", "runs") for job in sweep.jobs)
        title += f", about {_duration(left * sum(done) / len(done))} left"
    table = Table(title=title, title_justify="left")
    table.add_column("run", no_wrap=True, min_width=max(len(job.name) for job in sweep.jobs))
    for column in ("state", "test"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    going = next((i for i, job in enumerate(sweep.jobs) if status["runs"].get(job.name) == "runs"), len(sweep.jobs) - 1)
    room = max(3, height - 6)
    for job in sweep.jobs[max(0, going - room + 3) :][:room]:
        state = status["runs"].get(job.name, "done" if told[job.name] else "not asked for")
        if state == "runs":
            state = _goes_on(output / job.name, status)
        test = told[job.name]["metrics"]["test"] if told[job.name] else {}
        first = next((name for name in (*sweep.metrics, *test) if name in test), None)
        value = test[first]["value"] if first else None
        table.add_row(job.name, state, f"{first} {value:.3f}" if value is not None else "")
    return table


def _goes_on(folder: Path, status: Mapping[str, Any]) -> str:
    """Where a run is: its step of how many, since when, and how long still."""
    try:
        os.kill(status["process"], 0)
    except ProcessLookupError:
        return "was ended; the same command goes on"
    except PermissionError:  # it is there, and another user's
        pass
    text = f"runs for {_duration(time.time() - status['since'])}"
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = [json.loads(line) for line in file.read().splitlines()[-3:] if line.endswith(b"}")]
        config = Folder(folder).config()
        total = Folder(folder).task(config).total_steps
    except (OSError, ValueError):  # it has not come to its first step, or writes at this moment
        return text
    text += f", step {lines[-1]['step']} of {total}" if lines else ""
    speed = next((line["images_per_second"] for line in reversed(lines) if "images_per_second" in line), None)
    if speed:
        text += f", {_duration((total - lines[-1]['step']) * config.train.batch_size / speed)} left"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
