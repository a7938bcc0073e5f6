"""Sweeps: what a file becomes, what runs, what is skipped, and the tables of what came out."""

import csv
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeds
import sweep
import sweep_results
from PIL import Image

from vitft_jax import config as configs
from vitft_jax import methods, tree, vit
from vitft_jax.data import cases, splits
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
CONFIG = "config='configs/lora.py'\n"
ROOT = Path(__file__).parent.parent
LORA = str(ROOT / "configs" / "lora.py") if Path.cwd() != ROOT else "configs/lora.py"
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


@pytest.fixture
def trains(monkeypatch):
    """Stands in for the commands: each makes a run, or fails where its command holds a word; returns what was called."""
    called, failing = [], []

    def wait_for(command, log, look):
        called.append(command)
        look()
        if any(word in part for part in command for word in failing):
            log.write_text("Traceback\nerror: no such thing\n")
            return 2
        log.write_text("done\n")
        folder = Path(command[command.index("--output" if "vitft_jax.quantize" in command else "--workdir") + 1])
        folders.write(folder, seed=len(called))
        return 0

    monkeypatch.setattr(sweep, "_wait_for", wait_for)
    return called, failing


def test_a_grid_is_every_combination_with_the_keys_of_base_and_changes(tmp_path):
    study = sweep.read(written(tmp_path, FILE), ["train.epochs=2", "data.path=a=b"])
    assert [job.name for job in study.jobs] == [f"rank{rank}_seed{seed}" for seed in (0, 1) for rank in (2, 4)]
    assert study.jobs[3].command == (
        "-m", "vitft_jax.train", "--config", LORA, "--workdir", "@/rank4_seed1", "--config.train.epochs=2",
        "--config.data.path=a=b", "--config.lora.rank=4", "--config.seed=1",
    )  # fmt: skip
    assert study.jobs[0].row == study.jobs[2].row != study.jobs[1].row
    assert study.rows == (study.jobs[0].row, study.jobs[1].row)
    assert study.jobs[1].made["config"]["lora.rank"] == 4


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
        ("grid = 3", "grid = 3: a dict"),
        ("base = 3", "base = 3: a dict"),
        ("metrics = 'accuracy'", "metrics = 'accuracy': a list"),
        ("arms = []", r"one \[\[arms\]\] or more"),
        ("[[arms]]\nname = 1", "a text as its name"),
        ("x='lora.rank'\n[grid]\nseed=[0]", "not a key of the grid, which has seed"),
        ("x='dtype'\n[grid]\ndtype=['float32']", "an axis needs numbers"),
        ("x='seed'\n[grid]\nseed=[true]", "an axis needs numbers"),
        ("metrics=['acuracy']", "no 'acuracy'; did you mean 'accuracy'"),
        ("metrics=['accuracy', 'hamming']", "no task has together"),
        (f"[[arms]]\n{CONFIG}[[arms]]\nname='b'\n{CONFIG}", "each needs a name"),
        (f"[[arms]]\nname='b'\n{CONFIG}[[arms]]\nname='b!'\n{CONFIG}", "two runs of one name"),
        ("[[arms]]\nname='b'\nquantize='c'", "made from arm 'c'; choose one of b"),
        ("[[arms]]\nname='b'\nquantize='b'", "made from itself"),
        ("[[arms]]\nname='b'\nquantize='b'\nseed=1", "has no 'seed'"),
        ("[base]\nseed=1", "'config' names its file"),
        (
            f"[grid]\nseed=[0]\n[[arms]]\nname='b'\nseed=1\n{CONFIG}",
            "arm 'b' has 'seed' of its own, and so has the grid",
        ),
        (f"[base]\n{CONFIG}'model.pretrained'='@b'", "each run is made from arm 'b'"),
        ("[base]\nconfig='configs/lroa.py'", "'configs/lroa.py': there is no such file"),
        (f"[base]\n{CONFIG}'lora.rnak'=1", "run run: unknown config key 'lora.rnak'; did you mean 'lora.rank'"),
        (f"[base]\n{CONFIG}[grid]\n'train.lr'=[1e-3, -1]", "run lr-1: config key train.lr=-1"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        sweep.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed", "give KEY=VALUE"),
        ("methods=lora", "arm 'QAT!' .* has .* of its own; add --set 'QAT!:methods=VALUE'"),
        ("LoRa:train.lr=1", "no such arm; did you mean 'LoRA'"),
        ("PTQ:train.lr=1", "quantises, so it has no 'train.lr'"),
        ("train.leer=1", "unknown config key 'train.leer'"),
    ],
)
def test_a_change_that_would_be_ignored_is_refused(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        sweep.read(written(tmp_path, ARMS), [change])


def test_options_of_quantize_may_be_one_text(tmp_path):
    study = sweep.read(written(tmp_path, ARMS), ["PTQ:options=--static '99.9' --max_drop 1"])
    job = next(job for job in study.jobs if job.arm == "PTQ")
    assert job.command[-4:] == ("--static", "99.9", "--max_drop", "1")
    assert job.made == {"quantize": ["--static", "99.9", "--max_drop", "1"]}


def test_changes_reach_the_grid_and_the_arms(tmp_path):
    study = sweep.read(written(tmp_path, ARMS), ["seed=2,5", "train.lr=1e-3", "QAT!:train.lr=1e-4", "dtype=bfloat16"])
    made = {job.name: job.made.get("config") for job in study.jobs}
    assert list(made) == [f"{arm}_seed{seed}" for seed in (2, 5) for arm in ("LoRA", "QAT", "PTQ")]
    assert made["QAT_seed5"]["train.lr"] == 1e-4 != made["LoRA_seed5"]["train.lr"] == 1e-3
    assert (made["QAT_seed5"]["dtype"], made["QAT_seed5"]["seed"]) == ("bfloat16", 5)
    study = sweep.read(written(tmp_path, ARMS), ["model.pretrained=WEIGHTS"])
    pretrained = {job.arm: job.made["config"]["model.pretrained"] for job in study.jobs[:2]}
    assert pretrained == {"LoRA": "WEIGHTS", "QAT!": "@/LoRA_seed0"}  # which is made from that arm as before
    assert sweep.read(written(tmp_path, ARMS), ["methods=lora", "QAT!:methods=quant"]).jobs[1].made["config"][
        "methods"
    ] == ["quant"]


def test_the_file_of_a_config_is_found_from_anywhere(tmp_path, monkeypatch):
    study = written(tmp_path, FILE)
    monkeypatch.chdir(tmp_path)
    command = sweep.read(study).jobs[0].command
    assert Path(command[command.index("--config") + 1]).samefile(ROOT / "configs" / "lora.py")


def test_what_is_done_is_skipped_and_what_fails_stops_nothing_else(tmp_path, trains, capsys):
    called, failing = trains
    failing.append("--config.lora.rank=2")
    study, output = sweep.read(written(tmp_path, FILE)), tmp_path / "runs"
    assert sweep.run(study, output) == {
        "rank2_seed0": "failed: error: no such thing",
        "rank4_seed0": "done",
        "rank2_seed1": "failed: error: no such thing",
        "rank4_seed1": "done",
    }
    assert "2/4 done; rank4_seed1: done" in capsys.readouterr().out
    failing.clear()
    called.clear()
    assert set(sweep.run(study, output).values()) == {"done"}
    assert len(called) == 2
    sweep.run(study, output)
    assert len(called) == 2


def test_runs_of_other_settings_are_not_taken_for_those_of_the_sweep(tmp_path, trains):
    called, _ = trains
    study, output = written(tmp_path, ARMS), tmp_path / "runs"
    sweep.run(sweep.read(study), output)
    called.clear()
    sweep.run(sweep.read(study, ["log.tensorboard=True"]), output)  # changes nothing of a run
    for how in ([], ["--table"]):
        with pytest.raises(InputError, match=r"LoRA_seed0: .*train.epochs 10.0 there, 2.0 here.* delete this run"):
            sweep.main([str(study), "--output", str(output), "--set", "train.epochs=2", *how])
    written(tmp_path, ARMS.replace('"mse"', '"max"'))
    with pytest.raises(InputError, match=r"PTQ_seed0: .*\['--static', 'mse'\] there"):
        sweep.main([str(study), "--output", str(output)])
    assert not called
    # What PTQ was made from counts too, though the run itself was deleted.
    written(tmp_path, ARMS)
    for name in ("LoRA_seed0", "QAT_seed0"):
        (output / name).rename(tmp_path / name)
    with pytest.raises(InputError, match=r"PTQ_seed0: .*of the run that it is made from, train.epochs 10.0 there"):
        sweep.main([str(study), "--output", str(output), "--set", "train.epochs=2", "--set", "seed=0"])


def test_a_run_that_is_not_of_the_sweep_is_left_to_its_command(tmp_path, trains):
    """It says itself whether it can go on with what is in its folder."""
    called, _ = trains
    study, output = sweep.read(written(tmp_path, FILE)), tmp_path / "runs"
    sweep.run(study, output)
    called.clear()
    (output / "rank2_seed0.json").unlink()
    assert sweep.results(output, study.jobs[0]) is None
    (output / "rank2_seed0").rename(tmp_path / "elsewhere")
    sweep.run(study, output)
    assert [Path(command[command.index("--workdir") + 1]).name for command in called] == ["rank2_seed0"]


def test_what_is_made_from_a_run_that_failed_is_left_out(tmp_path, trains):
    called, failing = trains
    failing.append("LoRA_seed0")
    state = sweep.run(sweep.read(written(tmp_path, ARMS)), tmp_path / "runs")
    assert [name for name, text in state.items() if text == "done"] == ["LoRA_seed1", "QAT_seed1", "PTQ_seed1"]
    assert state["PTQ_seed0"] == "left out: QAT_seed0 is not there"
    assert not any("@/" in part for command in called for part in command)


def test_some_arms_alone(tmp_path, trains, capsys, monkeypatch):
    called, _ = trains
    study = written(tmp_path, ARMS)
    sweep.main([str(study), "--output", str(tmp_path / "runs"), "--set", "seed=0", "--only", "LoRA"])
    sweep.main([str(study), "--output", str(tmp_path / "runs"), "--only", "QAT!"])
    made = [Path(command[command.index("--workdir") + 1]).name for command in called]
    assert made == ["LoRA_seed0", "QAT_seed0", "LoRA_seed1", "QAT_seed1"]  # and each that they are made from, once
    with (tmp_path / "runs" / "results.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == set(made)
    told = json.loads((tmp_path / "runs" / "status.json").read_text())["runs"]
    assert list(told) == ["LoRA_seed0", "QAT_seed0", "LoRA_seed1", "QAT_seed1"]  # of both calls, in the sweep's order
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    sweep.main([str(study), "--output", str(tmp_path / "runs"), "--status"])
    shown = capsys.readouterr().out
    assert "4 of 6, about 0:00:00 left" in shown
    assert len(re.findall("PTQ_seed. .* not asked for", shown)) == 2
    with pytest.raises(InputError, match=r"--only PTX: there is no such arm; did you mean 'PTQ'\?"):
        sweep.main([str(study), "--output", str(tmp_path / "runs"), "--only", "PTX"])


def ends_with(code):
    """Arguments of Python that end so; below 0, by a signal."""
    return ["-c", f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"]


@pytest.mark.parametrize("code", [75, 130, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT])
def test_a_run_that_was_ended_from_outside_ends_the_sweep(tmp_path, monkeypatch, code):
    study = sweep.read(written(tmp_path, FILE))
    monkeypatch.setattr(sweep, "_placed", lambda part, _: part)
    jobs = [replace(job, command=tuple(ends_with(code))) for job in study.jobs]
    with pytest.raises(KeyboardInterrupt):
        sweep.run(replace(study, jobs=tuple(jobs)), tmp_path / "runs")
    status = json.loads((tmp_path / "runs" / "status.json").read_text())["runs"]
    assert list(status.values()) == ["was ended", "waits", "waits", "waits"]


@pytest.mark.parametrize(("code", "says"), [(-9, "killed by SIGKILL"), (-6, "killed by SIGABRT"), (74, "failed: ")])
def test_a_run_that_is_killed_alone_does_not(tmp_path, monkeypatch, code, says):
    study = sweep.read(written(tmp_path, FILE))
    monkeypatch.setattr(sweep, "_placed", lambda part, _: part)
    jobs = [replace(job, command=tuple(ends_with(code))) for job in study.jobs]
    state = sweep.run(replace(study, jobs=tuple(jobs)), tmp_path / "runs")
    assert len(state) == 4
    assert all(says in text for text in state.values())


def test_a_run_ends_with_the_sweep_and_saves_what_it_can(tmp_path):
    """An interrupt, which comes here while the sweep looks, becomes a SIGTERM of the run."""
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)));"
    script += "print('up', flush=True); time.sleep(60)"

    def look():
        if "up" in (tmp_path / "log").read_text():
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep._wait_for([sys.executable, "-c", script], tmp_path / "log", look)
    assert (tmp_path / "log").read_text().split() == ["up", "saved"]
    assert time.monotonic() - started < 30


