"""The writer for Weights & Biases against the real package, offline: its own file holds each step once, over two starts."""

import json

import pytest

from vitft_jax import config as configs
from vitft_jax import loggers

pytestmark = pytest.mark.interop
BLOCK, HEADER = 32768, 7  # of a LevelDB log, in which W&B keeps its records


def records(path):
    """Of a file of W&B: whole ones (1), or pieces (2 first, 3 middle, 4 last), each with a checksum and a length."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, pieces = path.read_bytes(), HEADER, b""
    assert content.startswith(b":W&B")
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # what is left of a block is empty
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        pieces += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            yield Record.FromString(pieces)
            pieces = b""


def test_an_interrupted_run_is_one_run_with_each_step_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="needs wandb, of the extra `interop`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configs.default()
    config.log.wandb = "liver"

    def start(step, entries):
        with loggers.Log(config, tmp_path / "metrics.jsonl", step) as log:
            for entry in entries:
                log.write(*entry)

    start(0, [(1, "train", {"loss": 1.0}), (2, "train", {"loss": 2.0}), (2, "val", {"loss": 0.5})])
    start(1, [(2, "train", {"loss": -2.0}), (3, "train", {"loss": 3.0, "nan": float("nan")})])
    assert "warning" not in capsys.readouterr().out

    ids, history = set(), {}
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files
    for path in files:
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert record.run.project == "liver"
            if record.HasField("history"):
                row = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                values = {key: value for key, value in row.items() if not key.startswith("_")}
                assert row["_step"] not in history
                history[row["_step"]] = values
    assert ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    assert history == {
        1: {"train/loss": 1.0},
        2: {"train/loss": 2.0, "val/loss": 0.5},
        3: {"train/loss": 3.0},
    }
