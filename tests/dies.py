"""A process of its own: trains the tiny model of the tests, and something ends it before a step.

python tests/dies.py STEP:WHO:HOW [flags of vitft_jax.train]

STEP counts the steps of this process (0 = never), WHO is the number of a process or 'all', HOW the name of a signal or 'input',
a fault that this process alone meets.
"""

import os
import signal
import sys
import time

import jax
from support import TINY

from vitft_jax import cli, metrics, processes, step, train, vit
from vitft_jax.errors import InputError


def end(who, how):
    if who == "all":
        processes.wait("all have come to this step")
        time.sleep(1)  # so that none sees another one gone
    if who in ("all", str(jax.process_index())):
        if how == "input":
            raise InputError("an image that only this process reads")
        os.kill(os.getpid(), signal.Signals[how])


if __name__ == "__main__":
    vit.VARIANTS["tiny_test"] = TINY
    metrics.RESAMPLES = 20
    (last, who, how), real, calls = sys.argv[1].split(":"), step.train_step, []

    def counted(state, *args, **kwargs):
        calls.append(None)
        if len(calls) == int(last):
            jax.block_until_ready(
                state
            )  # while processes connect for the first time, JAX alone notices that one is gone
            end(who, how)
        return real(state, *args, **kwargs)

    step.train_step = counted
    cli.main(lambda: train.main(sys.argv[2:]))