def test_how_far_it_has_come_can_be_seen_from_elsewhere(tmp_path, trains, capsys, monkeypatch):
    study, output = sweep.read(written(tmp_path, FILE)), tmp_path / "runs"
    arguments = [str(tmp_path / "study.toml"), "--output", str(output), "--status"]
    with pytest.raises(InputError, match="no sweep was started there"):
        sweep.main(arguments)
    monkeypatch.setenv("COLUMNS", "120")
    sweep.run(study, output)
    folders.unfinished(output / "rank4_seed1")
    (output / "rank4_seed1" / "metrics.jsonl").write_text(
        '{"step": 20, "split": "train", "loss": 1.0, "images_per_second": 8.0}\n{"step": 20, "split": "val", "loss": 1}\n{"st'
    )
    runs = {job.name: "done" for job in study.jobs} | {"rank4_seed1": "runs"}
    status = {"process": os.getpid(), "since": time.time() - 61, "runs": runs}
    (output / "status.json").write_text(json.dumps(status))
    capsys.readouterr()
    sweep.main(arguments)
    shown = capsys.readouterr().out
    assert "3 of 4, about 0:01:15 left" in shown  # a run takes 75 seconds, see folders.write
    # 60 training images in batches of 16 are 4 steps, in 10 epochs 40; 20 are left at half a second... of 16 images: 2 s each
    assert re.search(r"rank4_seed1 *│ runs for 0:01:0\d, step 20 of 40, 0:00:40 left", shown), shown
    assert re.search(r"rank2_seed0 *│ done *│ accuracy 0\.\d{3}", shown)
    (output / "status.json").write_text(json.dumps({**status, "process": 2**22 + 1}))  # beyond the largest there can be
    sweep.main(arguments)
    assert "was ended; the same command goes on" in capsys.readouterr().out


