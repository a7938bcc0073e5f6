"""The command quantize, end to end on a tiny run."""

import csv
import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, integer_dots, tiny

from vitft_jax import config as configs
from vitft_jax import (
    decision,
    evaluate,
    metrics,
    quantize,
    quantized_attention,
    quantizer,
    run,
    step,
    train,
    tree,
    vit,
)
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.lock import Lock
from vitft_jax.methods import quant
from vitft_jax.ptq import calibration, gate, observe, simulate
from vitft_jax.ptq.options import Options
from vitft_jax.ptq.recipe import Recipe

FAST = Options(Recipe(smooth=False), sensitivity_images=0)


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
    folder = Folder(workdir)
    config = folder.config()
    built = build(config, folder.dataset(config), None, folder.whole())
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
    said = iter(capsys.readouterr().out.splitlines())
    for stage in (
        "calibrating on 18 training images", "smoothing: ", "clipping: ", "bias correction", "lowest signal-to-noise",
        "leaving out layer 12/12", "evaluating the float model", "evaluating the int8 model",
    ):  # fmt: skip
        assert any(stage in line for line in said), stage  # in this order
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
    on_disk = sum(f.stat().st_size for f in (output / "checkpoints").rglob("*") if f.is_file())
    assert tree.nbytes(variables) < on_disk == summary["bytes"]["checkpoint"]
    # Orbax writes a KiB or so about each array; float kernels would be 64 KiB more.
    assert on_disk < tree.nbytes(variables) + 1.3 * 2**10 * len(jax.tree.leaves(variables))
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
    assert len(told["layers"]) == 12
    assert all(layer["snr_db"] > 30 for layer in told["layers"].values())
    assert told["float_model"] == "the run"
    assert told["layers"]["blocks_0/mlp/fc2"]["alpha"] is None
    assert "sensitivity" in told["layers"]["blocks_0/mlp/fc2"]

    monkeypatch.setattr("vitft_jax.build._initial", None)  # no weights but those of the checkpoint
    monkeypatch.setattr(run.pretrained, "load", None)
    before = (output / "predictions_test.csv").read_bytes()
    (output / "predictions_test.csv").unlink()
    assert evaluate.evaluate(output) == summary["metrics"]["test"]
    assert (output / "predictions_test.csv").read_bytes() == before
    dense = ["methods=quant,skip", "skip.layers=0", "skip.drop_ratio=0.0"]
    assert evaluate.evaluate(output, "test", dense, name="dense") == summary["metrics"]["test"]
    with pytest.raises(InputError, match="this run has other parameters, such as 'quant/"):
        evaluate.evaluate(output, "test", ["methods=()"])
    with pytest.raises(InputError, match="is quantised already"):
        quantize.quantize(output, tmp_path / "again", FAST)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="which does not train"):
        train.train(Folder(output).config(), output)
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert list(tmp_path.iterdir()) == [output]


def test_the_gate_keeps_the_most_sensitive_layers_in_float(trained, tmp_path, monkeypatch, capsys):
    values = {f"blocks_{i}/{name}": 0.0 for i in (0, 1) for name in ("mlp/fc1", "mlp/fc2")}
    order = ["blocks_1/mlp/fc1", "blocks_0/attn/out"]
    values |= {f"blocks_{i}/attn/{name}": 0.0 for i in (0, 1) for name in ("query", "key", "value", "out")}
    monkeypatch.setattr(gate, "sensitivity", lambda *_: values | {order[0]: 2.0, order[1]: 1.0})
    # simulated with 0 and 1 layers in float, real with 1, simulated and real with 2
    drops = iter([2.0, 0.4, 0.6, 0.5, 0.1])
    monkeypatch.setattr(gate, "drop", lambda *_: next(drops))
    other = tmp_path / "other"  # all but the first image of each class
    shutil.copytree(Folder(trained).config().data.path, other, ignore=lambda *_: {"0.png"})
    recipe = Recipe(smooth=False, static="mse")
    options = Options(recipe, attention=True, calibration=str(other), max_drop=0.5)
    summary = quantize.quantize(trained, tmp_path / "int8", options)
    assert next(drops, None) is None
    assert summary["method"]["float_layers"] == order
    assert len(summary["method"]["layers"]) == 12  # those in float too, with what they would lose
    assert [summary["method"]["layers"][path]["sensitivity"] for path in order] == [2.0, 1.0]
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
    summary = quantize.quantize(tmp_path / "float", tmp_path / "int8", Options(sensitivity_images=0))
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


