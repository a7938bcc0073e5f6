"""The default run, end to end: generated images, bundled weights, `scripts/demo.py`."""

import contextlib
import csv
import json
from pathlib import Path

import demo
import numpy as np
import pytest

from vitft_jax import check_data, compare, data, evaluate, metrics, predict, pretrained, report, run, train
from vitft_jax import config as configs
from vitft_jax.build import build
from vitft_jax.data import cases
from vitft_jax.errors import InputError
from vitft_jax.report import __main__ as report_command


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
    built = build(config, dataset, source)
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


@pytest.fixture
def videos(few_patients, monkeypatch):
    """40 videos of 4 frames, and enough resamples to tell wide intervals from narrow ones."""
    monkeypatch.setattr(cases, "VIDEOS", 40)
    monkeypatch.setattr(cases, "FRAMES", 4)
    monkeypatch.setattr(metrics, "RESAMPLES", 300)
    cases.cases.cache_clear()


@pytest.mark.slow
def test_the_video_set_end_to_end(videos, tmp_path, capsys):
    """Several labels, frames in groups: from check_data to the comparison of two runs, by the commands alone."""
    overrides = [
        "--config.data.name=video",
        "--config.data.val_fraction=0.3",  # 12 videos: five with and five without a label are needed for its threshold
        "--config.data.test_fraction=0.3",
        "--config.train.thresholds=youden",
        "--config.train.epochs=4",
    ]
    with contextlib.suppress(SystemExit):  # frames of different videos may look alike
        check_data.main([f"--config={demo.CONFIGS / 'lora.py'}", f"--output={tmp_path / 'check'}", *overrides])
    runs = {name: tmp_path / name for name in ("probe", "lora")}
    for name, workdir in runs.items():
        train.main([f"--config={demo.CONFIGS / name}.py", f"--workdir={workdir}", *overrides])

    # Whole videos are held out, and check_data counted the same ones.
    checked = json.loads((tmp_path / "check" / "check.json").read_text())
    assert checked["multilabel"]
    split = {row["path"]: row for row in rows_of(runs["lora"] / "split.csv")}
    groups = {name: {row["group"] for row in split.values() if row["split"] == name} for name in data.SPLITS}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 40
    for name, counted in checked["splits"].items():
        assert counted["groups"] == len(groups[name])
        assert counted["images"] == 4 * counted["groups"]

    # Thresholds come from validation and decide in every command.
    thresholds = json.loads((runs["lora"] / "decision.json").read_text())["thresholds"]
    assert list(thresholds) == list(cases.LABELS)
    assert any(value != 0.5 for value in thresholds.values())
    said = rows_of(runs["lora"] / "predictions_test.csv")
    for row in said:
        for label, threshold in thresholds.items():
            p = float(row[f"p:{label}"])
            assert row[f"predicted:{label}"] == str(int(p >= threshold)) or p == pytest.approx(threshold, abs=1e-6)

    # Frames of a video are not independent, and the intervals know it.
    found = report.read_predictions(runs["lora"] / "predictions_test.csv")
    summary = json.loads((runs["lora"] / "summary.json").read_text())["metrics"]["test"]
    said_of = (found.probabilities, found.decided, found.labels)
    alone = metrics.assess(*said_of, found.names, found.classes, metrics.RESAMPLES)["metrics"]
    for name in ("hamming", "brier", "subset_accuracy"):
        assert summary[name]["value"] == pytest.approx(alone[name]["value"], abs=2e-6)
        assert summary[name]["high"] - summary[name]["low"] > alone[name]["high"] - alone[name]["low"]

    evaluate.main([f"--workdir={runs['lora']}", "--split=test"])
    assert rows_of(runs["lora"] / "predictions_test.csv") == said
    capsys.readouterr()
    compare.main([str(runs["probe"]), str(runs["lora"])])
    assert f"{len(said)} images in {len(groups['test'])} groups" in capsys.readouterr().out

    # The same frames as files: the same is said of them, and mistakes are drawn.
    dataset = data.load(configs.from_json((runs["lora"] / "config.json").read_text()).data, seed=0)
    frames = tmp_path / "frames"
    frames.mkdir()
    lines = [",".join(("path", *cases.LABELS))]
    for row in said:
        dataset.images[dataset.names.index(row["path"])].save(frames / f"{row['path']}.png")
        lines.append(",".join((f"{row['path']}.png", *(row[f"true:{label}"] for label in cases.LABELS))))
    (frames / "labels.csv").write_text("\n".join(lines) + "\n")
    output, mistakes = tmp_path / "out.csv", tmp_path / "mistakes.png"
    command = [f"--workdir={runs['lora']}", f"--images={frames / 'labels.csv'}", f"--output={output}"]
    predict.main([*command, f"--mistakes={mistakes}"])
    expected = [{k: v for k, v in row.items() if k != "group"} | {"path": f"{row['path']}.png"} for row in said]
    assert rows_of(output) == expected
    right = sum(all(row[f"true:{c}"] == row[f"predicted:{c}"] for c in cases.LABELS) for row in said)
    told = capsys.readouterr().out
    assert f"{right} of {len(said)} images with a true label have all labels right" in told
    assert f"{len(said) - right} mistakes in {len(said)} images" in told
    assert mistakes.is_file()

    report_command.main([str(runs["lora"])])
    report_command.main([*map(str, runs.values()), f"--output={tmp_path / 'both.html'}"])
    page = (runs["lora"] / "report.html").read_text()
    assert all(label in page for label in cases.LABELS)
    assert "All labels right" in (tmp_path / "both.html").read_text()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_generated_images_name_their_labels_themselves(few_patients):
    config = configs.default()
    config.data.labels = ("benign",)
    with pytest.raises(InputError, match=r"data\.labels"):
        data.load(config.data, seed=0)
    config = configs.default()
    config.data.name = "tagret"
    with pytest.raises(InputError, match="'target'"):
        data.load(config.data, seed=0)
