"""What a machine or a disk does to a run: each time one clear message, and nothing lost but what the fault took."""

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from deaths import assert_same, fill, run
from PIL import Image
from support import largest

from vitft_jax import cli, digest, evaluate, lock, optim, report, step, train
from vitft_jax.build import build
from vitft_jax.data import images
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.run import resolve


@pytest.fixture
def config(tiny_config):
    """Nine steps in three epochs."""
    tiny_config.methods = ("lora",)
    tiny_config.lora.dropout = 0.2
    tiny_config.train.epochs = 3.0
    return tiny_config


@pytest.fixture(scope="module")
def whole():
    """A folder for the run that nothing happened to, which the first test that needs it trains."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def assert_as_whole(config, whole, folder):
    """A run ended as one that nothing happened to."""
    train.train(config, whole)
    assert_same(whole, folder)


def end(capsys, command):
    """Exit code and standard error of a command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return stop.value.code, said


def test_full_disk_while_a_checkpoint_is_written(config, whole, tmp_path):
    code, said = run(config, tmp_path / "cut", "train", 4, fill)
    assert (code, said.count("\n")) == (74, 1), said
    assert "the checkpoint of step 6 could not be written (File too large)" in said
    train.train(config, tmp_path / "cut")
    assert_as_whole(config, whole, tmp_path / "cut")


