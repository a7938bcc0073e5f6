"""The command export and what `vitft_jax.load` makes of its folders, on runs that were never trained."""

import json
import shutil

import exports
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import vitft_jax
from vitft_jax import exported, peft, run, tree
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError
from vitft_jax.export import Options, export, hugging_face
from vitft_jax.export.__main__ import main

SKIP = {"skip.layers": (0,), "skip.drop_ratio": (0.5,)}


@pytest.fixture(scope="module")
def root(image_folder, tmp_path_factory):
    """Bases, and runs on them."""
    root = tmp_path_factory.mktemp("runs")
    base = exports.write_base(root / "base", "vit")

    def made(name, method=(), how=None, **changes):
        config = exports.config_for(image_folder, changes.pop("base", base), method, **changes)
        exports.hand_made(root / name, config, how)

    shutil.copytree(image_folder, root / "images")
    rows = ["path,deep,bright"]
    for file in sorted(image_folder.rglob("*.png")):
        name = file.relative_to(image_folder).as_posix()
        rows.append(f"{name},{int(not name.startswith('light'))},{int(not name.startswith('dark'))}")
    (root / "images" / "labels.csv").write_text("\n".join(rows) + "\n")
    made("lora", "lora")
    several = {"data.path": str(root / "images"), "data.table": "labels.csv", "data.labels": ("deep", "bright")}
    made("several", "lora", Decision(0.7, (0.3, 0.6)), **several)
    made("skip", ("lora", "skip"), **SKIP)
    made("int8", ("quant", "lora"), **{"quant.base": "int8"})
    made("probe")
    made("norms", "lora", **{"train.trainable": "^(head|norm)"})
    made("mean", "lora", **{"model.features": "mean"})
    made("second", "lora", base=root / "lora")
    return root


def images(folder):
    return [Image.open(file) for file in sorted(folder.rglob("[0-2].png"))]


def says(folder, pictures):
    return vitft_jax.load(folder).predict(pictures)


@pytest.mark.parametrize(("name", "format"), [("lora", "hf"), ("several", "timm"), ("mean", "hf"), ("second", "hf")])
def test_what_was_exported_says_what_the_run_says(root, image_folder, tmp_path, name, format):
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
    plain = run.build_for(config, best.task, run.resolve(config)[1])
    models = [vitft_jax.load(folder) for folder in (tmp_path / "hf", root / "skip", root / "skip")]
    models[1]._built = plain
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
    ("skip", "hf", {}, "computes with 'skip', which --format hf cannot express"),
    ("skip", "peft", {}, "computes with 'skip', which --format peft cannot express"),
    ("int8", "timm", {}, "computes with 'quant', which --format timm cannot express"),
    ("lora", "hf", {"without": ("skip",)}, "--without skip: this run does not compute with it"),
    ("lora", "hf", {"without": ("lora",)}, "--without lora: choose one of quant, skip"),
    ("lora", "peft", {"naming": "hf3"}, "--naming hf3: did you mean"),
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
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_load_opens_whole_models_alone(root, tmp_path):
    export(root / "lora", tmp_path / "peft", "peft")
    with pytest.raises(InputError, match="an export in the format 'peft'"):
        vitft_jax.load(tmp_path / "peft")
    (tmp_path / "bad").mkdir()
    for text in ("{", "[]", "{}", json.dumps({**exports.about().__dict__, "mean": [0.5]})):
        (tmp_path / "bad" / exported.FILE).write_text(text)
        with pytest.raises(InputError, match=exported.FILE):
            vitft_jax.load(tmp_path / "bad")


@pytest.mark.parametrize("scheme", ["hf5", "hf4"])
def test_an_adapter_says_what_it_needs(root, tmp_path, scheme):
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
    assert len(modules) == 4
    for name in modules:
        assert any(name.endswith(f".{end}") for end in config["target_modules"])
