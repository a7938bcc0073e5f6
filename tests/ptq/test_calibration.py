"""Static ranges of a run that trains: calibrated before step 0, kept in its checkpoints, refused where they are missing."""

import jax
import numpy as np
import pytest
from PIL import Image

from vitft_jax import evaluate, run, step, train, tree
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.ptq import calibration


@pytest.fixture
def static_config(tiny_config):
    tiny_config.methods, tiny_config.train.trainable = ("quant",), "."
    tiny_config.quant.static = True
    tiny_config.augment.crop, tiny_config.augment.rotate = 1.0, 0.0
    tiny_config.train.epochs = 1.0
    return tiny_config


def built_of(config, workdir):
    config, source = run.resolve(config)
    dataset = Folder(workdir).dataset(config)
    return config, dataset, build(config, dataset, source)


def bounds(trainable):
    return {name.split("/quant/")[0]: float(leaf) for name, leaf in tree.flatten(trainable["quant"]).items()}


def test_ranges_are_those_of_the_training_images(static_config, tmp_path):
    config, dataset, built = built_of(static_config, tmp_path)
    found = bounds(calibration.calibrated(built, dataset, config).trainable)
    assert len(found) == 2 * 6
    images = np.stack(
        [np.asarray(dataset.images[i].convert("RGB").resize((16, 16), 2)) for i in dataset.indices("train")]
    )
    model = calibration.plain(built.program).model
    _, seen = jax.jit(lambda p, x: model.apply(p, x, capture_intermediates=True))(
        {"params": built.trainable["params"]}, step.normalise(built.program, images)
    )
    # Among the candidates is the largest value, and the narrowest holds 99.9 %.
    inputs = np.abs(seen["intermediates"]["blocks_0"]["norm1"]["__call__"][0])
    for name in ("query", "key", "value"):
        assert np.percentile(inputs, 99.8) < found[f"blocks_0/attn/{name}"] <= inputs.max() * 1.02  # another resize


@pytest.mark.parametrize(
    ("methods", "trainable"), [(("quant",), "."), pytest.param(("quant", "lora"), "^head", marks=pytest.mark.slow)]
)
def test_a_run_keeps_its_ranges_and_says_how_many_parameters_train(static_config, tmp_path, methods, trainable, capsys):
    static_config.methods, static_config.train.trainable = methods, trainable
    summary = train.train(static_config, tmp_path / "run")
    config, dataset, built = built_of(static_config, tmp_path / "run")
    expected = bounds(calibration.calibrated(built, dataset, config).trainable)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        kept = bounds(checkpoints.restore_best(built.trainable)[0])
    assert kept == expected  # training did not move them
    assert all(0 < bound < np.inf for bound in kept.values())
    rest = {name: leaf for name, leaf in built.trainable.items() if name != "quant"}
    assert summary["parameters"]["trainable"] == tree.count(rest)
    assert evaluate.evaluate(tmp_path / "run") == summary["metrics"]["test"]


def write_images(root, sizes, classes=("dark", "grey", "light")):
    """Images of the classes in folders, `sizes` in pixels, one for each image of a class."""
    for level, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            pixels = np.random.default_rng(i).normal(50 + 70 * level, 15, (size, size)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


@pytest.mark.parametrize("kind", ["folder", "table", "npz"])
def test_other_images_calibrate_at_the_size_of_the_run(tiny_config, tmp_path, kind, monkeypatch):
    config, dataset, built = built_of(tiny_config, tmp_path / "run")
    path, labels = tmp_path / "other", np.arange(30) // 10
    if kind == "npz":
        path = tmp_path / "other.npz"
        config.data.labels = dataset.classes  # an .npz does not name its classes; a run on one has them here
        parts = {split: np.arange(i, 30, 3) for i, split in enumerate(("train", "val", "test"))}
        arrays = {f"{split}_images": np.full((len(at), 40, 40), 90, np.uint8) for split, at in parts.items()}
        np.savez(path, **arrays, **{f"{split}_labels": labels[at] for split, at in parts.items()})
    else:
        write_images(path, [40] * 9 + [12])
    if kind == "table":
        first = {"dark": "test", "grey": "val", "light": "val"}
        rows = [f"{n}/{i}.png,{n},{'train' if i else split}" for n, split in first.items() for i in range(10)]
        path = path / "labels.csv"
        path.write_text("\n".join(["path,label,split", *rows]))
    other = calibration.images_from(str(path), dataset, config)
    assert other.classes == dataset.classes
    assert len(other) == 30
    assert len(other.indices("train")) == {"folder": 18, "table": 27, "npz": 10}[kind]
    monkeypatch.setattr(calibration, "FEWEST", 10)
    monkeypatch.setattr(calibration.observe, "observe", lambda model, params, batches, count: ([*batches], count))
    batches, count = calibration.see(built.program, {}, other, config)
    assert count == sum(map(len, batches)) == len(other.indices("train"))
    assert {batch.shape[1:] for batch in batches} == {(16, 16, 3)}


def test_several_labels_an_image_are_those_of_the_run(tiny_config, tmp_path):
    write_images(tmp_path / "other", [20] * 10)
    rows = [f"{n}/{i}.png,{i % 2},{i % 3 // 2}" for n in ("dark", "grey", "light") for i in range(10)]
    tables = {"labels.csv": "path,cyst,mass", "more.csv": "path,cyst,stone"}
    for name, header in tables.items():
        (tmp_path / "other" / name).write_text("\n".join([header, *rows]))
    tiny_config.data.update(path=str(tmp_path / "other"), table="labels.csv", labels=("cyst", "mass"))
    config, dataset, _ = built_of(tiny_config, tmp_path / "run")
    assert calibration.images_from(str(tmp_path / "other" / "labels.csv"), dataset, config).classes == ("cyst", "mass")
    with pytest.raises(InputError, match="mass"):
        calibration.images_from(str(tmp_path / "other" / "more.csv"), dataset, config)


@pytest.mark.parametrize("fault", ["classes", "missing class", "damaged", "nowhere", "nowhere.csv", "nowhere.npz"])
def test_images_that_cannot_calibrate_are_refused(tiny_config, tmp_path, fault):
    config, dataset, _ = built_of(tiny_config, tmp_path / "run")
    path, message = tmp_path / fault, fault
    if fault == "classes":
        write_images(path, [20] * 6, ("dark", "grey", "white"))
        message = "'white' is none of the classes dark, grey, light"
    elif fault == "missing class":
        write_images(path, [20] * 6, ("dark", "grey"))
        message = "'light' has no example"
    elif fault == "damaged":
        write_images(path, [20] * 6)
        (path / "grey" / "3.png").write_bytes(b"none")
        message = "grey/3.png"
    with pytest.raises(InputError) as error:
        calibration.images_from(str(path), dataset, config)
    assert str(error.value).startswith(f"--calibration {path}: ")
    assert message in str(error.value)


def test_ranges_that_were_never_calibrated_are_refused(static_config, tmp_path):
    config, dataset, built = built_of(static_config, tmp_path)
    with pytest.raises(InputError, match=r"quant/blocks_0/attn/key/quant/bound: this range was never calibrated"):
        evaluate.outputs(built.program, built.trainable, built.frozen, dataset, "val", config)
    static_config.data.val_fraction = static_config.data.test_fraction = 0.3
    with pytest.raises(InputError, match="12 calibration images"):
        train.train(static_config, tmp_path / "few")
