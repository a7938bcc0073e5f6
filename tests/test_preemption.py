"""SIGTERM: to one of several processes it ends all of them after the same step, and none is lost."""

import signal
import socket
import subprocess
import sys

import pytest

from vitft_jax.errors import Preempted
from vitft_jax.preemption import Notice, end_at_once

LOOP = """
import os, sys, time
import jax
from vitft_jax.preemption import Notice, end_at_once

end_at_once().__enter__()
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
jax.process_count()
with Notice() as notice:
    for step in range(1, 400):
        print(step, flush=True)
        time.sleep(0.05)
        if notice.came(step):
            sys.exit(step % 200 + 1)
sys.exit(0)
"""


def fails_after_sigterm():
    with Notice():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("the loss is not finite")


def test_what_came_while_the_loop_failed_goes_on_to_who_listened_before():
    with end_at_once():
        with pytest.raises(Preempted):
            fails_after_sigterm()
        with Notice() as notice:
            signal.raise_signal(signal.SIGTERM)
            assert notice.came(1)  # and whoever asks has been told


def test_several_processes_end_after_the_same_step():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen([sys.executable, "-c", LOOP, str(port), str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    assert processes[1].stdout.readline() == "1\n"
    processes[1].send_signal(signal.SIGTERM)
    last = [process.communicate(timeout=120)[0].split()[-1] for process in processes]
    assert last[0] == last[1]
    assert [process.returncode for process in processes] == [int(last[0]) % 200 + 1] * 2
