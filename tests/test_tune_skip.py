"""The search for splits on a finished run, by scripts/tune_skip.py."""

import importlib.util
import json

import folders
import pytest

from vitft_jax import evaluate, train
from vitft_jax.build import ARCHITECTURE
from vitft_jax.errors import InputError


@pytest.fixture
def script(pytestconfig):
    spec = importlib.util.spec_from_file_location("tune_skip", pytestconfig.rootpath / "scripts" / "tune_skip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_evaluates_the_grid_as_evaluate_does_and_leaves_the_run_alone(script, tiny_config, tmp_path, capsys):
    tiny_config.methods = ("lora",)
    tiny_config.train.epochs = 1.0
    train.train(tiny_config, tmp_path / "run")
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    grid = ["--layers", "0", "1", "--ratios=0.5", "--rounds=1", "--batch=2", "--tolerance=1"]
    script.main([str(tmp_path / "run"), *grid])
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    out = capsys.readouterr().out
    assert "left out: methods=lora,skip skip.layers=1" in out
    flags = ["--config.methods=lora,skip", "--config.skip.layers=0", "--config.skip.drop_ratio=0.5"]
    row = next(line for line in out.splitlines() if line.startswith("|") and flags[1] in line)
    evaluate.main([f"--workdir={tmp_path / 'run'}", "--split=val", *flags])
    results = json.loads((tmp_path / "run" / "evaluations" / "lora-skip" / "results_val.json").read_text())
    assert f"| {results['metrics']['accuracy']['value']:.4f} |" in row
    assert f"| {results['flops']['ratio']:.3f} |" in row


def test_it_chooses_the_fastest_within_the_tolerance(script):
    def candidate(metric, seconds):
        return script.Candidate([], None, metric, 1.0, [seconds] * 3)

    dense, close, far = candidate(0.9, 3.0), candidate(0.88, 2.0), candidate(0.5, 1.0)
    for tolerance, expected in ((0.0, dense), (0.03, close), (0.5, far)):
        assert script.choose([dense, close, far], tolerance) is expected


def test_a_tolerance_below_zero_is_refused(script):
    with pytest.raises(InputError, match=r"--tolerance -0\.1: at least 0"):
        script.main(["run", "--tolerance", "-0.1"])


def test_a_run_in_int8_is_refused(script, tmp_path):
    folders.write(tmp_path / "int8")
    told = json.loads((tmp_path / "int8" / "run.json").read_text())
    (tmp_path / "int8" / "run.json").write_text(
        json.dumps({**told, "model": dict.fromkeys(ARCHITECTURE), "mean": [0.5] * 3, "std": [0.5] * 3})
    )
    with pytest.raises(InputError, match="is quantised; the search starts from the run that it was made from"):
        script.main([str(tmp_path / "int8")])


def test_a_run_that_skips_already_is_refused(script, tiny_config, tmp_path):
    tiny_config.methods = ("skip",)
    tiny_config.skip.layers = (0,)
    tiny_config.figures.count = 0
    tiny_config.train.epochs = 1.0
    train.train(tiny_config, tmp_path / "run")
    with pytest.raises(InputError, match="starts from a dense one"):
        script.main([str(tmp_path / "run")])
