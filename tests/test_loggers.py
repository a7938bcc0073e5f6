"""Where the numbers of training go: what TensorBoard's own reader reads back, and what a recorded W&B is told."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from support import lines

from vitft_jax import config as configs
from vitft_jax import loggers, processes, train
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder

RANKS = {
    "loss": 0.5,
    "ranks": {"blocks_0/attn/query": 3, "blocks_1/attn/query": 4},
    "nan": float("nan"),
    "text": "no number",
}


def config_with(**changes):
    config = configs.default()
    config.log.update(changes)
    return config


def write(config, folder, step, entries):
    """One start of a run that goes on after `step`: `entries` are (step, split, values)."""
    with loggers.Log(config, folder / "metrics.jsonl", step) as log:
        for entry in entries:
            log.write(*entry)


def scalars(folder):
    """(step, value) of every tag, as TensorBoard reads the events of a run."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard, of the extra `interop`"
    )
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboardX", reason="needs tensorboardX, of the extra `dev`")
    return config_with(tensorboard=True)


class FakeWandB(ModuleType):
    """Records what is asked of it; as the real one, it sends a row when the next one begins, or at the end."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.started, self.rows, self.ended, self.pending = [], [], [], None
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        self.started.append(arguments)
        self.pending = None  # of a process that was killed
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        if self.pending is not None and self.pending[0] != step:
            self.rows.append(self.pending)
            self.pending = None
        self.pending = (step, {**(self.pending[1] if self.pending else {}), **values})

    def finish(self, exit_code):
        self.rows += [self.pending] if self.pending else []
        self.pending = None
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_without_writers_there_are_the_lines_alone(tmp_path):
    write(config_with(), tmp_path, 0, [(1, "train", RANKS)])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert lines(tmp_path) == [{"step": 1, "split": "train", **RANKS, "nan": None}]


def test_events_are_the_numbers_of_the_lines(tensorboard, tmp_path):
    write(tensorboard, tmp_path, 0, [(1, "train", RANKS), (1, "val", {"loss": 0.25}), (2, "train", {"loss": 0.125})])
    assert scalars(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 0.125)],
        "train/ranks/blocks_0/attn/query": [(1, 3)],
        "train/ranks/blocks_1/attn/query": [(1, 4)],
        "val/loss": [(1, 0.25)],
    }


def test_a_run_that_goes_on_takes_back_the_events_after_its_checkpoint(tensorboard, tmp_path):
    for start, steps in (
        (0, (1, 2, 3, 4, 5)),
        (3, (4, 5, 6)),
        (3, (4,)),
        (4, (5, 6, 7)),
    ):  # more than one start a second
        write(tensorboard, tmp_path, start, [(step, "train", {"loss": step + start / 8}) for step in steps])
    expected = [(1, 1), (2, 2), (3, 3), (4, 4.375), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert scalars(tmp_path)["train/loss"] == expected == [(e["step"], e["loss"]) for e in lines(tmp_path)]


def test_wandb_is_told_each_step_once(wandb, tmp_path):
    config = config_with(wandb="liver")
    folder = tmp_path / "run"
    folder.mkdir()
    entries = [
        (1, "train", {"loss": 1}),
        (2, "train", {"loss": 2}),
        (3, "train", {"loss": 3}),
        (3, "val", {"loss": 0.5}),
    ]
    with pytest.raises(TypeError, match="after"):  # training is cut off
        write(config, folder, 0, [*entries, None])
    write(config, folder, 2, [(3, "train", {"loss": -3}), (4, "train", {"loss": 4})])
    assert wandb.rows == [
        (1, {"train/loss": 1}),
        (2, {"train/loss": 2}),
        (3, {"train/loss": 3, "val/loss": 0.5}),
        (4, {"train/loss": 4}),
    ]
    assert wandb.ended == [1, 0]
    first, second = wandb.started
    assert first["id"] == second["id"] == json.loads((folder / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"], first["dir"]) == ("liver", "run", str(folder))
    assert first["resume"] == "allow"
    assert first["config"] == config.to_dict()
    assert "mode" not in first  # W&B's own setting holds


def test_wandb_loses_no_step_of_a_run_that_is_killed(wandb, tmp_path):
    config = config_with(wandb="liver")
    killed = loggers.Log(config, tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        killed.write(step, "train", {"loss": step})
    assert [step for step, _ in wandb.rows] == [1, 2]  # the third has not left yet
    write(config, tmp_path, 1, [(2, "train", {"loss": 2}), (3, "train", {"loss": 3})])
    assert wandb.rows == [(step, {"train/loss": step}) for step in (1, 2, 3)]


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_writer_that_fails_is_told_once_and_ends_nothing(wandb, tmp_path, monkeypatch, capsys, place):
    def fails(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(wandb, place, fails)
    write(config_with(wandb="liver"), tmp_path, 0, [(step, "train", {"loss": step}) for step in (1, 2, 3)])
    assert [entry["loss"] for entry in lines(tmp_path)] == [1, 2, 3]
    said = capsys.readouterr().out
    assert said.startswith("warning: log.wandb: ConnectionError: no network; training goes on without it")
    assert said.count("\n") == 1


def test_a_full_disk_ends_the_events_and_not_the_run(tensorboard, tmp_path, monkeypatch, capsys):
    from tensorboardX.event_file_writer import EventsWriter

    log = loggers.Log(tensorboard, tmp_path / "metrics.jsonl", 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "flush", full)
    for step in range(1, 30):
        log.write(step, "train", {"loss": 1.0})
    assert len(lines(tmp_path)) == 29
    assert capsys.readouterr().out.count("warning: log.tensorboard: OSError") == 1


def test_the_first_process_alone_writes(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "first", lambda: False)
    write(config_with(wandb="liver", tensorboard=True), tmp_path, 0, [(1, "train", {"loss": 1.0})])
    assert not list(tmp_path.iterdir())
    assert not wandb.started


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb", "liver")])
def test_a_package_that_is_not_there_is_told_with_its_extra_before_the_run_begins(
    tiny_config, tmp_path, monkeypatch, key, value
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tiny_config.log[key] = value
    with pytest.raises(InputError, match=rf"log.{key}={value!r}: .*pip install 'vitft_jax\[{key}\]'"):
        train.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_training_tells_the_writers_what_it_logs(tiny_config, wandb, tmp_path):
    tiny_config.log.wandb = "liver"
    tiny_config.train.steps = 3
    folder = tmp_path / "run"
    train.train(tiny_config, folder)
    rows = dict(wandb.rows)
    assert wandb.ended == [0]
    assert rows.keys() == {entry["step"] for entry in lines(folder)}
    for entry in lines(folder):
        assert rows[entry["step"]][f"{entry['split']}/loss"] == entry["loss"]


def test_a_run_may_go_on_with_other_writers(tiny_config, tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(tiny_config))
    (tmp_path / "run.json").write_text("{}")
    tiny_config.log.tensorboard = True
    folder.check(tiny_config)
    tiny_config.seed = 1
    with pytest.raises(InputError, match="it differs in seed"):
        folder.check(tiny_config)