def test_a_terminal_without_a_size(tmp_path, trains, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes whatever the output is for a terminal
    assert set(sweep.run(sweep.read(written(tmp_path, FILE)), tmp_path / "runs").values()) == {"done"}
    assert "4 of 4" in capsys.readouterr().out


def table_of(lines):
    """Rows of a Markdown table as dictionaries."""
    head, _, *rows = [line[2:-2].split(" | ") for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("text", [FILE, ARMS], ids=["lines", "bars"])
def test_tables_and_figure(tmp_path, trains, capsys, text):
    output = tmp_path / "runs"
    sweep.main([str(written(tmp_path, text)), "--output", str(output)])
    study = sweep.read(tmp_path / "study.toml")
    with (output / "results.csv").open() as file:
        runs = {row["run"]: row for row in csv.DictReader(file)}
    assert list(runs) == [job.name for job in study.jobs]
    written_down = (output / "results.md").read_text()
    assert written_down.strip() in capsys.readouterr().out
    first, second = (table_of(part) for part in tables(written_down))
    assert len(first) == len(study.rows) == len(second) + 1
    numbers = []
    for row, found in zip(study.rows, first, strict=True):
        mine = [runs[job.name] for job in study.jobs if job.row == row]
        mean = np.mean([float(run["accuracy"]) for run in mine])
        value, low, high = map(float, re.findall(r"[\d.]+", found["accuracy"]))
        assert low <= value <= high
        assert abs(value - mean) < 5.1e-4
        assert (found["seeds"], found["MB"]) == ("2", "0.0")
        numbers.append(mean)
    for mean, found in zip(numbers[1:], second, strict=True):
        value = float(re.match(r"[+-][\d.]+", found["accuracy"])[0])
        assert abs(value - (mean - numbers[0])) < 5.1e-4
    with Image.open(output / "figure.png") as picture:
        assert picture.width > 700
    page = (output / "comparison.html").read_text()
    assert all(job.name in page for job in study.jobs if job.values["seed"] == 0)
    sweep.main([str(tmp_path / "study.toml"), "--output", str(output), "--table", "--publish", str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "runs.md").read_text() == written_down
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"runs.csv", "runs.md", "runs.png"}


def tables(text):
    """The Markdown tables of a text, each as its lines."""
    return [part.strip().splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def test_a_difference_is_taken_where_both_have_the_seed(tmp_path, trains):
    """The first arm failed with seed 1: what is compared is seed 0 alone, against the same seed."""
    trains[1].append("rank2_seed1")
    study, output = sweep.read(written(tmp_path, FILE)), tmp_path / "runs"
    sweep.run(study, output)
    sweep_results.write(study, output)
    (found,) = table_of(tables((output / "results.md").read_text())[1])
    change = seeds.pooled_change([output / "rank2_seed0"], [output / "rank4_seed0"])["accuracy"]
    assert (found["lora.rank"], found["seeds"]) == ("4", "1")
    assert found["accuracy"].startswith(f"{change['value']:+.3f} ({change['low']:+.3f} to ")


def test_an_axis_with_a_zero(tmp_path, trains):
    text = FILE.replace('"lora.rank" = [2, 4]', '"lora.dropout" = [0, 0.5]').replace(
        'x = "lora.rank"', 'x = "lora.dropout"'
    )
    study, output = sweep.read(written(tmp_path, text)), tmp_path / "runs"
    sweep.run(study, output)
    sweep_results.write(study, output)
    with Image.open(output / "figure.png") as picture:
        assert len(picture.convert("L").getcolors()) > 20


def test_a_metric_that_the_task_does_not_have(tmp_path, trains):
    """Said after the first run, and what was measured is written down."""
    called, _ = trains
    study, output = (
        written(tmp_path, FILE.replace("f1_macro", "jaccard").replace('"accuracy", ', "")),
        tmp_path / "runs",
    )
    with pytest.raises(InputError, match=r"no 'jaccard'; the task has accuracy, "):
        sweep.main([str(study), "--output", str(output)])
    assert len(called) == 1
    with pytest.raises(InputError, match="no run of the sweep is done"):
        sweep.main([str(study), "--output", str(tmp_path / "nothing"), "--table"])


def test_the_sweeps_of_the_project_can_be_read():
    files = sorted((ROOT / "configs" / "sweeps").glob("*.toml"))
    assert len(files) >= 8
    for file in files:
        assert {job.values["seed"] for job in sweep.read(file).jobs} == {0, 1, 2}


def test_methods_are_compared_at_one_budget():
    """Adapters are all on query, key and value with a mean of rank 8, and only full fine-tuning has a rate for all weights."""
    for name in ("methods", "methods_demo"):
        made = {
            job.arm: job.made.get("config") for job in sweep.read(ROOT / "configs" / "sweeps" / f"{name}.toml").jobs
        }
        for arm in ("LoRA", "LoRA, skipping", "QAT", "LoRA over int8"):
            assert (made[arm]["lora.targets"], made[arm]["lora.rank"]) == ("qkv", 8)
            assert made[arm]["train.trainable"] == "^head"
            assert made[arm]["train.lr"] > made["full"]["train.lr"] or arm == "QAT"
        assert (made["AdaLoRA"]["adalora.targets"], made["AdaLoRA"]["adalora.target_r"]) == ("qkv", 8)
        assert made["LoRA over int8"]["train.lr"] == made["LoRA"]["train.lr"]


def trained_parameters(config, variant, classes):
    """How many parameters of a model train."""
    config = configs.from_json(json.dumps(tree.unflatten({key.replace(".", "/"): v for key, v in config.items()})))
    method = methods.load(config)
    model = vit.ViT(**vit.VARIANTS[variant], classes=classes, dot_general_cls=method.dot_general_cls)
    shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    chosen = re.compile(config.train.trainable)
    return sum(
        math.prod(leaf.shape)
        for name, leaf in shapes.items()
        if name.startswith(method.collections) or chosen.search(name.removeprefix("params/"))
    )


def test_food101_trains_what_the_original_trained():
    """Where numbers differ, see the file: the original trained AdaLoRA's head not at all, and DeiT's with 1000 classes."""
    made = {job.arm: job.made.get("config") for job in sweep.read(ROOT / "configs" / "sweeps" / "food101.toml").jobs}
    head, unused = 101 * 769, 1000 * 769
    for arm, original in {"LoRA": 372_581, "LoRA DeiT": 4_307_944 - unused + head, "AdaLoRA": 663_984 + head}.items():
        assert trained_parameters(made[arm], "vit_base_patch16", 101) == original
    text = (ROOT / "configs" / "sweeps" / "food101.toml").read_text()
    for number in (372_581, 4_307_944, 3_616_613, 663_984, 741_653):
        assert f"{number:,}" in text
    assert made["full"]["train.trainable"] == made["Skip-ViT"]["train.trainable"] == "."
    assert made["Skip-ViT"]["methods"] == ["skip"]


def test_what_the_original_trained_for_several_labels_was_on_query_key_and_value():
    (lora,) = {
        json.dumps({key: value for key, value in job.made["config"].items() if key != "seed"})
        for job in sweep.read(ROOT / "configs" / "sweeps" / "multilabel.toml").jobs
        if job.arm == "LoRA"
    }
    lora = json.loads(lora)
    assert trained_parameters(lora, "vit_base_patch16", 3) == 5_310_723
    assert trained_parameters({**lora, "lora.targets": "qkv"}, "vit_base_patch16", 3) == 1_771_779


def test_thresholds_of_labels_can_be_chosen_on_the_validation_split():
    """With each seed ten videos or more have a label, and ten have it not."""
    every = cases.cases("video")
    labels, groups = np.array([case.labels for case in every]), np.array([case.group for case in every])
    for job in sweep.read(ROOT / "configs" / "sweeps" / "multilabel.toml").jobs:
        if job.arm == "LoRA":
            made = job.made["config"]
            fractions = made["data.val_fraction"], made["data.test_fraction"]
            val = np.array(splits.split_by_group(labels, groups, *fractions, made["seed"])) == "val"
            for label in range(3):
                for value in (0, 1):
                    assert len(set(groups[val & (labels[:, label] == value)])) >= 10


@pytest.mark.slow
def test_a_sweep_without_stand_ins(tmp_path, image_folder):
    """LoRA, its int8 and what is trained from it, as commands, from another folder."""
    text = f"""
        [base]
        config = "configs/lora.py"
        "data.path" = "{image_folder}"
        "model.pretrained" = ""
        "model.name" = "vit_tiny_patch32"
        "data.image_size" = 32
        "train.steps" = 2
        [[arms]]
        name = "LoRA"
        [[arms]]
        name = "PTQ"
        quantize = "LoRA"
        options = ["--images", "16", "--sensitivity_images", "0"]
        [[arms]]
        name = "more"
        "model.pretrained" = "@LoRA"
        """
    output = tmp_path / "runs"
    assert "vit_tiny_patch32" in vit.VARIANTS
    sweep.main([str(written(tmp_path, text)), "--output", str(output)])
    first, second = (table_of(part) for part in tables((output / "results.md").read_text()))
    assert [row["arm"] for row in first] == ["LoRA", "PTQ", "more"]
    assert [row["arm"] for row in second] == ["PTQ", "more"]
    assert float(first[1]["MB"]) < 0.5 * float(first[0]["MB"])
    before = sorted((path, path.stat().st_mtime_ns) for path in output.glob("*/summary.json"))
    sweep.main([str(tmp_path / "study.toml"), "--output", str(output)])
    assert sorted((path, path.stat().st_mtime_ns) for path in output.glob("*/summary.json")) == before
