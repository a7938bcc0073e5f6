"""Where the numbers of training go: always to `metrics.jsonl`, and if wanted to TensorBoard and Weights & Biases.

All of them get the same numbers at the same steps, named `<split>/<name>`, less those that are not finite. A run that was
interrupted goes on in the same streams:

- TensorBoard: each start writes an event file into `tensorboard/` in the run. It begins by taking back every event after the
  checkpoint that the run goes on from, and readers leave those out.
- Weights & Biases: each start joins the same W&B run, which `wandb.json` in our run names. What was sent is not sent again and
  cannot be taken back, not even where ``train.nan_retries`` trains steps anew. W&B's own settings hold, such as the
  environment variable WANDB_MODE=offline. The config is sent, with its paths; no images and no predictions are.

A writer that fails ends no training: there is one warning, and training goes on without it. The first process alone writes.
"""

import importlib.util
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from vitft_jax import processes, report, tree
from vitft_jax.config import Config
from vitft_jax.errors import InputError

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package that a key of ``config.log`` needs; the extra has the name of the key."""


class Writer(Protocol):
    """Something that takes numbers. It may raise whatever it likes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes what was measured at a step, by name; steps do not fall."""

    def close(self, failed: bool) -> None:
        """Ends the stream for this time; `failed`: training was cut off."""


class TensorBoard:
    """Events in the folder `tensorboard/` of a run.

    tensorboardX writes the records, each at once: its `SummaryWriter` leaves that to a thread, and waits for ever once that has
    died of a full disk.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        """Opens a new event file, which takes back what older ones hold after `step`."""
        self._event = import_module("tensorboardX.proto.event_pb2")
        self._summary = import_module("tensorboardX.proto.summary_pb2").Summary
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))  # in the name: two files of one second would have one name
        writer = import_module("tensorboardX.event_file_writer").EventsWriter
        self._file = writer(str(folder / "events"), f".{number:04d}")
        self._put(step + 1, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one event."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._put(step, summary=self._summary(value=scalars))

    def close(self, failed: bool) -> None:
        """Closes the file."""
        self._file.close()

    def _put(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event.Event(wall_time=time.time(), step=step, **content))
        self._file.flush()


class WandB:
    """A run of Weights & Biases, which `wandb.json` in our run's folder names.

    W&B sends a step when the next one begins. Only then `wandb.json` counts it as sent, so a run that is killed loses none.
    """

    def __init__(self, workdir: Path, config: Config) -> None:
        """Joins the W&B run, or starts one."""
        wandb = import_module("wandb")
        self._path = workdir / "wandb.json"
        if self._path.exists():
            self._state = json.loads(self._path.read_text(encoding="utf-8"))
        else:
            self._state = {"id": secrets.token_hex(8), "sent": 0}
            report.write_json(self._path, self._state)
        self._step = self._state["sent"]
        self._run = wandb.init(
            project=config.log.wandb,
            id=self._state["id"],
            resume="allow",
            name=workdir.resolve().name,
            dir=str(workdir),
            config=config.to_dict(),
            settings=wandb.Settings(console="off"),  # what is on the screen stays here
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs what was not sent yet."""
        if step <= self._state["sent"]:
            return
        if step > self._step:
            self._sent()
        self._run.log(dict(values), step=step)
        self._step = step

    def close(self, failed: bool) -> None:
        """Sends the rest; W&B waits for its server, if it has one."""
        self._run.finish(exit_code=int(failed))
        self._sent()

    def _sent(self) -> None:
        self._state["sent"] = self._step
        report.write_json(self._path, self._state)


def check(config: Config) -> None:
    """Refuses a writer whose package is not there.

    Raises:
        InputError: Names the extra to install.
    """
    for key, package in _PACKAGES.items():
        if config.log[key] and importlib.util.find_spec(package) is None:
            raise InputError(
                f"config key log.{key}={config.log[key]!r}: the package {package} is not installed; "
                f"pip install 'vitft_jax[{key}]', or leave this key out"
            )


class Log:
    """The log of a run: `metrics.jsonl`, and the writers of ``config.log``; a context manager."""

    def __init__(self, config: Config, path: Path, step: int) -> None:
        """Goes on after `step` in the run that has its `metrics.jsonl` at `path`."""
        self._lines = report.MetricsLog(path, step)
        self._writers: dict[str, Writer] = {}
        workdir = path.parent
        make: dict[str, Callable[[], Writer]] = {
            "tensorboard": lambda: TensorBoard(workdir, step),
            "wandb": lambda: WandB(workdir, config),
        }
        for key in make:
            if config.log[key] and processes.first():
                self._try(key, lambda key=key: self._writers.update({key: make[key]()}))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for key, writer in list(self._writers.items()):
            self._try(key, lambda writer=writer: writer.close(kind is not None))

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one line, and tells the writers the numbers in it."""
        self._lines.write(step, split, values)
        if not self._writers:
            return
        numbers = {f"{split}/{name}": value for name, value in tree.flatten(values).items() if isinstance(value, Real)}
        finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        for key, writer in list(self._writers.items()):
            self._try(key, lambda writer=writer: writer.write(step, finite))

    def _try(self, key: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of packages that are not ours
            self._writers.pop(key, None)
            what = (str(error) or "no message").splitlines()[0]
            print(
                f"warning: log.{key}: {type(error).__name__}: {what}; training goes on without it, and metrics.jsonl has "
                "everything",
                flush=True,
            )
