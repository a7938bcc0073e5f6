"""The commands train and evaluate, end to end on tiny models: files, resume, bad input."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image
from support import lines, trained

from vitft_jax import config as configs
from vitft_jax import data, decision, evaluate, metrics, report, step, task, train, tree, vit
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.task import class_weights


def test_a_lora_run_learns_and_writes_what_the_contract_says(tiny_config, tmp_path, capsys, reports):
    tiny_config.methods = ("lora",)
    tiny_config.train.epochs = 6.0
    summary = train.train(tiny_config, tmp_path / "run")
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "run.json", "split.csv", "metrics.jsonl", "summary.json", "checkpoints",
        "predictions_val.csv", "predictions_test.csv", "decision.json", "report.html", "MODEL_CARD.md",
    }  # fmt: skip
    assert summary["metrics"]["test"]["accuracy"]["value"] >= 0.8  # brightness alone tells the classes apart
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["timing"]["steps"] == 18
    p = summary["parameters"]
    assert p["trainable"] == 2 * 2 * (32 * 8 + 8 * 32) + 32 * 3 + 3
    assert p["trainable_percent"] == pytest.approx(100 * p["trainable"] / p["total"])
    assert summary["bytes"]["trainable"] == 4 * p["trainable"]
    assert summary["timing"]["train_images_per_second"] > 0
    assert summary["environment"]["weights"] == {"source": "random", "revision": "", "sha256": ""}
    assert configs.from_json((folder / "config.json").read_text()) == tiny_config
    written = lines(folder)
    assert [e["step"] for e in written if e["split"] == "val"] == [3, 6, 9, 12, 15, 18]
    assert {"loss", "grad_norm", "images_per_second"} <= written[0].keys()
    rows = list(csv.DictReader((folder / "predictions_test.csv").open()))
    assert len(rows) == 6
    right = np.mean([row["true"] == row["predicted"] for row in rows])
    assert right == summary["metrics"]["test"]["accuracy"]["value"]
    assert all(abs(sum(float(row[f"p:{c}"]) for c in ("dark", "grey", "light")) - 1) < 1e-5 for row in rows)
    assert "step 3  val" in capsys.readouterr().out


def test_checkpoints_hold_what_trains_and_nothing_else(tiny_config, tmp_path):
    tiny_config.methods = ("lora",)
    train.train(tiny_config, tmp_path / "run")
    state, _ = trained(tmp_path / "run")
    names = set(tree.flatten(state.trainable))
    assert {n.split("/")[0] for n in names} == {"lora", "params"}
    assert {n for n in names if n.startswith("params")} == {"params/head/bias", "params/head/kernel"}
    stored = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file())
    assert stored < 2 * (3 * tree.nbytes(state.trainable) + 100_000)


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        ("lora", "within an epoch"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("lora", "between epochs"), ("dora", "within an epoch"), ("pissa", "within an epoch"))
        ),
    ],
)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tiny_config, tmp_path, monkeypatch, method, cut):
    tiny_config.methods = (method,)
    tiny_config.lora.dropout = 0.1
    tiny_config.augment.update({"speckle": 0.2, "tgc": 0.2, "mixup": 0.4, "cutmix": 1.0})
    tiny_config.train.epochs = 3.0
    tiny_config.train.balanced, tiny_config.train.focal_gamma = True, 2.0
    train.train(tiny_config, tmp_path / "whole")
    real, calls = step.train_step, []

    def dies(*args, **kwargs):
        calls.append(None)
        if len(calls) == (7 if cut == "between epochs" else 6):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(step, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_config, tmp_path / "cut")
    monkeypatch.setattr(step, "train_step", real)
    assert not (tmp_path / "cut" / "summary.json").exists()
    train.train(tiny_config, tmp_path / "cut")

    (a, loop_a), (b, loop_b) = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert loop_a == loop_b
    for split in ("val", "test"):
        name = f"predictions_{split}.csv"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    strip = [{k: v for k, v in e.items() if k != "images_per_second"} for e in lines(tmp_path / "whole")]
    assert strip == [{k: v for k, v in e.items() if k != "images_per_second"} for e in lines(tmp_path / "cut")]


def test_a_finished_run_trains_no_further(tiny_config, tmp_path, monkeypatch):
    first = train.train(tiny_config, tmp_path / "run")
    monkeypatch.setattr(step, "train_step", None)
    assert train.train(tiny_config, tmp_path / "run") == first


def test_evaluate_gives_the_numbers_of_training_from_the_folder_alone(tiny_config, tmp_path):
    summary = train.train(tiny_config, tmp_path / "run")
    assert evaluate.evaluate(tmp_path / "run", "test") == summary["metrics"]["test"]
    results = evaluate.evaluate(tmp_path / "run", "train")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["train"] == results
    assert len((tmp_path / "run" / "predictions_train.csv").read_text().splitlines()) == 1 + 18


def test_full_and_probe_train_what_they_say(tiny_config, tmp_path):
    probe = train.train(tiny_config, tmp_path / "probe")
    assert probe["parameters"]["trainable"] == 32 * 3 + 3
    tiny_config.train.trainable = "."
    full = train.train(tiny_config, tmp_path / "full")
    assert full["parameters"]["trainable"] == full["parameters"]["total"] == probe["parameters"]["total"]


def test_early_stopping_and_best_checkpoint(tiny_config, tmp_path):
    tiny_config.train.lr = 0.0  # nothing improves after the first epoch
    tiny_config.train.epochs = 9.0
    tiny_config.train.patience = 2
    summary = train.train(tiny_config, tmp_path / "run")
    assert summary["timing"]["steps"] == 9
    assert summary["best_step"] == 3
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [3, 6, 9]  # the best, and the two newest


def test_multilabel_table_end_to_end(tiny_config, image_folder, tmp_path):
    table = tmp_path / "labels.csv"
    names = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    rows = [f"{n},{int(not n.startswith('dark'))},{int(n.startswith('light'))}" for n in names]
    table.write_text("path,visible,bright\n" + "\n".join(rows) + "\n")
    tiny_config.data.table, tiny_config.data.labels = str(table), ("visible", "bright")
    tiny_config.methods = ("lora",)
    tiny_config.train.class_weights = True
    tiny_config.train.epochs = 6.0
    summary = train.train(tiny_config, tmp_path / "run")
    assert tuple(summary["metrics"]["test"]) == metrics.MULTILABEL
    how = decision.read(tmp_path / "run")
    assert list(summary["calibration"]["test"]["thresholds"].values()) == list(how.thresholds)
    assert set(summary["per_class"]["test"]) == {"visible", "bright"}
    assert np.shape(summary["confusion"]["test"]) == (2, 2, 2)
    assert summary["metrics"]["test"]["auroc"]["value"] >= 0.8
    header = (tmp_path / "run" / "predictions_test.csv").read_text().splitlines()[0]
    assert header == "path,group,true:visible,true:bright,predicted:visible,predicted:bright,p:visible,p:bright"


def test_temperature_and_thresholds_are_fitted_on_validation_and_used_everywhere(tiny_config, tmp_path, capsys):
    summary = train.train(tiny_config, tmp_path / "run")
    folder = Folder(tmp_path / "run")
    how, dataset = decision.read(folder.path), folder.dataset(tiny_config)
    built = build(folder.config(), dataset, None)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, _ = checkpoints.restore_best(built.trainable)
    for split in ("val", "test"):
        out = evaluate.outputs(built.program, trainable, built.frozen, dataset, split, tiny_config)
        if split == "val":
            assert how == decision.fit(out.logits, out.labels, [dataset.groups[i] for i in out.indices], "f1")
        raw, scaled = (metrics.probabilities(z, False) for z in (out.logits, out.logits / how.temperature))
        read = report.read_predictions(folder.path / f"predictions_{split}.csv")
        np.testing.assert_allclose(read.probabilities, scaled, atol=1e-6)
        told = summary["calibration"][split]
        assert told["temperature"] == how.temperature != 1
        for name in ("ece", "brier", "loss"):
            assert told["before"][name] == pytest.approx(metrics.compute(raw, out.labels, False)[name], rel=1e-6)
            assert told["after"][name] == summary["metrics"][split][name]["value"]
    assert summary["calibration"]["val"]["after"]["loss"] < summary["calibration"]["val"]["before"]["loss"]
    assert f"test: temperature {how.temperature:.2f}, ece " in capsys.readouterr().out


def test_thresholds_decide_and_another_rule_changes_nothing_else(tiny_config, image_folder, tmp_path):
    table = tmp_path / "labels.csv"
    names = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    table.write_text("path,light,odd\n" + "".join(f"{n},{int('light' in n)},{int(n[-5]) % 2}\n" for n in names))
    tiny_config.data.table, tiny_config.data.labels = str(table), ("light", "odd")
    tiny_config.data.val_fraction = 0.5  # five groups with and without each label, as 'youden' needs
    found = {}
    for rule in ("youden", "half"):
        tiny_config.train.thresholds = rule
        train.train(tiny_config, tmp_path / rule)
        found[rule] = report.read_predictions(tmp_path / rule / "predictions_test.csv")
    np.testing.assert_array_equal(found["youden"].probabilities, found["half"].probabilities)
    how = decision.read(tmp_path / "youden")
    assert 0.5 not in how.thresholds
    assert decision.read(tmp_path / "half").thresholds == (0.5, 0.5)
    for rule, thresholds in (("youden", how.thresholds), ("half", (0.5, 0.5))):
        np.testing.assert_array_equal(found[rule].decided, found[rule].probabilities >= thresholds)


@pytest.mark.parametrize("name", ["brier", "loss"])
def test_the_best_checkpoint_by_a_metric_of_which_less_is_better(tiny_config, tmp_path, name):
    tiny_config.train.best_metric, tiny_config.train.epochs, tiny_config.train.lr = name, 4.0, 0.3
    summary = train.train(tiny_config, tmp_path / "run")
    values = {e["step"]: e[name] for e in lines(tmp_path / "run") if e["split"] == "val"}
    assert len(set(values.values())) == 4
    assert summary["best_step"] == min(values, key=values.get) != max(values)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "steps"), [(1.1, 50, 55), (2.2, 100, 220), (1.0, 7, 7), (0.01, 7, 1), (1.5, 3, 5)]
)
def test_fractions_of_epochs_are_rounded_up_once(epochs, per_epoch, steps):
    config = configs.default()
    config.train.epochs, config.train.batch_size = epochs, 4
    assert task.total_steps(config, 4 * per_epoch) == steps


def test_class_weights():
    def of(labels, multilabel):
        n = len(labels)
        names = tuple(map(str, range(n)))
        dataset = data.Dataset(("a", "b"), multilabel, names, np.array(labels), names, ("train",) * n, None)
        return class_weights(dataset)

    assert of([0, 0, 0, 1], False) == pytest.approx((4 / (2 * 3), 4 / 2))
    assert of([[1, 0], [1, 1], [1, 0], [0, 0]], True) == pytest.approx((1 / 3, 3))
    assert of([[1, 0], [1, 1], [1, 0]], True) == (1, 2)  # that every image has: no correction, and no weight of 0


def test_a_model_of_two_tokens_reads_its_class_token(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", {**vit.VARIANTS["tiny_test"], "distilled": True})
    tiny_config.model.features = "mean"
    said = refused(tiny_config, tmp_path / "run", monkeypatch)
    assert "model.features='mean': a model with a distillation token has 'cls' alone" in said


def test_a_run_goes_on_with_what_changes_no_step(tiny_config, tmp_path, monkeypatch):
    """What messages of a run advise: fewer workers, and to go back where the loss is not finite."""
    summary = train.train(tiny_config, tmp_path / "run")
    tiny_config.data.workers, tiny_config.train.nan_retries = 2, 3
    monkeypatch.setattr(step, "train_step", None)
    assert train.train(tiny_config, tmp_path / "run") == summary


def test_a_skipping_run_reports_its_flops_and_draws_what_it_keeps(tiny_config, tmp_path):
    tiny_config.methods = ("lora", "skip")
    tiny_config.skip.layers, tiny_config.skip.drop_ratio = (0,), (0.5,)
    tiny_config.figures.names = ("dark/3.png", "light/7.png")
    summary = train.train(tiny_config, tmp_path / "run")
    assert summary["flops"]["forward"] < summary["flops"]["dense_forward"]
    assert summary["flops"]["ratio"] == summary["flops"]["forward"] / summary["flops"]["dense_forward"]
    with Image.open(tmp_path / "run" / "figures" / "patches.png") as picture:
        assert picture.width > 100
        assert picture.height > picture.width  # two rows with a title each


@pytest.mark.slow
def test_warm_up_trains_in_stairs_and_an_interrupted_one_ends_as_if_it_had_not_been(tiny_config, tmp_path, monkeypatch):
    tiny_config.methods = ("lora", "skip")
    tiny_config.skip.layers, tiny_config.skip.drop_ratio, tiny_config.skip.warmup = (0,), (0.9,), 0.67
    tiny_config.train.epochs = 3.0  # 9 steps, 6 of them warm-up
    real, kept = step.train_step, []

    def spy(*args, program, **kwargs):
        kept.append(program.model.select.counts(16)[0][1])
        if len(kept) == 5:
            raise KeyboardInterrupt
        return real(*args, program=program, **kwargs)

    monkeypatch.setattr(step, "train_step", spy)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_config, tmp_path / "cut")
    train.train(tiny_config, tmp_path / "cut")
    assert kept[:5] == [15, 15, 12, 6, 3]
    assert kept[5:] == [6, 3, 3, 2, 2, 2]  # goes on at step 3, after the first epoch
    monkeypatch.setattr(step, "train_step", real)
    compiled = real._cache_size()
    train.train(tiny_config, tmp_path / "whole")
    assert real._cache_size() == compiled + 5
    jax.tree.map(np.testing.assert_array_equal, trained(tmp_path / "whole")[0], trained(tmp_path / "cut")[0])


def test_evaluate_under_other_settings_leaves_the_run_alone(tiny_config, tmp_path):
    tiny_config.methods = ("lora",)
    summary = train.train(tiny_config, tmp_path / "run")
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    changes = ["methods=lora,skip", "skip.layers=0", "skip.drop_ratio=0.0", "figures.count=2"]
    assert evaluate.evaluate(tmp_path / "run", "test", changes) == summary["metrics"]["test"]  # nothing skips
    half = [*changes, "skip.drop_ratio=0.9"]
    evaluate.evaluate(tmp_path / "run", "test", half, name="half")
    assert files == {p: p.read_bytes() for p in files}
    beside = tmp_path / "run" / "evaluations"
    rows = [(beside / name / "predictions_test.csv").read_text() for name in ("lora-skip", "half")]
    assert rows[0] == (tmp_path / "run" / "predictions_test.csv").read_text()
    assert rows[1] != rows[0]
    assert (beside / "half" / "figures" / "patches.png").is_file()
    results = json.loads((beside / "half" / "results_test.json").read_text())
    assert "skip.drop_ratio: (0.35,) there, (0.9,) here" in results["differs"]
    assert results["flops"]["ratio"] < 1
    with pytest.raises(InputError, match=r"half/results_test\.json has results under other settings \(.*\(0\.9,\)"):
        evaluate.evaluate(tmp_path / "run", "val", changes, name="half")  # the page would show them as of one setting
    evaluate.evaluate(tmp_path / "run", "val", [*half, "figures.count=3"], name="half")
    assert (beside / "half" / "results_val.json").is_file()


def test_predictions_of_a_run_that_still_trained_do_not_outlive_it(tiny_config, tmp_path, monkeypatch):
    real = train.outputs

    def evaluated_meanwhile(*args):
        (tmp_path / "run" / "predictions_train.csv").write_text("of an earlier checkpoint")
        return real(*args)

    monkeypatch.setattr(train, "outputs", evaluated_meanwhile)
    train.train(tiny_config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("predictions_*")} == {
        "predictions_test.csv",
        "predictions_val.csv",
    }


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        (["lora.rank=4"], "", "lora.rank belongs to the training of this run"),
        (["skip.layer=4"], "", "did you mean 'skip.layers'?"),
        (["methods=skip", "skip.layers=0"], "", "this run has other parameters"),
        (["methods=lora,skip"], "", "skip.layers: a split after block 6"),
        (["methods=lora,skip", "skip.layers=0", "figures.names=no.png"], "", "no image 'no.png'"),
        (["methods=lora,skip", "skip.layers=0"], "../other", "--name ../other"),
    ],
)
def test_evaluate_refuses_settings_that_are_not_of_evaluation(tiny_config, tmp_path, changes, name, message):
    tiny_config.methods = ("lora",)
    config, folder = tiny_config, Folder(tmp_path / "run")
    dataset = folder.dataset(config)
    folder.open(config, dataset, build(config, dataset, None))
    with pytest.raises(InputError) as error:
        evaluate.evaluate(tmp_path / "run", "test", changes, name)
    assert message in str(error.value)


def refused(config, workdir, monkeypatch):
    """The message with which a run is refused, before any step."""
    monkeypatch.setattr(step, "train_step", None)
    with pytest.raises(InputError) as error:
        train.train(config, workdir)
    return str(error.value)


def test_work_directory_of_another_run_or_of_no_run(tiny_config, tmp_path, monkeypatch):
    train.train(tiny_config, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    tiny_config.train.lr = 0.5
    assert "holds another run; it differs in train.lr: 0.01 there, 0.5 here" in refused(
        tiny_config, tmp_path / "run", monkeypatch
    )
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    assert "no run" in refused(tiny_config, tmp_path / "mine", monkeypatch)
    (tmp_path / "file").write_text("!")
    assert "is a file" in refused(tiny_config, tmp_path / "file", monkeypatch)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.name", "vit_tiny_patch61", "did you mean 'vit_tiny_patch16'?"),
        ("data.image_size", 18, "data.image_size=18: not a multiple of the patch size 4"),
        ("train.trainable", "haed", "train.trainable='haed' matches no parameter"),
        ("train.trainable", "(", "no regex"),
        ("train.best_metric", "auc", "did you mean 'auroc'?"),
        ("train.best_metric", "hamming", "train.best_metric='hamming'"),
        ("lora.targets", "blocks_9", "lora.targets matches no linear layer of the model; layers are blocks_0/attn/key"),
        ("model.pretrained", "nowhere/at/all", "nowhere/at/all"),
        ("augment.speckle", 2.0, "augment.speckle = 2.0: must lie in 0..1"),
        ("figures.names", ("dark/99.png",), "figures.names: no image 'dark/99.png'"),
        ("methods", ("lora", "skip"), "skip.layers: a split after block 6: the model has the blocks 0 to 1"),
    ],
)
def test_bad_settings_are_refused_before_the_work_directory_is_made(
    tiny_config, tmp_path, monkeypatch, key, value, message
):
    tiny_config.methods = ("lora",)
    tiny_config.update_from_flattened_dict({key: value})
    assert message in refused(tiny_config, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()


def without_light_to_validate(config, image_folder, tmp_path):
    """Images of all three classes to train on, of two in the other splits."""
    rows = [f"{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(image_folder.rglob("*.png"))]
    splits = [["train", "test", "val"][i % 3] if "light" not in row else "train" for i, row in enumerate(rows)]
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split\n" + "".join(f"{row},{s}\n" for row, s in zip(rows, splits, strict=True)))
    config.data.table = str(table)


@pytest.mark.parametrize("name", ["auroc", "average_precision", "recall_macro"])
def test_a_best_metric_that_validation_cannot_give_is_refused(tiny_config, image_folder, tmp_path, monkeypatch, name):
    without_light_to_validate(tiny_config, image_folder, tmp_path)
    tiny_config.train.best_metric = name
    message = refused(tiny_config, tmp_path / "run", monkeypatch)
    assert f"{name!r} is not defined: in the validation split every image or none is 'light'" in message


def test_a_metric_that_is_undefined_says_why(tiny_config, image_folder, tmp_path, capsys):
    """In the line of an epoch, in the table at the end, and in what the run keeps."""
    without_light_to_validate(tiny_config, image_folder, tmp_path)
    tiny_config.train.best_metric, tiny_config.train.epochs = "loss", 1.0
    summary = train.train(tiny_config, tmp_path / "run")
    why = "no image is 'light'"
    assert summary["metrics"]["val"]["auroc"] == {"value": None, "low": None, "high": None, "why": why}
    assert summary["per_class"]["test"]["light"]["auroc"]["why"] == why
    printed = capsys.readouterr().out
    assert f"  auroc undefined ({why})  " in next(line for line in printed.splitlines() if "  val  " in line)
    assert "nan" not in printed
    assert f"undefined ({why})" in printed.split("metric", 1)[1]


def test_a_damaged_image_is_named_before_training(tiny_config, image_folder, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "grey" / "3.png").write_bytes(b"no image")
    tiny_config.data.path = str(tmp_path / "images")
    assert "grey/3.png" in refused(tiny_config, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()


def test_images_added_to_the_folder_do_not_change_a_run_that_was_started(tiny_config, image_folder, tmp_path):
    import shutil

    shutil.copytree(image_folder, tmp_path / "images")
    tiny_config.data.path = str(tmp_path / "images")
    train.train(tiny_config, tmp_path / "run")
    before = (tmp_path / "run" / "predictions_test.csv").read_bytes()
    Image.new("L", (20, 20), 200).save(tmp_path / "images" / "light" / "new.png")
    for name in ("summary.json", "predictions_test.csv"):  # as if it had been killed before its end
        (tmp_path / "run" / name).unlink()
    train.train(tiny_config, tmp_path / "run")
    assert (tmp_path / "run" / "predictions_test.csv").read_bytes() == before


def test_evaluate_refuses_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        evaluate.evaluate(tmp_path)
