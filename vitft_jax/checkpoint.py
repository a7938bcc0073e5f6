"""Checkpoints of a run, by Orbax: the newest, to go on from, and the best, to use.

A checkpoint holds three items: `trainable` (adapters and head, or the whole model where it trains), `optimizer` and
`loop` (input position, best metric so far). Frozen weights are named in `run.json`, not stored; a quantised run stores all.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vitft_jax.errors import InputError
from vitft_jax.sharding import ONE_DEVICE, Layout
from vitft_jax.step import State

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes


class Checkpoints:
    """The checkpoints of one run folder; a context manager."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        """Opens `folder`, which is created unless `read_only`."""
        newest_and_best = policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.BestN(n=1, get_metric_fn=_rank)]
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=newest_and_best,
                best_fn=_rank,
                enable_async_checkpointing=False,
                create=not read_only,
                read_only=read_only,
            ),
            item_handlers={
                "trainable": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "loop": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, state: State, loop: dict[str, Any], rank: Sequence[float]) -> None:
        """Saves a checkpoint whole or not at all. The best has the highest `rank`; of equal ranks, the first."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
                loop=ocp.args.JsonSave(loop),
            ),
            metrics={"rank": [*rank, -int(state.step)]},
        )

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
            InputError: There is no checkpoint.
        """
        step = self._manager.best_step()
        if step is None:
            raise InputError(f"{self._folder}: no checkpoint here; train the run first")
        if like is None:
            saved = self._manager.item_metadata(step)["trainable"].tree
            wanted = layout.shapes(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), saved))
        else:
            wanted = _abstract(like)
        args = ocp.args.Composite(trainable=ocp.args.StandardRestore(wanted))
        return self._manager.restore(step, args=args)["trainable"], step


def _rank(metrics: dict[str, list[float]]) -> tuple[float, ...]:
    return tuple(metrics["rank"])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=x.sharding), tree)
