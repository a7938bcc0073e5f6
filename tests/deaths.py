"""Runs of tiny models in processes of their own, which die, or meet something else, at a chosen moment."""

import json
import multiprocessing
import os
import resource
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from support import TINY, lines, trained

from vitft_jax import cli, digest, metrics, runtime, step, train, vit
from vitft_jax import config as configs

POINTS = {
    "train": (step, "train_step"),
    "eval": (step, "eval_step"),
    "save": (ocp.JsonCheckpointHandler, "async_save"),  # twice for each checkpoint, in the middle of its writing
    "saved": (digest, "write"),  # Orbax has finished a checkpoint, its digests are missing
}

_processes = multiprocessing.get_context("forkserver")  # pays for the imports once
_processes.set_forkserver_preload(["deaths"])


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fill():
    """From now on no file can grow beyond 4,000 bytes, so an array cannot be written: what a full disk is to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))


def run(config, folder, point="", nth=0, action=kill, delay=0.0):
    """Trains in a new process; returns its exit code (minus the signal's number) and what it said on standard error.

    `action` happens `delay` seconds after the process comes to a point for the n-th time.
    """
    arguments = (configs.to_json(config), str(folder), point, nth, action, delay)
    process = _processes.Process(target=_run, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode, Path(f"{folder}.err").read_text()


def _run(config, folder, point, nth, action, delay):
    os.dup2(os.open(f"{folder}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    runtime.start()
    metrics.RESAMPLES = 20
    vit.VARIANTS["tiny_test"] = TINY
    if point:
        owner, name = POINTS[point]
        real, calls = getattr(owner, name), []

        def counts(*args, **kwargs):
            calls.append(None)
            if len(calls) == nth:
                if delay:
                    threading.Timer(delay, action).start()
                else:
                    action()
            return real(*args, **kwargs)

        setattr(owner, name, counts)
    cli.main(lambda: train.train(configs.from_json(config), Path(folder)))


def assert_same(a, b):
    """Two run folders hold the same to the bit: state, loop, predictions, metrics, and every line of the log but speeds."""
    (state, loop), (state_b, loop_b) = trained(a), trained(b)
    jax.tree.map(np.testing.assert_array_equal, state, state_b)
    assert loop == loop_b
    for split in ("val", "test"):
        assert (a / f"predictions_{split}.csv").read_bytes() == (b / f"predictions_{split}.csv").read_bytes()
    assert without_speeds(a) == without_speeds(b)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    for key in ("metrics", "best_step", "method", "learning_rate_halved"):
        assert results[0][key] == results[1][key]


def without_speeds(folder):
    """The lines of the log, but for what the clock says."""
    return [{key: value for key, value in entry.items() if key != "images_per_second"} for entry in lines(folder)]
