"""Two processes of four virtual devices each: equal to one device, killed and resumed; and what flags are refused."""

import argparse
import csv
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import meshes
import numpy as np
import pytest
from support import TINY, virtual_devices

from vitft_jax import config as configs
from vitft_jax import evaluate, processes, train, tree, vit
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError

METHODS = ("full", "lora", "adalora", "skip", "qat")


def together(*arguments, devices=4):
    """Runs a script in two processes; returns the exit code of each, the output of the first, and what each says of errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, *arguments, "--distributed", f"--coordinator={address}", f"--process_id={i}",
             "--process_count=2"],
            cwd=Path(__file__).parent, env=virtual_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    with ThreadPoolExecutor() as readers:  # of both at once, or one whose pipe is full waits for ever
        try:
            ended = list(readers.map(lambda process: process.communicate(timeout=400), started))
        finally:
            for process in started:
                process.kill()
    codes = [process.returncode for process in started]
    assert 1 not in codes, "\n".join(error[-2000:] for _, error in ended)
    first, second = (spoken(out) for out, _ in ended)
    assert second == ""  # the first speaks for both
    return codes, first, [error for _, error in ended]


def spoken(out):
    """What Python printed. Gloo prints past it, from several threads: a line's end may come after another's line, alone."""
    lines = out.splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() and not re.search(r"\[Gloo\]|peer ranks", line))


def test_what_gloo_prints_is_not_taken_for_ours():
    one = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
    assert spoken(f"{one}{one}\n\nstep 9  val\n{one}\n") == "step 9  val\n"


@pytest.mark.slow
def test_losses_are_those_of_one_device(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "meshes_tiny", TINY)
    one_device = {method: meshes.trained(method, "one") for method in METHODS}
    codes, said, _ = together("meshes.py", f"{','.join(METHODS)}:fsdp", "lora:model")
    assert codes == [0, 0]
    codes, across, _ = together("meshes.py", "lora:wide", devices=2)  # one layer is cut over both processes
    assert codes == [0, 0]
    said += across
    found = {(line["method"], line["mesh"]): line for line in map(json.loads, said.splitlines())}
    assert set(found) == {*((method, "fsdp") for method in METHODS), ("lora", "model"), ("lora", "wide")}
    for (method, _), line in found.items():
        one = one_device[method]
        np.testing.assert_allclose(line["losses"], one["losses"], rtol=1e-5, err_msg=method)
        assert line["mask"] == one["mask"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_of_a_single_process(tiny_config, tmp_path):
    tiny_config.methods = ("lora",)
    tiny_config.train.batch_size, tiny_config.train.epochs = 8, 3.0
    reference = train.train(tiny_config, tmp_path / "one")

    (tmp_path / "config.json").write_text(configs.to_json(tiny_config))
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom vitft_jax import config\n\n\n"
        "def get_config():\n    return config.from_json((Path(__file__).parent / 'config.json').read_text())\n"
    )
    flags = (f"--config={file}", f"--workdir={tmp_path / 'two'}", "--config.mesh.fsdp=True")
    codes, *_ = together("dies.py", "6:all:SIGKILL", *flags)
    assert codes == [-signal.SIGKILL] * 2
    assert [line["step"] for line in lines(tmp_path / "two")] == [3, 3]
    shutil.copytree(tmp_path / "two", tmp_path / "moved")
    codes, _, errors = together(
        "dies.py", "2:1:input", *flags
    )  # it ends at once; the other with a message, or by JAX's hand
    assert codes in ([74, 2], [-signal.SIGABRT, 2])
    assert ("the processes lost each other" if codes[0] == 74 else "another task died") in errors[0]
    assert "Traceback" not in errors[0]
    assert errors[1].endswith("error: an image that only this process reads\n")
    codes, _, errors = together("dies.py", "2:1:SIGTERM", *flags)  # of one process, and all of them end at one step
    assert codes == [75, 75]
    assert "terminated; step" in errors[0]
    assert 3 < max(int(path.name) for path in (tmp_path / "two" / "checkpoints").glob("[0-9]*")) < 9
    codes, said, _ = together("dies.py", "0:all:", *flags)
    assert codes == [0, 0]
    assert "step 9  val" in said
    assert "step 3  val" not in said

    moved = train.train(tiny_config, tmp_path / "moved")  # on one device, and without FSDP
    for name in ("two", "moved"):
        one, other = lines(tmp_path / "one"), lines(tmp_path / name)
        assert [(line["step"], line["split"]) for line in one] == [(line["step"], line["split"]) for line in other]
        for a, b in zip(one, other, strict=True):
            for key in a.keys() - {"split", "images_per_second"}:
                if None in (a[key], b[key]):  # where a metric is not defined
                    assert a[key] == b[key], (key, a, b)
                else:
                    assert b[key] == pytest.approx(a[key], rel=1e-5), key
    rows = [list(csv.DictReader((tmp_path / run / "predictions_test.csv").open())) for run in ("one", "two")]
    assert [row["path"] for row in rows[0]] == [row["path"] for row in rows[1]]
    for name in ("p:dark", "p:grey", "p:light"):
        np.testing.assert_allclose(*[[float(row[name]) for row in table] for table in rows], atol=2e-6)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    for split, found in reference["metrics"].items():
        for run_ in (summary, moved):
            for name, interval in found.items():
                assert run_["metrics"][split][name] == pytest.approx(interval, rel=1e-5), name
    assert summary["best_step"] == moved["best_step"] == reference["best_step"]
    leaves = []
    for name in ("one", "two"):  # those of eight devices are read on one
        with Checkpoints(tmp_path / name / "checkpoints", read_only=True) as checkpoints:
            leaves.append(tree.flatten(checkpoints.restore_best(None)[0]))
    # Adam divides a gradient by its own size, so what sums in another order leave of a small one is a part of a whole step.
    for name, leaf in leaves[0].items():
        np.testing.assert_allclose(leaves[1][name], leaf, atol=1e-3 * tiny_config.train.lr, err_msg=name)
    for name, interval in evaluate.evaluate(tmp_path / "two", "test").items():  # on one device
        assert interval == pytest.approx(summary["metrics"]["test"][name], rel=1e-5), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=host:1"], "only with --distributed"),
        (["--distributed", "--process_id=0"], "give all of"),
        (["--distributed", "--coordinator=host:1", "--process_id=2", "--process_count=2"], "from 0 to"),
        (["--distributed"], "where JAX cannot tell who is who"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    with pytest.raises(InputError, match=message):
        processes.start(parser.parse_args(flags))
