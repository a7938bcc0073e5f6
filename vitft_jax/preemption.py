"""SIGTERM, with which schedulers announce that they are about to kill a process.

A command ends at once (`end_at_once`), but training finishes its step and saves a checkpoint first (`Notice`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from vitft_jax.errors import Preempted


@contextmanager
def end_at_once() -> Iterator[None]:
    """Within, SIGTERM raises `Preempted` wherever the main thread is."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise Preempted("terminated; the same command goes on from the last checkpoint, or starts again if there is none")


class Notice:
    """Holds SIGTERM back while the training loop runs, which asks for it between steps; a context manager.

    Where the loop ends without having asked, such as by an error, the signal goes on to whoever listened before.

    With several processes JAX's own service takes the signal, whichever process gets it, and finds the step at which
    all of them can end.
    """

    def __init__(self) -> None:
        self._many = jax.process_count() > 1
        self._holds = not self._many and threading.current_thread() is threading.main_thread()
        self._came = self._told = False

    def __enter__(self) -> "Notice":
        if self._holds:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._holds:
            signal.signal(signal.SIGTERM, self._before)
            if self._came and not self._told:
                signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def came(self, step: int) -> bool:
        """Whether to end after this many steps; each process must ask after every step."""
        if self._many:
            return multihost_utils.reached_preemption_sync_point(step)
        self._told = self._came
        return self._told
