"""The command quantize, end to end on a tiny run."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, integer_dots

from vitft_jax import (
    calibration,
    decision,
    evaluate,
    metrics,
    quantize,
    quantized_attention,
    run,
    step,
    train,
    tree,
    vit,
)
from vitft_jax import config as configs
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.ptq import observe
from vitft_jax.ptq.recipe import Recipe

FAST = quantize.Options(Recipe(smooth=False), sensitivity_images=0)


@pytest.fixture(autouse=True)
def variant(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", TINY)


def tiny_run(image_folder, method):
    config = configs.default()
    config.methods, config.model.name, config.model.pretrained = (method,), "tiny_test", ""
    config.data.path, config.data.image_size = str(image_folder), 16
    config.data.val_fraction = config.data.test_fraction = 0.2
    config.train.batch_size, config.train.lr = 6, 1e-2
    return config


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """A LoRA run."""
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    config = tiny_run(image_folder, "lora")
    config.train.epochs = 4.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.VARIANTS, "tiny_test", TINY)
        train.train(config, workdir)
    return workdir


def stored(workdir):
    """The program of a quantised run and the variables in its checkpoint."""
    folder = run.Folder(workdir)
    config = folder.config()
    built = run.build(config, folder.dataset(config), None, folder.whole())
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        return built.program, checkpoints.restore_best(None)[0]


def probabilities(workdir):
    """What a run said about its test images, `(n, C)`."""
    with (workdir / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(value) for key, value in row.items() if key.startswith("p:")] for row in rows])


def margins(p, multilabel):
    """How far probabilities are from another decision."""
    if multilabel:
        return 2 * np.abs(p - 0.5).min(axis=1)
    best = np.sort(p, axis=1)
    return best[:, -1] - best[:, -2]


def integer_kernels(variables):
    return {n for n, a in tree.flatten(variables["params"]).items() if a.dtype == jnp.int8}


def test_a_run_becomes_an_int8_run_that_needs_no_other_weights(trained, tmp_path, monkeypatch, capsys):
    output = tmp_path / "int8"
    quantize.main([f"--workdir={trained}", f"--output={output}", "--sensitivity_images=6"])
    said = capsys.readouterr().out
    assert "calibrating on 18 training images" in said
    assert "leaving out layer 12/12" in said
    assert {p.name for p in output.iterdir()} == {
        "config.json", "run.json", "split.csv", "summary.json", "checkpoints", "predictions_val.csv",
        "predictions_test.csv", "decision.json",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [output]

    program, variables = stored(output)
    assert integer_kernels(variables) == {
        f"blocks_{i}/{layer}/kernel"
        for i in range(2)
        for layer in ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/fc1", "mlp/fc2")
    }
    kernels, scales = 2 * (4 * 32 * 32 + 2 * 32 * 64), 2 * (5 * 32 + 64)
    others = sum(a.size for a in jax.tree.leaves(variables) if a.dtype != jnp.int8) - scales
    summary = json.loads((output / "summary.json").read_text())
    assert summary["bytes"]["arrays"] == kernels + 4 * scales + 4 * others == tree.nbytes(variables)
    assert summary["bytes"]["float32"] == 4 * (kernels + others)
    compiled = step.eval_step.lower(variables, {}, np.zeros((6, 16, 16, 3), np.uint8), program=program).compile()
    assert len(integer_dots(compiled)) == 12

    told = summary["method"]
    for split in ("val", "test"):
        compared = told["compared"][split]
        float_run = json.loads((trained / "summary.json").read_text())["metrics"][split]
        then = {name: m["value"] for name, m in compared["float"].items()}
        assert then == {name: m["value"] for name, m in float_run.items()}
        assert compared["agreement"] == 1
        assert 0 < compared["divergence"] < 1e-3
        for name, change in compared["change"].items():
            assert change["value"] == summary["metrics"][split][name]["value"] - then[name]
    float_t, int8_t = (decision.read(workdir).temperature for workdir in (trained, output))
    assert int8_t != float_t  # fitted again
    assert int8_t == pytest.approx(float_t, rel=0.05) == summary["calibration"]["test"]["temperature"]
    assert all(layer["snr_db"] > 30 for layer in told["layers"].values())
    assert told["layers"]["blocks_0/mlp/fc2"]["alpha"] is None
    assert "sensitivity" in told["layers"]["blocks_0/mlp/fc2"]

    monkeypatch.setattr(run, "_initial", None)  # no weights but those of the checkpoint
    monkeypatch.setattr(run.pretrained, "load", None)
    before = (output / "predictions_test.csv").read_bytes()
    (output / "predictions_test.csv").unlink()
    assert evaluate.evaluate(output) == summary["metrics"]["test"]
    assert (output / "predictions_test.csv").read_bytes() == before
    with pytest.raises(InputError, match="is quantised already"):
        quantize.quantize(output, tmp_path / "again", FAST)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="which does not train"):
        train.train(run.Folder(output).config(), output)
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert list(tmp_path.iterdir()) == [output]


def test_the_gate_keeps_the_most_sensitive_layers_in_float(trained, tmp_path, monkeypatch, capsys):
    values = {f"blocks_{i}/{name}": 0.0 for i in (0, 1) for name in ("mlp/fc1", "mlp/fc2")}
    order = ["blocks_1/mlp/fc1", "blocks_0/attn/out"]
    values |= {f"blocks_{i}/attn/{name}": 0.0 for i in (0, 1) for name in ("query", "key", "value", "out")}
    monkeypatch.setattr(quantize, "_sensitivity", lambda *_: values | {order[0]: 2.0, order[1]: 1.0})
    # simulated with 0 and 1 layers in float, real with 1, simulated and real with 2
    drops = iter([2.0, 0.4, 0.6, 0.5, 0.1])
    monkeypatch.setattr(quantize, "_drop", lambda *_: next(drops))
    other = tmp_path / "other"  # all but the first image of each class
    shutil.copytree(run.Folder(trained).config().data.path, other, ignore=lambda *_: {"0.png"})
    recipe = Recipe(smooth=False, static="mse")
    options = quantize.Options(recipe, attention=True, calibration=str(other), max_drop=0.5)
    summary = quantize.quantize(trained, tmp_path / "int8", options)
    assert next(drops, None) is None
    assert summary["method"]["float_layers"] == order
    assert summary["method"]["options"]["calibration"] == str(other)
    assert summary["method"]["calibration_images"] == 16 == 27 - 2 * 6 + 1
    assert f"kept in float: {', '.join(order)}" in capsys.readouterr().out
    program, variables = stored(tmp_path / "int8")
    assert not integer_kernels(variables) & {f"{path}/kernel" for path in order}
    assert len(integer_kernels(variables)) == 10
    assert {n.rsplit("/", 1)[1] for n in tree.flatten(variables["quant"])} == {"scale", "bound"}  # static ranges
    assert program.model.attend is quantized_attention.attend
    assert evaluate.evaluate(tmp_path / "int8") == summary["metrics"]["test"]


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        ("lora", ("bright", "mid")),
        *(pytest.param(name, (), marks=pytest.mark.slow) for name in ("adalora", "dora", "pissa")),
    ],
)
def test_every_method_becomes_an_int8_run(image_folder, tmp_path, method, labels):
    config = tiny_run(image_folder, method)
    config.train.steps = 2
    if labels:
        values = {"dark": "0,0", "grey": "0,1", "light": "1,1"}
        rows = [f"{name}/{i}.png,{value}" for name, value in values.items() for i in range(10)]
        config.data.update(table=str(tmp_path / "labels.csv"), labels=labels)
        (tmp_path / "labels.csv").write_text("\n".join(["path,bright,mid", *rows]))
    train.train(config, tmp_path / "float")
    summary = quantize.quantize(tmp_path / "float", tmp_path / "int8", quantize.Options(sensitivity_images=0))
    _, variables = stored(tmp_path / "int8")
    assert len(integer_kernels(variables)) == 12
    assert set(variables) == {"params", "quant"}  # no adapter
    for name, leaf in tree.flatten(variables["params"]).items():
        assert not (name.startswith("blocks_") and leaf.ndim > 1 and leaf.dtype != jnp.int8), name
    assert evaluate.evaluate(tmp_path / "int8") == summary["metrics"]["test"]
    # 8 bits move a probability by far less than 0.02, and a decision only where the float model hardly has one.
    exact, ours = (probabilities(tmp_path / name) for name in ("float", "int8"))
    clear = margins(exact, bool(labels)) > 2 * 0.02
    assert clear.mean() >= 0.5
    assert 0 < np.abs(exact - ours).max() < 0.02
    same = metrics.decisions(exact, bool(labels)) == metrics.decisions(ours, bool(labels))
    assert same[clear].all()


def test_nothing_is_left_behind_where_it_fails(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(quantize.report, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        quantize.quantize(trained, tmp_path / "int8", FAST)
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_leave_nothing_behind(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(observe, "observe", lambda *_: (_ for _ in ()).throw(InputError("not finite")))
    with pytest.raises(InputError, match="not finite"):
        quantize.quantize(trained, tmp_path / "int8", FAST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images=3"], "--images 3"),
        (["--max_drop=-1"], "--max_drop -1.0"),
        (["--max_drop=1", "--sensitivity_images=0"], "must be measured"),
        (["--bits=3"], "quant.bits=3: 8 or 4"),
        (["--static=mse", "--weight_only"], "quant.static=True"),
        (["--static=most"], "--static most: mse, max or a percentile"),
        (["--skip_layers=."], "nothing is quantised"),
        (["--workdir=nowhere"], "no run here"),
        (["--calibration=nowhere"], "--calibration nowhere: "),
    ],
)
def test_bad_flags(trained, tmp_path, monkeypatch, flags, message):
    seen = {"blocks_0/attn/query": observe.Seen(jnp.ones(32), jnp.ones((4, 32)))}
    monkeypatch.setattr(observe, "observe", lambda *_: seen)
    with pytest.raises(InputError) as error:
        quantize.main([f"--workdir={trained}", f"--output={tmp_path / 'int8'}", "--no-smooth", *flags])
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_output_that_exists_and_too_few_images(trained, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="exists already"):
        quantize.quantize(trained, trained, FAST)
    monkeypatch.setattr(calibration, "FEWEST", 19)
    with pytest.raises(InputError, match="18 calibration images"):
        quantize.quantize(trained, tmp_path / "int8", FAST)
    shutil.copytree(trained, tmp_path / "untrained", ignore=shutil.ignore_patterns("checkpoints", "summary.json"))
    with pytest.raises(InputError, match="no checkpoint here"):
        quantize.quantize(tmp_path / "untrained", tmp_path / "int8", FAST)
