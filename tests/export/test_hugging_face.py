"""Whole models in the files of transformers and of timm: name by name what these libraries write, and the same answers."""

import json

import exports
import jax
import numpy as np
import pytest
from peft_names import GOLDEN
from safetensors.numpy import load_file, save_file
from support import init, tiny

from vitft_jax import hf_names, pretrained, report, tree, vit
from vitft_jax.build import ARCHITECTURE
from vitft_jax.errors import InputError
from vitft_jax.export import hugging_face, timm


def golden(name, folder):
    """Tensors and config as a library wrote them, and our reading: arguments of the model and leaves."""
    file = np.load(GOLDEN / f"{name}.npz")
    tensors = {key.removeprefix("tensor/"): file[key] for key in file.files if key.startswith("tensor/")}
    (folder / "config.json").write_text(str(file["config"]))
    save_file(tensors, folder / "model.safetensors")
    loaded = pretrained.load(str(folder))
    return tensors, json.loads(str(file["config"])), loaded.model, tree.flatten(loaded.params)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].flags.c_contiguous
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize("name", ["vit", "deit", "deit_teacher", "dinov2"])
def test_tensors_and_config_are_those_that_transformers_writes(name, tmp_path):
    theirs, config, model, params = golden(name, tmp_path)
    family = hf_names.family_of(model)
    ours = hugging_face.tensors(params, model, family)
    theirs.pop("dinov2.embeddings.mask_token", None)
    ours.pop("dinov2.embeddings.mask_token", None)
    same(ours, theirs)
    told = exports.about(classes=tuple("abcde"))
    written = hugging_face.config(model, family, told)
    own = {"id2label", "label2id", "problem_type"}
    assert {k: v for k, v in written.items() if k not in own} == {k: config[k] for k in written if k not in own}
    assert written["id2label"] == {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}


@pytest.mark.parametrize("name", ["timm_vit", "timm_deit", "timm_deit3", "timm_dinov2"])
def test_tensors_and_config_are_those_that_timm_writes(name, tmp_path):
    theirs, config, model, params = golden(name, tmp_path)
    if model["features"] == "cls+mean":
        model = {**model, "features": "cls"}
    ours = timm.tensors(params, model)
    bare = theirs["pos_embed"].shape[1]  # where the prefix tokens have no position, ours is zero
    assert not ours["pos_embed"][:, :-bare].any()
    ours["pos_embed"] = np.ascontiguousarray(ours["pos_embed"][:, -bare:])
    theirs.pop("mask_token", None)
    same(ours, theirs)
    written = timm.config(model, exports.about(classes=tuple("abcde")))
    for key in ("num_classes", "num_features", "global_pool"):
        assert written[key] == config[key]
    for key in ("first_conv", "classifier"):
        assert written["pretrained_cfg"][key] == config["pretrained_cfg"][key]


MODELS = {
    "plain": {"eps": 1e-12},
    "distilled": {"distilled": True},
    "one head": {"distilled": True, "dist_head": False},
    "LayerScale, both": {"layer_scale": True, "features": "cls+mean"},
    "LayerScale, class token": {"layer_scale": True},
    "LayerScale, mean": {"layer_scale": True, "features": "mean"},
    "mean": {"features": "mean"},
    "both": {"features": "cls+mean"},
}


def logits(model, params, images):
    return np.asarray(jax.jit(model.apply)({"params": tree.unflatten(params)}, images))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_that_is_written_answers_as_before(name, tmp_path):
    model = tiny(**MODELS[name])
    params = {leaf: np.asarray(array) for leaf, array in tree.flatten(init(model)["params"]).items()}
    arguments = {key: getattr(model, key) for key in ARCHITECTURE}
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    expected = logits(model, params, images)
    family = hf_names.family_of(arguments)
    writers = {
        "hf": lambda: (hugging_face.tensors(params, arguments, family), hugging_face.config(arguments, family, told))
    }
    if arguments["features"] != "cls+mean" and arguments["eps"] == timm.EPSILON:
        writers["timm"] = lambda: (timm.tensors(params, arguments), timm.config(arguments, told))
    told = exports.about()
    for format, write in writers.items():
        (tmp_path / format).mkdir()
        tensors, config = write()
        save_file(tensors, tmp_path / format / "model.safetensors")
        report.write_json(tmp_path / format / "config.json", config)
        loaded = pretrained.load(str(tmp_path / format))
        assert loaded.classes == told.classes
        assert loaded.model["heads"] == arguments["heads"]
        found = logits(vit.ViT(**loaded.model, classes=3), tree.flatten(loaded.params), images)
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=format)


def test_models_that_no_library_has():
    with pytest.raises(InputError, match="both a distillation token and LayerScale"):
        hf_names.family_of({"distilled": True, "layer_scale": True, "features": "cls"})
    model = {key: getattr(tiny(features="mean", hidden=40), key) for key in ARCHITECTURE}
    with pytest.raises(InputError, match="whole multiples of its width 32, not 40"):
        hugging_face.config(model, "dinov2", exports.about())


def test_preprocessing_is_stated_or_said_not_to_be(tmp_path):
    def written(fit):
        folder = tmp_path / fit
        folder.mkdir()
        notes = hugging_face.write_processor(folder, exports.about(fit=fit))
        file = folder / "preprocessor_config.json"
        return " ".join(notes), json.loads(file.read_text()) if file.exists() else None

    notes, processor = written("squash")
    assert processor["size"] == {"height": 16, "width": 16}
    assert processor["resample"] == 3
    assert processor["image_mean"] == [0.4, 0.5, 0.6]
    assert "data.fit" not in notes
    notes, processor = written("crop")
    assert processor["size"] == {"shortest_edge": 16}
    assert "data.fit='crop'" in notes
    notes, processor = written("pad")
    assert processor is None
    assert "data.fit='pad'" in notes


@pytest.mark.parametrize(("width", "hidden"), [(192, 768), (48, 133), (100, 229), (32, 7)])
def test_the_ratio_of_a_timm_mlp_is_exact(width, hidden):
    model = {key: getattr(tiny(width=width, hidden=hidden), key) for key in ARCHITECTURE}
    assert int(width * timm.config(model, exports.about())["model_args"]["mlp_ratio"]) == hidden


def test_files_of_a_base_open_as_one(tmp_path):
    base = exports.write_base(tmp_path / "base", "deit")
    loaded = pretrained.load(str(base))
    assert loaded.library == "hugging_face"
    assert loaded.mean == (0.4, 0.5, 0.6)
    assert set(load_file(base / "model.safetensors")) >= {"cls_classifier.weight", "distillation_classifier.bias"}
