"""Sweeps: what a file becomes, what runs, what is skipped, and the tables of what came out."""

import csv
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sweep
from PIL import Image

from vitft_jax import metrics
from vitft_jax.errors import InputError

FILE = """
title = "Study"
metrics = ["accuracy", "f1_macro"]
x = "lora.rank"
[base]
config = "configs/lora.py"
"train.epochs" = 8
[grid]
"lora.rank" = [2, 4]
seed = [0, 1]
"""
ARMS = """
[grid]
seed = [0, 1]
[[arms]]
name = "QAT!"
config = "configs/qat.py"
methods = ["quant", "lora"]
"model.pretrained" = "@LoRA"
[[arms]]
name = "PTQ"
quantize = "QAT!"
options = ["--static", "mse"]
[[arms]]
name = "LoRA"
config = "configs/lora.py"
"""


def written(folder, text):
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def made(folder, accuracy, groups=20):
    """A run folder with predictions of two classes, of which a share is right."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.arange(2 * groups) // 2 % 2
    right = rng.permutation(len(labels)) < accuracy * len(labels)
    p = np.where(right == labels, 0.8, 0.2)
    decided = (p > 0.5).astype(int)
    with (folder / "predictions_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group", "true", "predicted", "p:a", "p:b"])
        for i, (label, chosen, share) in enumerate(zip(labels, decided, p, strict=True)):
            writer.writerow([f"{i}.png", str(i // 2), "ab"[label], "ab"[chosen], 1 - share, share])
    values = metrics.compute(np.stack([1 - p, p], axis=1), labels, False, decided)
    summary = {
        "metrics": {"test": {name: {"value": v, "low": v - 0.1, "high": v + 0.1} for name, v in values.items()}},
        "parameters": {"trainable": 10, "trainable_percent": 1.0},
        "bytes": {"trainable": 10**6, "frozen": 10**6},
        "timing": {"seconds": 3.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def trains(monkeypatch):
    """Stands in for the commands: each makes a run, or fails where its command holds a word; returns what was called."""
    called, failing = [], []

    def run(command, stdout, **_):
        called.append(command)
        if any(word in part for part in command for word in failing):
            stdout.write("Traceback\nerror: no such thing\n")
            return subprocess.CompletedProcess(command, 2)
        folder = Path(command[command.index("--output" if "vitft_jax.quantize" in command else "--workdir") + 1])
        made(folder, 0.5 + 0.02 * len(called))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return called, failing


def test_a_grid_is_every_combination_with_the_keys_of_base_and_changes(tmp_path):
    study = sweep.read(written(tmp_path, FILE), ["train.epochs=2", "data.path=a=b"])
    assert [job.name for job in study.jobs] == [f"rank{rank}_seed{seed}" for rank in (2, 4) for seed in (0, 1)]
    assert study.jobs[3].command == (
        "-m", "vitft_jax.train", "--config", "configs/lora.py", "--workdir", "@/rank4_seed1", "--config.train.epochs=2",
        "--config.data.path=a=b", "--config.lora.rank=4", "--config.seed=1",
    )  # fmt: skip
    assert study.jobs[0].row == study.jobs[1].row != study.jobs[2].row


def test_arms_are_made_from_each_other_in_order(tmp_path):
    jobs = {job.name: job for job in sweep.read(written(tmp_path, ARMS)).jobs}
    assert set(jobs) == {f"{arm}_seed{seed}" for arm in ("LoRA", "QAT", "PTQ") for seed in (0, 1)}
    order = list(jobs)
    for seed in (0, 1):
        lora, qat, ptq = (f"{arm}_seed{seed}" for arm in ("LoRA", "QAT", "PTQ"))
        assert order.index(lora) < order.index(qat) < order.index(ptq)
        assert f"--config.model.pretrained=@/{lora}" in jobs[qat].command
        assert "--config.methods=quant,lora" in jobs[qat].command
        assert jobs[ptq].command == (
            "-m", "vitft_jax.quantize", "--workdir", f"@/{qat}", "--output", f"@/{ptq}", "--static", "mse"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grid = 3 =", "no sweep"),
        ("[gird]\nseed=[0]", "unknown key 'gird'.*grid"),
        ("[grid]\nseed=0", "grid.seed = 0: a list"),
        ("x='lora.rank'\n[base]\nconfig='a'\n[grid]\nseed=[0]", "not a key of the grid, which has seed"),
        ("[[arms]]\nconfig='a'\n[[arms]]\nname='b'\nconfig='a'", "each needs a name"),
        ("[[arms]]\nname='b'\nconfig='a'\n[[arms]]\nname='b!'\nconfig='a'", "two runs of one name"),
        ("[[arms]]\nname='b'\nquantize='c'", "made from 'c'; choose one of b"),
        ("[[arms]]\nname='b'\nquantize='b'", "made from itself"),
        ("[[arms]]\nname='b'\nquantize='b'\nseed=1", "has no 'seed'"),
        ("[base]\nseed=1", "'config' names its file"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        sweep.read(written(tmp_path, text))


def test_what_is_done_is_skipped_and_what_fails_stops_nothing_else(tmp_path, trains, capsys):
    called, failing = trains
    failing.append("--config.lora.rank=2")
    study, output = sweep.read(written(tmp_path, FILE)), tmp_path / "runs"
    assert sweep.run(study, output) == {
        "rank2_seed0": "failed: error: no such thing",
        "rank2_seed1": "failed: error: no such thing",
        "rank4_seed0": "done",
        "rank4_seed1": "done",
    }
    assert "2/4 done; rank4_seed1: done" in capsys.readouterr().out
    failing.clear()
    called.clear()
    assert set(sweep.run(study, output).values()) == {"done"}
    assert len(called) == 2
    sweep.run(study, output)
    assert len(called) == 2


def test_what_is_made_from_a_run_that_failed_is_left_out(tmp_path, trains):
    called, failing = trains
    failing.append("LoRA_seed0")
    state = sweep.run(sweep.read(written(tmp_path, ARMS)), tmp_path / "runs")
    assert [name for name, text in state.items() if text == "done"] == ["LoRA_seed1", "QAT_seed1", "PTQ_seed1"]
    assert state["PTQ_seed0"] == "left out: QAT_seed0 is not there"
    assert not any("@/" in part for command in called for part in command)


def test_a_run_that_was_ended_from_outside_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 75))
    with pytest.raises(KeyboardInterrupt):
        sweep.run(sweep.read(written(tmp_path, FILE)), tmp_path / "runs")


@pytest.mark.parametrize("text", [FILE, ARMS], ids=["lines", "bars"])
def test_tables_and_figure(tmp_path, trains, capsys, text):
    sweep.main([str(written(tmp_path, text)), "--output", str(tmp_path / "runs")])
    with (tmp_path / "runs" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [job.name for job in sweep.read(tmp_path / "study.toml").jobs]
    lines = (tmp_path / "runs" / "results.md").read_text().splitlines()
    assert "\n".join(lines) in capsys.readouterr().out
    head, _, *table = [line[2:-2].split(" | ") for line in lines if line.startswith("|")]
    assert len(table) == len(rows) // 2
    for i, cells in enumerate(table):
        found = dict(zip(head, cells, strict=True))
        mean = np.mean([float(row["accuracy"]) for row in rows[2 * i : 2 * i + 2]]) if text == FILE else None
        value, low, high = map(float, re.findall(r"[\d.]+", found["accuracy"]))
        assert low <= value <= high
        assert mean is None or abs(value - mean) < 5.1e-4
        assert (found["seeds"], found["MB"]) == ("2", "2.0")
    with Image.open(tmp_path / "runs" / "figure.png") as picture:
        assert picture.width > 1000


def test_a_metric_that_the_task_does_not_have(tmp_path, trains):
    study = written(tmp_path, FILE.replace("f1_macro", "hamming"))
    with pytest.raises(InputError, match=r"no 'hamming'; the task has accuracy, "):
        sweep.main([str(study), "--output", str(tmp_path / "runs")])
    with pytest.raises(InputError, match="no run of the sweep is done"):
        sweep.main([str(study), "--output", str(tmp_path / "nothing"), "--table"])


def test_the_sweeps_of_the_project_can_be_read():
    files = sorted((Path(__file__).parent.parent / "configs" / "sweeps").glob("*.toml"))
    assert len(files) >= 4
    for file in files:
        for job in sweep.read(file).jobs:
            if "--config" in job.command:
                assert Path(file.parent.parent.parent, job.command[job.command.index("--config") + 1]).is_file()
