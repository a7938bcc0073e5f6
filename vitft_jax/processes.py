"""Several processes that train one model, on as many hosts or on one: how they start, and what the first does alone.

Every process runs the same command. Each reads its own rows of a batch, all write checkpoints, and the first alone writes
every other file and speaks. The work directory is one that all of them see.
"""

import argparse
import os
import sys
import time

import jax
from jax.experimental import multihost_utils

from vitft_jax.errors import InputError

_together = False


def add_flags(arguments: argparse.ArgumentParser) -> None:
    """Adds the flags that `start` reads."""
    group = arguments.add_argument_group("several processes, each started with the same command")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="train together; TPU, SLURM and Open MPI say by themselves who is who",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: address of the first process,")
    group.add_argument("--process_id", type=int, help="the number of this one, from 0,")
    group.add_argument("--process_count", type=int, help="and how many there are")


def start(flags: argparse.Namespace) -> None:
    """Joins the other processes where `--distributed` says so; call it before JAX computes anything.

    Raises:
        InputError: Flags are missing or contradict each other, or the others cannot be found.
    """
    by_hand = {name: getattr(flags, name) for name in ("coordinator", "process_id", "process_count")}
    given = [f"--{name}" for name, value in by_hand.items() if value is not None]
    if not flags.distributed:
        if given:
            raise InputError(f"{', '.join(given)}: only with --distributed")
        return
    if given and len(given) < len(by_hand):
        raise InputError(
            f"{', '.join(given)}: give all of --{', --'.join(by_hand)}, or none where JAX finds them itself"
        )
    if given and not 0 <= flags.process_id < flags.process_count:
        raise InputError(f"--process_id {flags.process_id}: from 0 to --process_count - 1, {flags.process_count - 1}")
    global _together
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU devices; others have their own
    try:
        jax.distributed.initialize(flags.coordinator, flags.process_count, flags.process_id)
    except (ValueError, RuntimeError) as error:
        hint = (
            "" if given else "; where JAX cannot tell who is who, give --coordinator, --process_id and --process_count"
        )
        raise InputError(f"--distributed: {str(error).splitlines()[0]}{hint}") from error
    _together = True
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def together() -> bool:
    """Whether there are others; does not start JAX."""
    return _together


def leave(code: int, alone: bool = True) -> None:
    """Ends this process at once, after a fault; returns where there are no others.

    An orderly end would wait for the others, which wait for this one. The service by which they know of each other lives in
    the first, so it gives those that meet the same fault a moment to say so; unless `alone` is False, where they are gone, and
    JAX is about to abort what is left.
    """
    if not _together:
        return
    sys.stdout.flush()
    if alone and first():
        time.sleep(3)
    os._exit(code)


def wait(where: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
