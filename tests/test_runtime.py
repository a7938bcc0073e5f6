import subprocess
import sys

import pytest

from vitft_jax import runtime

STEPS = """
import resource, sys
import jax, numpy as np
from vitft_jax import runtime
if sys.argv[1] == "kept":
    runtime.start()
f = jax.jit(lambda x: x + 1)
x = jax.device_put(np.ones((8_000, 2_000), np.float32))
for i in range(8):
    f(x).block_until_ready()
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(runtime._glibc() is None, reason="needs Linux with glibc")
def test_kept_memory_does_not_fault_again_at_every_step():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "default")
    }
    assert faults["default"] > 4 * 64e6 / 4096 / 2  # 64 MB a step on pages of 4 KiB, at least half of them
    assert faults["kept"] < faults["default"] / 20


def test_release_gives_memory_back_and_can_be_called_anywhere():
    runtime.release()
