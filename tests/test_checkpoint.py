"""Checkpoints that are damaged, or cannot be written."""

import errno
import os
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from support import largest

from vitft_jax import digest
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError, MachineError
from vitft_jax.step import State


def state(step):
    values = np.random.default_rng(step).standard_normal((20, 30)).astype(np.float32)
    return State(jnp.int32(step), {"params": {"kernel": jnp.asarray(values)}}, {"mean": jnp.asarray(values)})


def saved(folder, ranks):
    """Saves a checkpoint for each rank, at steps 1, 2, ..., as training does."""
    best = None
    with Checkpoints(folder) as checkpoints:
        for step, rank in enumerate(ranks, 1):
            if rank is not None and (best is None or rank > best[0]):
                best = rank, step
            checkpoints.save(state(step), {"best_step": best and best[1]}, None if rank is None else [rank])
    return folder


def newest(folder):
    """Step of the newest checkpoint, having made sure that it holds what was saved, and that it knows the best."""
    with Checkpoints(folder) as checkpoints:
        if checkpoints.latest_step is None:
            return None
        restored, loop = checkpoints.restore(state(0))
        best = checkpoints.restore_best(state(0).trainable)[1] if loop["best_step"] else None
    wanted = state(int(restored.step))
    np.testing.assert_array_equal(restored.trainable["params"]["kernel"], wanted.trainable["params"]["kernel"])
    np.testing.assert_array_equal(restored.opt_state["mean"], wanted.opt_state["mean"])
    assert loop["best_step"] == best
    return int(restored.step)


def damage(folder, step):
    """Flips a bit in the numbers of a checkpoint."""
    array = largest(folder / str(step) / "trainable")
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)


@pytest.mark.parametrize(
    ("ranks", "damaged", "left"),
    [
        ([1, 3, 2], [3], 2),
        ([3, 1, 2], [3], 2),
        ([3, 1, 2], [2, 3], 1),
        ([3, 1, 2], [2], 3),  # neither the newest nor the best: nothing is lost
        ([1, 3, 2], [2], None),  # the best, and only one that is newer is left
        ([1, 2, 3], [3], 2),  # the newest is the best
        ([1, None, None], [3], 2),
        ([3, 1, None], [1], None),
    ],
)
def test_training_goes_on_from_the_newest_whole_checkpoint_that_finds_the_best_again(
    tmp_path, capsys, ranks, damaged, left
):
    saved(tmp_path, ranks)
    for step in damaged:
        damage(tmp_path, step)
    assert newest(tmp_path) == left
    said = capsys.readouterr().out
    for step in damaged:
        assert f"warning: checkpoint {tmp_path / str(step)} is damaged and dropped: trainable/" in said
    assert newest(tmp_path) == left
    assert capsys.readouterr().out == ""
    with Checkpoints(tmp_path) as checkpoints:  # and can be saved again
        checkpoints.save(state(4), {"best_step": 4}, [9])
    assert newest(tmp_path) == 4


def test_without_damage_the_two_newest_and_the_best_are_kept(tmp_path):
    saved(tmp_path, [5, 9, 1, 2, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    assert newest(tmp_path) == 5


def test_what_was_not_validated_is_never_the_best(tmp_path):
    saved(tmp_path, [None])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="no checkpoint here"):
        checkpoints.restore_best(None)
    saved(tmp_path / "more", [-1e9, None, None])
    assert newest(tmp_path / "more") == 3


def test_a_best_checkpoint_that_is_damaged_is_not_used(tmp_path):
    saved(tmp_path, [3, 1, 2])
    damage(tmp_path, 1)
    message = r"1: the best checkpoint is damaged \(trainable/.* has changed\)"
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore_best(None)
    assert (tmp_path / "1").is_dir()  # nothing is dropped by who only reads


def test_what_the_system_says_is_passed_on(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing 'x': Failed to write [os_error_code='{errno.ENOSPC}']")

    saved(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(MachineError, match=rf"step 2 could not be written \({os.strerror(errno.ENOSPC)}\)"):
            checkpoints.save(state(2), {"best_step": 1}, [2])
    assert newest(tmp_path) == 1


def test_writes_that_end_after_the_first_failed_say_nothing(tmp_path, monkeypatch, capsys):
    """TensorStore tells the hook of an error in what it calls when a write has ended."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), {"best_step": None}, None)
        assert sys.unraisablehook is sys.__unraisablehook__
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(MachineError):
            checkpoints.save(state(2), {"best_step": None}, None)
    end_writes(RuntimeError("Event loop is closed"))
    assert capsys.readouterr().err == ""
    end_writes(RuntimeError("something else"))
    assert "something else" in capsys.readouterr().err


def end_writes(error):
    """A write ends, and what it calls raises."""

    def call(_):
        raise error

    promise, future = ts.Promise.new()
    future.add_done_callback(call)
    promise.set_result(None)


def test_a_checkpoint_without_digests_is_whole_only_where_it_is_the_newest(tmp_path, capsys):
    """A process may be killed before it writes the digests of the newest, or while it removes an older one."""
    saved(tmp_path, [3, 2, 1])
    (tmp_path / "3" / digest.FILE).unlink()
    assert newest(tmp_path) == 3
    assert digest.known(tmp_path / "3")
    damage(tmp_path, 3)
    assert newest(tmp_path) == 2
    saved(tmp_path / "b", [3, 2, 1])
    (tmp_path / "b" / "2" / digest.FILE).unlink()
    (tmp_path / "b" / "dropped-9").mkdir()
    assert newest(tmp_path / "b") == 3
    assert "sha256sum.txt is missing" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["1", "3"]
