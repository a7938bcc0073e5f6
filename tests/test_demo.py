"""The default run, end to end: generated images, bundled weights, `scripts/demo.py`."""

import json
from pathlib import Path

import demo
import numpy as np
import pytest

from vitft_jax import config as configs
from vitft_jax import data, pretrained, run
from vitft_jax.data import cases
from vitft_jax.errors import InputError


@pytest.fixture
def few_patients(monkeypatch, tmp_path):
    """A target set of 45 patients, made for this test."""
    monkeypatch.setenv("VITFT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cases, "PATIENTS", {"source": 9, "target": 45})
    monkeypatch.setattr(cases, "VIDEOS", 20)
    monkeypatch.setattr(cases, "FRAMES", 3)
    cases.cases.cache_clear()
    yield
    cases.cases.cache_clear()


def test_the_demo_ends_with_a_table_of_three_models(few_patients, tmp_path, capsys):
    demo.main(["--workdir", str(tmp_path / "demo"), "--config.train.steps=4", "--config.augment.speckle=0.2"])
    shown = capsys.readouterr().out
    for text in ("before", "head only", "LoRA and head", "python -m vitft_jax.train"):
        assert text in shown
    summaries = {
        name: json.loads((tmp_path / "demo" / name / "summary.json").read_text()) for name in ("probe", "lora")
    }
    assert summaries["probe"]["parameters"]["trainable"] == 3 * 128 + 3
    assert summaries["lora"]["parameters"]["trainable"] == 3 * 128 + 3 + 6 * 2 * 8 * 2 * 128
    for summary in summaries.values():
        assert summary["environment"]["weights"]["source"] == "bundled"
    config = configs.from_json((tmp_path / "demo" / "lora" / "config.json").read_text())
    assert config.data.image_size == 128  # that of the weights


def test_the_demo_refuses_a_misspelt_flag():
    with pytest.raises(InputError, match=r"--workdir"):
        demo.main(["--wordkir=x"])


def test_bundled_weights_are_small_and_keep_their_head_in_the_order_of_the_data(few_patients):
    weights = pretrained.load("bundled")
    assert sum(file.stat().st_size for file in Path(pretrained.BUNDLED).iterdir()) <= 3e6
    config, source = run.resolve(configs.default())
    dataset = data.load(config.data, seed=0)
    assert sorted(dataset.classes) == sorted(weights.classes) == ["benign", "malignant", "normal"]
    built = run.build(config, dataset, source)
    for position, name in enumerate(dataset.classes):
        theirs = weights.params["head"]["kernel"][:, weights.classes.index(name)]
        np.testing.assert_array_equal(np.asarray(built.trainable["params"]["head"]["kernel"])[:, position], theirs)


def test_the_head_is_new_where_the_classes_are_others():
    weights = pretrained.load("bundled")
    fresh = {**weights.params, "head": {"kernel": np.full((128, 3), 7.0), "bias": np.zeros(3)}}
    kept = pretrained.fit(weights, fresh, weights.classes)["head"]["kernel"]
    np.testing.assert_array_equal(kept, weights.params["head"]["kernel"])
    other = pretrained.fit(weights, fresh, ("cat", "dog", "normal"))["head"]["kernel"]
    np.testing.assert_array_equal(other, fresh["head"]["kernel"])
    unnamed = pretrained.fit(weights, fresh)["head"]["kernel"]
    np.testing.assert_array_equal(unnamed, weights.params["head"]["kernel"])


def test_videos_have_several_labels_and_are_split_by_video(few_patients):
    config = configs.default()
    config.data.name = "video"
    dataset = data.load(config.data, seed=0)
    assert dataset.multilabel
    assert dataset.classes == cases.LABELS
    groups = {split: {dataset.groups[i] for i in dataset.indices(split)} for split in data.SPLITS}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["val"]


def test_generated_images_name_their_labels_themselves(few_patients):
    config = configs.default()
    config.data.labels = ("benign",)
    with pytest.raises(InputError, match=r"data\.labels"):
        data.load(config.data, seed=0)
    config = configs.default()
    config.data.name = "tagret"
    with pytest.raises(InputError, match="'target'"):
        data.load(config.data, seed=0)