def test_full_disk_while_the_log_is_written(config, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(report.MetricsLog, "write", full)
    code, said = end(capsys, lambda: train.train(config, tmp_path / "run"))
    assert code == 74
    assert said == "error: metrics.jsonl: No space left on device; once that is mended, the same command goes on\n"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << at % 8
    path.write_bytes(data)


def truncate(path, at):
    path.write_bytes(path.read_bytes()[: at % path.stat().st_size])


def test_every_change_to_a_file_is_seen(tmp_path):
    rng = random.Random(0)
    for name in ("a", "b/c", "b/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(rng.randbytes(300))
    assert digest.damage(tmp_path) == ""  # nothing is known of it
    digest.write(tmp_path)
    assert digest.damage(tmp_path) == ""
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        for change in (flip, truncate):
            for _ in range(20):
                change(path, rng.randrange(10**6))
                assert digest.damage(tmp_path)
                path.write_bytes(before)
        if path.name != digest.FILE:
            path.unlink()
            assert digest.damage(tmp_path) == f"{path.relative_to(tmp_path)} is missing"
            path.write_bytes(before)
    assert digest.damage(tmp_path) == ""
    (tmp_path / "b" / "e").touch()
    assert digest.damage(tmp_path)


def test_a_damaged_checkpoint_is_dropped_and_its_steps_are_done_again(config, whole, tmp_path, capsys):
    train.train(config, whole)
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()  # as if it had been killed before its end
    checkpoint = tmp_path / "cut" / "checkpoints" / "9"
    truncate(largest(checkpoint / "optimizer"), 100)
    train.train(config, tmp_path / "cut")
    assert f"checkpoint {checkpoint} is damaged and dropped: optimizer/" in capsys.readouterr().out
    assert_same(whole, tmp_path / "cut")


def test_a_work_directory_in_use(config, tmp_path):
    with lock.Lock(tmp_path / "new"), pytest.raises(InputError, match="new: in use by process"):
        train.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with lock.Lock(tmp_path / "run"):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
            lock.Lock(tmp_path / "run").__enter__()
        (tmp_path / "run" / "something").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["something"]
    with lock.Lock(tmp_path / "a" / "b" / "c"):
        pass
    assert not (tmp_path / "a").exists()  # nothing was put into it


def test_the_lock_goes_with_its_process(tmp_path):
    holds = "import os, pathlib, sys; from vitft_jax.lock import Lock; Lock(pathlib.Path(sys.argv[1])).__enter__(); "
    command = [sys.executable, "-c", holds + "os.kill(os.getpid(), 9)", str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with lock.Lock(tmp_path):
        pass


def not_finite(monkeypatch, times):
    """From now on the gradient of the fifth step is not a number, so many times."""
    real, left = step.train_step, [None] * times

    def train_step(state, *args, **kwargs):
        fifth = int(state.step) == 4
        state, values = real(state, *args, **kwargs)
        if fifth and left:
            left.pop()
            values = {**values, "grad_norm": np.float32(np.nan)}
        return state, values

    monkeypatch.setattr(step, "train_step", train_step)


def test_a_loss_that_is_not_finite_names_step_images_and_learning_rate(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 100)  # found at the end of the epoch, a step later
    batches, real = [], step.train_step

    def spy(state, frozen, batch, **kwargs):
        batches.append(batch)
        return real(state, frozen, batch, **kwargs)

    monkeypatch.setattr(step, "train_step", spy)
    not_finite(monkeypatch, times=1)
    with pytest.raises(InputError) as error:
        train.train(config, tmp_path / "run")
    message = str(error.value)
    rate = float(optim.schedule(config, 9)(4))
    assert message.startswith(f"step 5: the grad norm is nan; learning rate {rate:.3g}, images ")
    names = message.partition("images ")[2].partition(". Look")[0].split(", ")
    kinds = ("dark", "grey", "light")
    assert [name.split("/")[0] for name in names] == [kinds[label] for label in batches[4]["label"]]


def test_a_validation_loss_that_is_not_finite_ends_the_run(tiny_config, tmp_path):
    tiny_config.train.lr = 1e38  # the first step overflows
    tiny_config.train.warmup = 0.0
    tiny_config.train.batch_size = 18
    tiny_config.train.trainable = "."
    with pytest.raises(InputError, match="step 1: the validation loss afterwards is nan"):
        train.train(tiny_config, tmp_path / "run")


@pytest.mark.slow
def test_going_back_with_smaller_steps(config, tmp_path, monkeypatch, capsys):
    config.train.nan_retries = 2
    with monkeypatch.context() as patched:
        not_finite(patched, times=2)
        rates, real = [], optim.optimizer
        patched.setattr(optim, "optimizer", lambda c, *rest: rates.append(c.train.lr) or real(c, *rest))
        summary = train.train(config, tmp_path / "back")
    assert capsys.readouterr().out.count("goes back to step 3, the learning rate halved") == 2
    assert rates == [1e-2, 5e-3, 2.5e-3]
    assert summary["learning_rate_halved"] == 2
    assert [entry["step"] for entry in map(json.loads, (tmp_path / "back" / "metrics.jsonl").open())] == [
        3,
        3,
        6,
        6,
        9,
        9,
    ]

    with monkeypatch.context() as patched:  # killed after it went back, it goes back again
        not_finite(patched, times=1)
        real, calls = step.train_step, []

        def dies(*args, **kwargs):
            calls.append(None)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patched.setattr(step, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "cut")
    with monkeypatch.context() as patched:
        not_finite(patched, times=2)
        train.train(config, tmp_path / "cut")
    assert_same(tmp_path / "back", tmp_path / "cut")


def test_an_image_that_is_damaged_after_the_start(config, whole, image_folder, tmp_path, monkeypatch):
    shutil.copytree(image_folder, tmp_path / "images")
    config.data.path = str(tmp_path / "images")
    monkeypatch.setattr(images, "CACHE_BYTES", 0)  # a set that is larger than memory
    files = sorted((tmp_path / "images").rglob("*.png"))
    before = {file: file.read_bytes() for file in files}
    real, calls = step.train_step, []

    def damages(*args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            for file in files:
                truncate(file, 60)
        return real(*args, **kwargs)

    monkeypatch.setattr(step, "train_step", damages)
    with pytest.raises(InputError, match=r"Cannot read image (dark|grey|light)/\d\.png: damaged"):
        train.train(config, tmp_path / "cut")
    for file, data in before.items():
        file.write_bytes(data)
    train.train(config, tmp_path / "cut")
    config.data.path = str(image_folder)
    assert_as_whole(config, whole, tmp_path / "cut")


@pytest.mark.parametrize("fate", ["changed", "gone"])
def test_base_weights_that_are_not_what_they_were(config, tmp_path, fate):
    bundled = Path(train.__file__).parent / "weights" / "phantom_micro"
    shutil.copytree(bundled, tmp_path / "weights")
    config.model.name, config.model.pretrained = "", str(tmp_path / "weights")
    config.data.image_size = 32
    folder, (config, source) = Folder(tmp_path / "run"), resolve(config)
    dataset = folder.dataset(config)
    folder.open(config, dataset, build(config, dataset, source))
    weights = tmp_path / "weights" / "model.safetensors"
    if fate == "changed":
        flip(weights, -2)  # the last value, a little
    else:
        weights.unlink()
    expected = "its weights were .*sha256.* when it was started" if fate == "changed" else "neither model.safetensors"
    for command in (lambda: train.train(config, tmp_path / "run"), lambda: evaluate.evaluate(tmp_path / "run")):
        with pytest.raises(InputError, match=expected):
            command()


def test_names_cannot_command_the_terminal(capsys):
    def fails():
        raise InputError("Cannot read image \x1b[2J\u202egnp.png:\nno image")

    assert end(capsys, fails) == (2, "error: Cannot read image \\x1b[2J\\u202egnp.png:\nno image\n")


@pytest.mark.parametrize("name", ["a[1]", "a*", "what?"])
def test_folders_that_orbax_takes_for_patterns(name):
    with pytest.raises(InputError, match=f"below a name with '\\{set(name).intersection('[*?').pop()}'"):
        Folder(Path(name) / "run")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_names_are_written_as_they_are(config, image_folder, tmp_path, monkeypatch, capsys, reports):
    shutil.copytree(image_folder, tmp_path / "images")
    names = ["<img src=x onerror=alert(1)>.png", "$x_{$ 100%.png", '"; =1+1, ok.png', "[red]a[bold].png"]
    for name in names:
        Image.new("L", (20, 20), 50).save(tmp_path / "images" / "dark" / name)
    config.data.path = str(tmp_path / "images")
    config.methods = ("lora", "skip")
    config.skip.layers = (0,)
    config.figures.names = tuple(f"dark/{name}" for name in names)
    config.train.steps = 1
    train.train(config, tmp_path / "<run>")
    assert set(config.figures.names) < {row["path"] for row in rows(tmp_path / "<run>" / "split.csv")}
    for split in ("val", "test"):
        wanted = [row["path"] for row in rows(tmp_path / "<run>" / "split.csv") if row["split"] == split]
        assert [row["path"] for row in rows(tmp_path / "<run>" / f"predictions_{split}.csv")] == wanted
    assert (tmp_path / "<run>" / "figures" / "patches.png").is_file()
    assert "<run>" in capsys.readouterr().out.replace("\n", "")
    page = (tmp_path / "<run>" / "report.html").read_text()
    assert "&lt;img src=x" in page
    assert "<img src=x" not in page
