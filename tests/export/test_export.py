"""The command export and what `vitft_jax.load` makes of its folders, on runs that were never trained."""

import json
import re
import shutil
import sys
from pathlib import Path

import exports
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import vitft_jax
from vitft_jax import decision, exported, hf_names, peft, predictor, run, tree
from vitft_jax.build import build_for
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError
from vitft_jax.export import Options, export, hugging_face
from vitft_jax.export import peft as peft_export
from vitft_jax.export.__main__ import main
from vitft_jax.folder import Folder
from vitft_jax.methods import lora

SKIP = {"skip.layers": (0,), "skip.drop_ratio": (0.5,)}


@pytest.fixture(scope="module")
def root(image_folder, tmp_path_factory):
    """Bases, and runs on them."""
    root = tmp_path_factory.mktemp("runs")
    base = exports.write_base(root / "base", "vit")

    def made(name, method=(), how=None, **changes):
        config = exports.config_for(image_folder, changes.pop("base", base), method, **changes)
        exports.hand_made(root / name, config, how)

    made("lora", "lora")
    several = exports.several_labels(root / "images", image_folder)
    made("several", "lora", Decision(0.7, (0.3, 0.6)), **several)
    made("skip", ("lora", "skip"), **SKIP)
    made("int8", ("quant", "lora"), **{"quant.base": "int8"})
    made("probe")
    for method in ("dora", "adalora", "pissa"):
        made(method, method, Decision(1.5), **{"data.fit": "crop"})
    made("norms", "lora", **{"train.trainable": "^(head|norm)"})
    made("mean", "lora", **{"model.features": "mean"})
    made("both", "lora", **{"model.features": "cls+mean"})
    made("second", "lora", base=root / "lora")
    return root


def images(folder):
    return [Image.open(file) for file in sorted(folder.rglob("[0-2].png"))]


def says(folder, pictures):
    return vitft_jax.load(folder).predict(pictures)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("lora", "hf"), ("several", "timm"), ("mean", "hf"), ("second", "hf"),
        ("lora", "peft"), ("several", "peft"), ("dora", "peft"), ("adalora", "peft"), ("pissa", "peft"),
        ("several", "stablehlo"), ("skip", "stablehlo"), ("several", "onnx"), ("skip", "onnx"),
    ],
)  # fmt: skip
def test_what_was_exported_says_what_the_run_says(root, image_folder, tmp_path, name, format):
    if format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    export(root / name, tmp_path / "out", format)
    ours, theirs = (says(folder, images(image_folder)) for folder in (root / name, tmp_path / "out"))
    assert ours.probabilities.std() > 0.05
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
    assert theirs.labels == ours.labels
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_command_says_what_its_user_must_know(root, tmp_path, capsys):
    main([f"--workdir={root / 'skip'}", "--format=hf", f"--output={tmp_path / 'hf'}", "--without=skip"])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'hf'}: hf, 0.1 MB\nnote: without 'skip'")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'pipeline("image-classification"' in card
    assert "without 'skip'" in card
    assert exported.read(tmp_path / "hf").left_out == ("skip",)
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "python -m vitft_jax.export --workdir runs/lora --format hf --output" in capsys.readouterr().out


def test_the_card_of_the_run_goes_along(root, tmp_path, monkeypatch):
    card = root / "probe" / "MODEL_CARD.md"
    card.write_text("---\nlicense: mit\nlibrary_name: vitft_jax\n---\n# Mine\n\nEdited by hand.\n")
    export(root / "probe", tmp_path / "hf", "hf")
    card.unlink()
    text = (tmp_path / "hf" / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert front.splitlines() == ["library_name: transformers", "license: mit", "pipeline_tag: image-classification"]
    assert body.endswith("# Mine\n\nEdited by hand.\n")


def test_a_model_without_skipping_is_the_run_without_skipping(root, image_folder, tmp_path):
    export(root / "skip", tmp_path / "hf", "hf", Options(without=("skip",)))
    best = run.best(root / "skip")
    config = best.config.copy_and_resolve_references()
    config.methods = ("lora",)
    plain = build_for(config, best.task, run.resolve(config)[1])
    without = predictor.of_model(config, plain, best.trainable, best.task, decision.read(root / "skip"), best.step)
    models = [vitft_jax.load(tmp_path / "hf"), without, vitft_jax.load(root / "skip")]
    found, expected, other = (model.predict(images(image_folder)).probabilities for model in models)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - other).max() > 1e-3


