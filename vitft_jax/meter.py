"""What the steps of a run said since the last line of its log, and how fast they were."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

LOG_EVERY = 10  # steps between lines in metrics.jsonl


class Meter:
    """Means of the step metrics, and the speed of training without compilation and evaluation.

    Values stay on the device until they are asked for, so that no step waits for the one before it to be read.
    """

    def __init__(self, batch_size: int, pending: Sequence[Mapping[str, float]] = ()) -> None:
        """Starts with what `pending` returned of an interrupted run."""
        self._batch_size = batch_size
        self._values: list[dict[str, Any]] = [{k: np.float32(v) for k, v in values.items()} for values in pending]
        self.indices: list[np.ndarray] = []  # in the dataset, of the last batches
        self._steps, self._seconds, self._since = 0, 0.0, math.nan
        self.loss = math.nan

    def add(self, values: dict[str, jax.Array], indices: np.ndarray) -> None:
        """Takes the metrics of a step that was dispatched, and the positions of its images in the dataset."""
        if self._values:
            self.loss = float(self._values[-1]["loss"])  # of the step before: this one is still running
        self._values.append(values)
        self.indices = [*self.indices[1 - LOG_EVERY :], indices]
        if math.isnan(self._since):  # this step compiles: time goes on after it
            jax.block_until_ready(values)
            self.resume()
        else:
            self._steps += 1

    def pending(self) -> list[dict[str, float]]:
        """The metrics of the steps since `take`, as an interrupted run needs them to go on."""
        return [{key: float(value) for key, value in values.items()} for values in jax.device_get(self._values)]

    def not_finite(self) -> tuple[int, str] | None:
        """Of the steps since `take`, how long ago the first was whose metrics are not finite (0: the last), and what is not."""
        for ago, values in reversed(list(enumerate(reversed(self.pending())))):
            for key, value in values.items():
                if not math.isfinite(value):
                    return ago, f"the {key.replace('_', ' ')} is {value}"
        return None

    def take(self) -> dict[str, float]:
        """Means since it was last called, and the speed so far."""
        host = jax.device_get(self._values)
        self._values = []
        means = {key: float(np.mean([values[key] for values in host])) for key in host[0]}
        self.loss = float(host[-1]["loss"])
        return {**means, "images_per_second": self.images_per_second}

    def pause(self) -> None:
        """Stops the clock; call it when the device is idle."""
        self._seconds += time.perf_counter() - self._since

    def leave_out_next(self) -> None:
        """Leaves the next step out, as the first: it compiles. Call it when the device is idle."""
        self.pause()
        self._since = math.nan

    def resume(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Images per second of training; NaN until the second step."""
        seconds = self._seconds + time.perf_counter() - self._since
        return self._steps * self._batch_size / seconds if self._steps else math.nan