def test_a_damaged_layer_is_the_most_sensitive(trained):
    source = quantize._source(trained)
    settings = quant.settings_of(quantize._config(source.config, FAST))
    leaves = tree.flatten(source.params)
    paths = [n.removesuffix("/kernel") for n in leaves if n.endswith("/kernel") and n.startswith("blocks_")]
    layers = {
        path: simulate.Layer(quantizer.quantise_kernel(leaves[f"{path}/kernel"]), leaves[f"{path}/bias"], None)
        for path in paths
    }
    damaged = "blocks_0/attn/value"
    integers = layers[damaged].kernel
    layers[damaged] = layers[damaged]._replace(kernel=integers._replace(values=-integers.values))
    program = simulate.program(source.plain, layers, settings)
    simulation = gate.Simulation(program, source.params, layers, False, source.config)
    found = gate.sensitivity(simulation, source.outputs(source.dataset, "train"), source.dataset)
    assert list(found) == paths
    assert found[damaged] > 0
    # The others lose nothing but rounding, which next to such damage is noise of either sign.
    assert found[damaged] > 10 * max(abs(value) for path, value in found.items() if path != damaged)


def said(probabilities, labels):
    p = np.asarray(probabilities, np.float64)
    return evaluate.Outputs(np.arange(len(p)), np.log(p), np.array(labels), 1.0)


def test_a_drop_is_in_points_of_accuracy_and_positive_where_it_falls():
    right, wrong = [0.9, 0.1], [0.2, 0.8]
    before, after = said([right, right, wrong, right], [0] * 4), said([right, wrong, wrong, right], [0] * 4)
    assert gate.drop(before, after, images(4), "f1") == pytest.approx(25.0)
    assert gate.drop(after, before, images(4), "f1") == pytest.approx(-25.0)
    assert gate.drop(before, before, images(4), "f1") == 0


def test_a_drop_of_rare_labels_is_that_at_their_thresholds():
    """At one half nothing is decided on either side, and a model that knows nothing would lose nothing."""
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 2)) < 0.2).astype(np.float32)
    logits = np.float32(-3 + 2 * labels + rng.normal(size=labels.shape) / 4)
    exact, blind = (evaluate.Outputs(np.arange(200), z, labels, 1.0) for z in (logits, np.flip(logits, 0)))
    assert not exact.decided.any()
    assert not blind.decided.any()
    assert gate.drop(exact, blind, images(200, multilabel=True), "f1") > 20
    assert gate.drop(exact, exact, images(200, multilabel=True), "f1") == 0


def images(count, multilabel=False):
    """As much of a dataset as a drop needs: each image is its own group."""
    return SimpleNamespace(groups=[str(i) for i in range(count)], multilabel=multilabel)


def test_where_every_drop_is_too_large_no_layer_is_left_and_nothing_behind(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "sensitivity", lambda simulation, *_: dict.fromkeys(simulation.layers, 1.0))
    monkeypatch.setattr(gate, "drop", lambda *_: 50.0)
    flags = ["--no-smooth", "--no-clip", "--no-correct", "--max_drop=0.5"]
    with pytest.raises(InputError, match=r"--max_drop 0.5: no layer is left to quantise within it"):
        quantize.main([f"--workdir={trained}", f"--output={tmp_path / 'int8'}", *flags])
    assert not list(tmp_path.iterdir())


def test_weight_only_stores_integers_and_multiplies_in_float(trained, tmp_path):
    output = tmp_path / "int8"
    quantize.main([f"--workdir={trained}", f"--output={output}", "--weight_only", "--sensitivity_images=0"])
    program, variables = stored(output)
    assert len(integer_kernels(variables)) == 12
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    compiled = step.eval_step.lower(variables, {}, images, program=program).compile()
    assert not integer_dots(compiled)
    exact = step.eval_step(
        {"params": program.method.merge(variables)["params"]}, {}, images, program=calibration.plain(program)
    )
    np.testing.assert_allclose(step.eval_step(variables, {}, images, program=program), exact, rtol=1e-5, atol=1e-5)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["method"]["options"]["weight_only"]
    assert evaluate.evaluate(output) == summary["metrics"]["test"]


def trained_in_int8(image_folder, workdir, methods=("quant",), trainable=".", **changes):
    """A run of a few steps with int8 products."""
    config = tiny_run(image_folder, "quant")
    config.methods, config.train.trainable, config.train.steps = methods, trainable, 4
    config.quant.update(changes)
    train.train(config, workdir)
    return workdir


