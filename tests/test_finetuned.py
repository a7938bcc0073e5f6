"""A trained run as the base weights of another."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import TINY

from vitft_jax import config as configs
from vitft_jax import decision, evaluate, quantize, run, train, tree, vit
from vitft_jax.build import build, build_for
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.ptq.options import Options
from vitft_jax.ptq.recipe import Recipe
from vitft_jax.task import Task


@pytest.fixture(autouse=True)
def variant(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", TINY)


@pytest.fixture(scope="module")
def first(image_folder, tmp_path_factory):
    """A LoRA run with random base weights."""
    config = configs.default()
    config.methods, config.model.name, config.model.pretrained = ("lora",), "tiny_test", ""
    config.data.path, config.data.image_size = str(image_folder), 16
    config.data.val_fraction = config.data.test_fraction = 0.2
    config.train.batch_size, config.train.lr, config.train.epochs = 6, 1e-2, 4.0
    workdir = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.VARIANTS, "tiny_test", TINY)
        train.train(config, workdir)
    return workdir


def second(first, **changes):
    """The config of a run that begins where `first` ended."""
    config = Folder(first).config()
    config.methods, config.model.name, config.model.pretrained = (), "", str(first)
    config.update_from_flattened_dict(changes)
    return config


def built(config):
    config, source = run.resolve(config)
    dataset = Folder(Path(config.model.pretrained)).dataset(config)
    return build(config, dataset, source), dataset, config


def test_before_its_first_step_it_says_what_the_first_run_said(first):
    later, dataset, config = built(second(first))
    assert set(later.trainable) == {"params"}  # the adapters are in the kernels now
    out = evaluate.outputs(later.program, later.trainable, later.frozen, dataset, "test", config)
    rows = (first / "predictions_test.csv").read_text().splitlines()[1:]
    said = np.array([[float(cell) for cell in row.split(",")[-3:]] for row in rows])
    out = replace(out, decision=decision.read(first))
    np.testing.assert_allclose(out.probabilities, said, atol=2e-6)  # the file has six digits


@pytest.mark.slow
def test_quantisation_aware_training_from_a_lora_run(first, tmp_path):
    config = second(first, methods=("quant",))
    config.train.trainable, config.train.lr = ".", 1e-3
    summary = train.train(config, tmp_path / "qat")
    weights = summary["environment"]["weights"]
    assert weights["source"] == str(first)
    assert len(weights["sha256"]) == 64
    assert evaluate.evaluate(tmp_path / "qat", "test") == summary["metrics"]["test"]


def test_other_classes_get_another_head_and_other_sizes_other_positions(first, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "grey")
    config = second(first)
    config.data.path, config.data.image_size = str(tmp_path / "images"), 24
    config, source = run.resolve(config)
    later = build(config, Folder(tmp_path / "new").dataset(config), source)
    assert later.trainable["params"]["head"]["kernel"].shape == (32, 2)
    assert later.frozen["params"]["embed"]["position"].shape == (1, 1 + 36, 32)
    np.testing.assert_array_equal(
        later.frozen["params"]["embed"]["patch"]["kernel"], source.params["embed"]["patch"]["kernel"]
    )


def test_a_first_run_that_changed_is_noticed(first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    config = second(tmp_path / "first")
    config.train.epochs = 1.0
    train.train(config, tmp_path / "second")
    again = Folder(tmp_path / "first").config()
    shutil.rmtree(tmp_path / "first")
    again.train.lr = 2e-2
    train.train(again, tmp_path / "first")
    with pytest.raises(InputError, match=r"its weights were .* when it was started"):
        train.train(config, tmp_path / "second")


def test_refusals(first, tmp_path):
    with pytest.raises(InputError, match=r"model\.revision='main' is for Hub ids"):
        run.resolve(second(first, **{"model.revision": "main"}))
    with pytest.raises(InputError, match="is no vit_base_patch16"):
        run.resolve(second(first, **{"model.name": "vit_base_patch16"}))
    quantize.quantize(first, tmp_path / "int8", Options(Recipe(smooth=False), sensitivity_images=0))
    with pytest.raises(InputError, match="int8 model; give the run that it was made from"):
        run.resolve(second(tmp_path / "int8"))
    shutil.copytree(first, tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint here"):
        run.resolve(second(tmp_path / "empty"))


def test_labels_keep_the_head_of_the_same_names_and_no_other(first):
    """Its columns go to the labels that they are of; as many labels of other names get a fresh one."""
    config, source = run.resolve(second(first))
    kernel = np.asarray(source.params["head"]["kernel"])

    def head(*classes):
        task = Task(classes, multilabel=True, total_steps=10)
        return np.asarray(tree.flatten(build_for(config, task, source).trainable)["params/head/kernel"])

    np.testing.assert_array_equal(head("light", "dark", "grey"), kernel[:, [2, 0, 1]])
    assert not np.isin(head("quality", "cord", "fluid"), kernel).any()