def test_an_int8_run_without_quantisation_has_its_kernels_in_float(root, tmp_path):
    notes = export(root / "int8", tmp_path / "hf", "hf", Options(without=("quant",)))
    assert "without 'quant'" in notes[0]
    best = run.best(root / "int8")
    kernel = best.built.frozen["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    scales = tree.flatten(best.built.frozen["quant"])
    scale = next(leaf for name, leaf in scales.items() if name.startswith("blocks_0/mlp/fc1/"))
    assert kernel.dtype == np.int8
    written = load_file(tmp_path / "hf" / "model.safetensors")["vit.encoder.layer.0.intermediate.dense.weight"]
    np.testing.assert_array_equal(written, (np.asarray(kernel) * np.asarray(scale)).T)


REFUSED = [
    ("skip", "hf", {}, "computes with 'skip', which --format hf cannot express. Use --format onnx or stablehlo"),
    ("skip", "peft", {}, "computes with 'skip', which --format peft cannot express"),
    ("int8", "timm", {}, "computes with 'quant', which --format timm cannot express"),
    ("lora", "hf", {"without": ("skip",)}, "--without skip: this run does not compute with it"),
    ("lora", "hf", {"without": ("lora",)}, "--without lora: choose one of quant, skip"),
    ("lora", "peft", {"naming": "hf3"}, "--naming hf3: did you mean"),
    ("lora", "hf", {"naming": "hf4"}, "--naming hf4: is for --format peft"),
    ("both", "timm", {}, "timm's ViT reads cls or mean, not 'cls+mean'; use --format hf or stablehlo"),
    ("lora", "onxx", {}, "--format onxx: "),
    ("probe", "peft", {}, "has no adapter"),
    ("norms", "peft", {}, "trains norm/bias too"),
    ("mean", "peft", {}, "is none with a head like the run's"),
    ("second", "peft", {}, "is none with a head like the run's"),
    ("nowhere", "hf", {}, "no run here"),
]


@pytest.mark.parametrize(("name", "format", "options", "message"), REFUSED)
def test_refusals_leave_nothing_behind(root, tmp_path, name, format, options, message):
    with pytest.raises(InputError) as error:
        export(root / name, tmp_path / "out", format, Options(**options))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_whatever_fails_leaves_nothing_behind_and_nothing_is_written_over(root, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "old").write_text("of a command that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "write_processor", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            export(root / "lora", tmp_path / "out", "hf")
    assert [*tmp_path.rglob("*")] == [tmp_path / "out"]
    export(root / "lora", tmp_path / "out", "hf")  # an empty folder is as good as none
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", exported.FILE} == set(before)
    with pytest.raises(InputError, match=r"config\.json is no folder"):
        export(root / "lora", tmp_path / "out" / "config.json" / "deep", "hf")
    with pytest.raises(InputError, match="exists already and is not empty"):
        export(root / "lora", tmp_path / "out", "timm")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"--output \.: is the folder that you are in"):
        export(root / "lora", Path("."), "hf")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_load_refuses_what_is_damaged_or_has_another_base(root, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for text in ("{", "[]", "{}", json.dumps({**exports.about().__dict__, "mean": [0.5]})):
        (folder / exported.FILE).write_text(text)
        with pytest.raises(InputError, match=exported.FILE):
            vitft_jax.load(folder)
    exported.write(folder, exports.about(format="onxx"))
    with pytest.raises(InputError, match=r"format 'onxx' is unknown; did you mean 'onnx'"):
        vitft_jax.load(folder)
    exported.write(folder, exports.about(format="stablehlo"))
    with pytest.raises(InputError, match=r"model\.jax: is missing; export the run again"):
        vitft_jax.load(folder)
    (folder / "model.jax").write_bytes(b"\x00damaged")
    with pytest.raises(InputError, match=r"model\.jax: cannot be read"):
        vitft_jax.load(folder)


def test_load_puts_an_adapter_on_its_own_base_alone(root, tmp_path):
    base = shutil.copytree(root / "base", tmp_path / "base")
    config = Folder(root / "lora").config()
    config.model.pretrained = str(base)
    exports.hand_made(tmp_path / "run", config)
    export(tmp_path / "run", tmp_path / "peft", "peft")
    vitft_jax.load(tmp_path / "peft")
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors")
    with pytest.raises(InputError, match="has other weights than when it was exported"):
        vitft_jax.load(tmp_path / "peft")
    shutil.rmtree(base)
    with pytest.raises(InputError, match="base"):
        vitft_jax.load(tmp_path / "peft")


def test_an_onnx_file_needs_onnx_runtime(tmp_path, monkeypatch):
    exported.write(tmp_path, exports.about(format="onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        vitft_jax.load(tmp_path)


@pytest.mark.parametrize(
    "targets", [*lora.TARGETS.values(), "mlp/fc2", "attn/out", "mlp", "blocks_1/attn", "blocks_0/mlp/fc2"]
)
@pytest.mark.parametrize("scheme", hf_names.SCHEMES)
@pytest.mark.parametrize("family", hf_names.FAMILIES)
def test_target_modules_are_those_that_peft_finds(family, scheme, targets):
    layers = hf_names.layers(family, scheme, 12)
    adapted = {name for path, name in layers.items() if re.search(targets, path)}
    ends = peft_export.targets(sorted(adapted), list(layers.values()))
    others = ["classifier", "cls_classifier", f"{family}.embeddings.patch_embeddings.projection"]
    found = {m for m in [*layers.values(), *others] if any(f".{m}".endswith(f".{end}") for end in ends)}
    assert found == adapted


@pytest.mark.parametrize("scheme", ["hf5", "hf4"])
def test_an_adapter_says_what_it_needs(root, image_folder, tmp_path, scheme):
    notes = export(root / "lora", tmp_path / "peft", "peft", Options(naming=scheme))
    assert "divide them by 1.5000" in " ".join(notes)
    config = json.loads((tmp_path / "peft" / peft.CONFIG).read_text())
    assert config["target_modules"] == (["q_proj", "v_proj"] if scheme == "hf5" else ["query", "value"])
    assert config["base_model_name_or_path"] == str(root / "base")
    assert config["modules_to_save"] == ["classifier"]
    modules = {
        name.removeprefix(peft.PREFIX).removesuffix(".lora_A.weight")
        for name in load_file(tmp_path / "peft" / peft.TENSORS)
        if name.endswith("lora_A.weight")
    }
    # Transformers 4 calls its modules as its files of weights do.
    if scheme == "hf4":
        assert {f"{module}.weight" for module in modules} < set(load_file(root / "base" / "model.safetensors"))
        ours, theirs = (says(folder, images(image_folder)) for folder in (root / "lora", tmp_path / "peft"))
        np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
    assert len(modules) == 4
