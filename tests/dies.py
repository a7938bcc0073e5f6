"""A process of its own: trains the tiny model of the tests, and is killed before a step (0 = never).

python tests/dies.py STEP [flags of vitft_jax.train]
"""

import os
import signal
import sys
import time

from support import TINY

from vitft_jax import cli, metrics, processes, step, train, vit

if __name__ == "__main__":
    vit.VARIANTS["tiny_test"] = TINY
    metrics.RESAMPLES = 20
    last, real, calls = int(sys.argv[1]), step.train_step, []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == last:
            processes.wait("all have come to this step")
            time.sleep(1)  # so that none sees another one gone
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    step.train_step = counted
    cli.main(lambda: train.main(sys.argv[2:]))
