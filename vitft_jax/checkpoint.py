"""Checkpoints of a run, by Orbax: the newest, to go on from, and the best, to use.

A checkpoint holds three items: `trainable` (adapters and head, or the whole model where it trains), `optimizer` and
`loop` (input position, best metric so far). Frozen weights are named in `run.json`, not stored; a quantised run stores all.

Orbax does not notice bytes that change in an array later, so digests lie beside its files and are held against them before
these are read. The two newest checkpoints are kept, so that one is left where the other is damaged.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vitft_jax import digest, processes
from vitft_jax.errors import InputError, MachineError
from vitft_jax.sharding import ONE_DEVICE, Layout
from vitft_jax.step import State

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file it writes, and what it then raises too


_DROPPED = "dropped-"


class Checkpoints:
    """The checkpoints of one run folder; a context manager."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        """Opens `folder`; unless `read_only` creates it, and drops damaged checkpoints with a warning.

        Where the best is damaged those after it are dropped too, so that training finds it again.
        """
        newest_and_best = policies.AnyPreservationPolicy(
            [
                policies.LatestN(2),
                policies.BestN(n=1, get_metric_fn=_rank, keep_checkpoints_without_metrics=False),
            ]
        )
        self._folder = folder
        if not read_only:
            _first_alone(self._drop_damaged)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=newest_and_best,
                best_fn=_rank,
                enable_async_checkpointing=False,
                create=not read_only,
                cleanup_tmp_directories=not read_only,  # what a process left that was killed while it wrote
                read_only=read_only,
            ),
            item_handlers={
                "trainable": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "loop": ocp.JsonCheckpointHandler(),
            },
        )
        if not read_only and self.latest_step is not None:
            args = ocp.args.Composite(loop=ocp.args.JsonRestore())
            best = self._manager.restore(self.latest_step, args=args)["loop"].get("best_step")
            if best is not None and best not in self._manager.all_steps():
                _first_alone(lambda: self._drop_after(best))
                self._manager.reload()

    def _drop_damaged(self) -> None:
        for dropped in self._folder.glob(f"{_DROPPED}*"):
            shutil.rmtree(dropped)
        *older, newest = _steps(self._folder) or [None]
        if newest is not None and not digest.known(self._folder / str(newest)):
            digest.write(
                self._folder / str(newest)
            )  # killed between a checkpoint, which Orbax renames whole, and its digests
        for step in (*older, *([] if newest is None else [newest])):
            path = self._folder / str(step)
            if damage := digest.damage(path) if digest.known(path) else f"{digest.FILE} is missing":
                print(f"warning: checkpoint {path} is damaged and dropped: {damage}", flush=True)
                self._drop(step)

    def _drop_after(self, best: int) -> None:
        print(f"warning: the best checkpoint, {self._folder / str(best)}, is lost; training goes back to before it")
        for step in _steps(self._folder):
            if step > best:
                self._drop(step)

    def _drop(self, step: int) -> None:
        """Removes a checkpoint; renamed first, so that a process killed in between leaves no half that looks whole."""
        dropped = self._folder / f"{_DROPPED}{step}"
        os.replace(self._folder / str(step), dropped)
        shutil.rmtree(dropped)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, state: State, loop: dict[str, Any], rank: Sequence[float] | None) -> None:
        """Saves a checkpoint whole or not at all. The best has the highest `rank`; of equal ranks, the first.

        Args:
            state: What training changes.
            loop: What else it needs to go on; JSON. `best_step` in it names the checkpoint that must not get lost.
            rank: None for a checkpoint that can never be the best.

        Raises:
            MachineError: It could not be written.
        """
        step = int(state.step)
        hook, sys.unraisablehook = sys.unraisablehook, _late_writes_aside
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(state.trainable),
                    optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
                    loop=ocp.args.JsonSave(loop),
                ),
                metrics=None if rank is None else {"rank": [*rank, -step]},
            )
            if processes.first():
                digest.write(self._folder / str(step))
            sys.unraisablehook = hook
        except (OSError, ValueError) as error:
            raise MachineError(
                f"{self._folder}: the checkpoint of step {step} could not be written ({_reason(error)}). "
                "Make room or mend the disk; the same command then goes on from the checkpoint before"
            ) from error

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The newest checkpoint in the shapes of `like`, and its `loop`."""
        args = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(_abstract(like.trainable)),
            optimizer=ocp.args.StandardRestore(_abstract({"step": like.step, "state": like.opt_state})),
            loop=ocp.args.JsonRestore(),
        )
        items = self._manager.restore(self.latest_step, args=args)
        return State(items["optimizer"]["step"], items["trainable"], items["optimizer"]["state"]), items["loop"]

    def restore_best(self, like: Any, layout: Layout = ONE_DEVICE) -> tuple[Any, int]:
        """The trainable variables of the best checkpoint and its step.

        In the shapes and places of `like`; where that is None in the shapes that were saved, placed by `layout`.

        Raises:
            InputError: There is no checkpoint, or it is damaged.
        """
        step = self._manager.best_step()
        if step is None:
            raise InputError(f"{self._folder}: no checkpoint here; train the run first")
        if damage := digest.damage(self._folder / str(step)):
            raise InputError(
                f"{self._folder / str(step)}: the best checkpoint is damaged ({damage}); restore it from a copy, or delete "
                "summary.json and train on: training then goes back to before it"
            )
        if like is None:
            saved = self._manager.item_metadata(step)["trainable"].tree
            wanted = layout.shapes(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), saved))
        else:
            wanted = _abstract(like)
        args = ocp.args.Composite(trainable=ocp.args.StandardRestore(wanted))
        return self._manager.restore(step, args=args)["trainable"], step


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that Orbax has finished writing."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def _late_writes_aside(unraisable: Any) -> None:
    """Where one write fails Orbax closes its event loop, and TensorStore prints a traceback for each that ends after it."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _reason(error: Exception) -> str:
    """What the system said, which stands at the end of a long message."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return str(error).splitlines()[0]


def _first_alone(work: Callable[[], None]) -> None:
    """Runs something in the first process, while the others wait."""
    if processes.first():
        work()
    processes.wait("checkpoints")


def _rank(metrics: dict[str, list[float]]) -> tuple[float, ...]:
    return tuple(metrics["rank"])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=x.sharding), tree)