def logits(program, *variables):
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    return np.asarray(step.eval_step(*variables, images, program=program))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 4, "static": True, "attention": True, "skip_layers": "^(embed|head)|fc2$"},
        {"weight_only": True, "skip_layers": "^embed"},
    ],
    ids=str,
)
def test_a_run_that_trained_in_int8_becomes_the_model_that_it_trained_to_be(image_folder, tmp_path, changes, capsys):
    workdir = trained_in_int8(image_folder, tmp_path / "qat", **changes)
    source = quantize._source(workdir)
    quantize.main([f"--workdir={workdir}", f"--output={tmp_path / 'int8'}", "--sensitivity_images=0"])
    program, variables = stored(tmp_path / "int8")
    trained, ours = logits(source.built.program, source.trainable, source.built.frozen), logits(program, variables, {})
    exact = logits(source.plain, {"params": source.params}, {})
    np.testing.assert_allclose(ours, trained, rtol=1e-5, atol=1e-5)
    assert np.abs(trained - exact).max() > 1e-3  # far beyond that tolerance

    # "The float model" is one without int8 products, and is said to be that.
    assert "the float model below is its kernels without them" in capsys.readouterr().out
    told = json.loads((tmp_path / "int8" / "summary.json").read_text())["method"]
    assert told["float_model"] == "the merged kernels of the run, multiplied in float"
    plain = dataclasses.replace(source.built.program, model=tiny())
    of_test = (source.dataset, "test", source.config)
    expected = evaluate.outputs(plain, {"params": source.trainable["params"]}, {}, *of_test).logits
    np.testing.assert_allclose(source.outputs(*of_test[:2]).logits, expected, rtol=1e-5, atol=1e-5)

    # What is typed wins.
    options = ["--bits=8", "--static=", "--no-attention", "--no-weight_only", "--smooth", "--sensitivity_images=0"]
    quantize.main([f"--workdir={workdir}", f"--output={tmp_path / 'other'}", *options])
    config = Folder(tmp_path / "other").config().quant
    assert (config.bits, config.static, config.attention, config.weight_only) == (8, False, False, False)
    assert config.skip_layers == changes["skip_layers"]


@pytest.mark.slow
def test_that_an_int8_base_is_quantised_again_is_said(image_folder, tmp_path, capsys):
    workdir = trained_in_int8(image_folder, tmp_path / "lora", ("quant", "lora"), "^head", base="int8")
    summary = quantize.quantize(workdir, tmp_path / "int8", FAST)
    assert "its base is int8 already (8 bits): kernels are dequantised, adapters merged" in capsys.readouterr().out
    assert summary["method"]["float_model"] == "the merged kernels of the run, multiplied in float"


def test_a_run_of_more_devices_is_quantised_on_those_of_today(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    told["mesh"]["model"] = 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(told))
    quantize.quantize(tmp_path / "run", tmp_path / "int8", Options(max_drop=None))
    assert Folder(tmp_path / "int8").config().mesh.model == 1


def test_calibration_images_are_those_of_the_seed(trained):
    source = quantize._source(trained)
    first, same, other = (calibration.subset(source.dataset, 8, seed).splits for seed in (3, 3, 4))
    assert first == same != other
    assert first.count("train") == other.count("train") == 8


def test_two_commands_cannot_make_the_same_output(trained, tmp_path):
    part = tmp_path / "int8.part"
    with Lock(part, "--output"):
        (part / "run").mkdir()
        with pytest.raises(InputError, match=rf"--output {part}: in use by process \d+"):
            quantize.quantize(trained, tmp_path / "int8", FAST)
        assert (part / "run").is_dir()
    assert part.is_dir()  # as a command that was killed leaves it
    (part / "run" / "half").write_text("")
    quantize.quantize(trained, tmp_path / "int8", FAST)
    assert not (tmp_path / "int8" / "half").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "int8"]


def test_other_weights_can_be_studied_in_the_place_of_the_runs(trained, tmp_path):
    """The float model is then of these; here one that says the opposite."""

    def opposite(params):
        return tree.map_named(lambda name, leaf: -leaf if name.startswith("head/") else leaf, params)

    summary = quantize.quantize(trained, tmp_path / "int8", FAST, opposite)
    compared = summary["method"]["compared"]["test"]
    assert compared["agreement"] == 1
    as_it_was = json.loads((trained / "summary.json").read_text())["metrics"]["test"]["accuracy"]["value"]
    assert compared["float"]["accuracy"]["value"] < as_it_was


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
        (["--bits=3"], "--bits 3: 8 or 4"),
        (["--static=mse", "--weight_only"], "--static mse with --weight_only: "),
        (["--attention", "--weight_only"], "--attention with --weight_only: "),
        (["--static=most"], "--static most: mse, max, a percentile"),
        (["--static=101"], "--static 101: a percentile is above 0"),
        (
            ["--static=trained"],
            "--static trained: the run trained no static range for 12 layers, such as blocks_0/attn/",
        ),
        (["--static=trained", "--smooth"], "--smooth with --static trained: "),
        (["--skip_layers=."], "--skip_layers '.' skips every linear layer: nothing is quantised"),
        (["--skip_layers=("], "--skip_layers '(': no regex: "),
        (["--workdir=nowhere"], "no run here"),
        (["--calibration=nowhere"], "--calibration nowhere: "),
    ],
)
def test_bad_flags_are_refused_before_anything_is_computed(trained, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(observe, "observe", None)
    monkeypatch.setattr(step, "eval_step", None)
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
