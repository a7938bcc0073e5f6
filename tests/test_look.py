"""The command look on runs that were made without training."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import TINY, randomised

from vitft_jax import config as configs
from vitft_jax import data, look, overlays, predictor, vit
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.step import State


@pytest.fixture(autouse=True)
def variant(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", {**TINY, "depth": 3})


def make(workdir, images, **changes):
    """A run folder with a checkpoint of random adapters and head."""
    config = configs.default()
    config.model.name, config.model.pretrained = "tiny_test", ""
    config.data.path, config.data.image_size = str(images), 16
    config.data.val_fraction = config.data.test_fraction = 0.2
    config.train.batch_size = 4
    config.update_from_flattened_dict(changes)
    folder, dataset = Folder(workdir), data.load(config.data, 0)
    built = build(config, dataset, None)
    folder.open(config, dataset, built)
    with Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(State(jnp.int32(0), randomised(built.trainable), {}), {}, [1.0])
    return workdir


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A LoRA run of one label, and one of several that skips tokens over an int8 base."""
    root = tmp_path_factory.mktemp("runs")
    names = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    shutil.copytree(image_folder, root / "images")
    rows = [f"{name},{int(not name.startswith('dark'))},{int(name.startswith('light'))}" for name in names]
    (root / "images" / "labels.csv").write_text("path,visible,bright\n" + "\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.VARIANTS, "tiny_test", {**TINY, "depth": 3})
        make(root / "one", image_folder, methods=("lora",))
        several = {"data.table": "labels.csv", "data.labels": ("visible", "bright"), "quant.base": "int8"}
        several |= {"methods": ("quant", "lora", "skip"), "skip.layers": (0,), "quant.attention": True}
        make(root / "several", root / "images", **several)
    return root


@pytest.fixture(scope="module")
def one(runs):
    """The predictor of the first run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.VARIANTS, "tiny_test", {**TINY, "depth": 3})
        return predictor.load(runs / "one")


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: (overlays, title) by the name of the file."""
    seen, real = {}, overlays.draw

    def draw(path, those, title):
        seen[path.name] = those, title
        real(path, those, title)

    monkeypatch.setattr(overlays, "draw", draw)
    return seen


def test_draws_the_images_of_the_run_with_what_is_said_of_them(runs, one, drawn, capsys, monkeypatch):
    monkeypatch.setattr(predictor, "load", {runs / "one": one}.get)
    look.look(runs / "one", overrides=["figures.count=5"])
    folder, model = Folder(runs / "one"), one
    written = {"attention.png", "saliency.png"}
    assert {path.name for path in folder.figures.iterdir()} == written == set(drawn)
    assert capsys.readouterr().out.split() == [str(folder.figures / name) for name in ("attention.png", "saliency.png")]
    dataset = folder.dataset(folder.config())
    test = dataset.indices("test")
    chosen = test[np.linspace(0, len(test) - 1, 5).round().astype(int)]
    said = model.predict([dataset.images[i] for i in chosen])
    for those, title in drawn.values():
        assert "explains no decision" in title
        assert "int8" not in title
        for k, (i, overlay) in enumerate(zip(chosen, those, strict=True)):
            np.testing.assert_array_equal(overlay.picture, model.prepare(dataset.images[i]))
            true, decided = dataset.labels[i], said.decisions[k]
            assert overlay.right == (true == decided)
            assert overlay.caption.split("\n") == [
                dataset.names[i],
                f"says: {dataset.classes[decided]} {said.probabilities[k, decided]:.2f}",
                f"true: {dataset.classes[true]}{'' if true == decided else ' (wrong)'}",
            ]
    assert {overlay.values.shape for overlay in drawn["attention.png"][0]} == {(4, 4)}
    assert {overlay.values.shape for overlay in drawn["saliency.png"][0]} == {(16, 16)}
    # Five images in batches of four: the last of the second batch is the same as alone.
    attention, saliency = (drawn[name][0][-1].values for name in ("attention.png", "saliency.png"))
    look.look(runs / "one", overrides=[f"figures.names={dataset.names[chosen[-1]]}"])
    np.testing.assert_allclose(drawn["attention.png"][0][0].values, attention, rtol=1e-5)
    assert np.corrcoef(drawn["saliency.png"][0][0].values.ravel(), saliency.ravel())[0, 1] > 0.9  # other noise


@pytest.mark.slow
def test_draws_other_images_of_several_labels_through_int8_and_skipping(runs, drawn, tmp_path):
    for i, size in enumerate([(40, 20), (20, 20), (20, 30)]):
        Image.new("L", size, 60 * i + 30).save(tmp_path / f"{i}.png")
    (tmp_path / "table.csv").write_text("path,visible,bright\n0.png,0,1\n1.png,1,\n2.png,1,1\n")
    look.look(runs / "several", tmp_path / "table.csv", tmp_path / "out", ["figures.count=3"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attention.png", "saliency.png", "patches.png"}
    assert "rounding" in drawn["saliency.png"][1]
    those = drawn["saliency.png"][0]
    assert [overlay.aspect for overlay in those] == [0.5, 1.0, 1.5]
    model = predictor.load(runs / "several")
    p = model.predict([Image.open(tmp_path / f"{i}.png") for i in range(3)]).probabilities
    for i, overlay in enumerate(those):
        lines = overlay.caption.split("\n")
        assert lines[0] == f"{i}.png"
        assert lines[-1] == f"saliency of {model.classes[p[i].argmax()]} {p[i].max():.2f}"
        assert overlay.values.max() > 0
    assert "true: bright" in those[0].caption
    assert "true" not in those[1].caption  # not all labels are known
    assert those[1].right is None
    assert "saliency" not in drawn["attention.png"][0][0].caption


@pytest.mark.parametrize(
    ("images", "output", "overrides", "message"),
    [
        (".", None, [], "give --output too"),
        ("none", "out", [], "there is no such file"),
        (None, "taken", [], "--output .*taken: is a file; give a folder"),
        (None, None, ["figures.count=0"], "figures.count=0: no image"),
        (None, None, ["figures.names=b.png"], "figures.names: no image 'b.png'"),
        (".", "out", ["figures.names=b.png"], "figures.names: no image 'b.png'"),
        (None, None, ["lora.rank=4"], "lora.rank belongs to the training"),
        ("broken", "out", [], "broken.png"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(runs, one, tmp_path, monkeypatch, images, output, overrides, message):
    monkeypatch.setattr(predictor, "load", lambda workdir: one)
    (tmp_path / "taken").write_text("")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").write_bytes(b"no image")
    before = sorted(runs.rglob("*"))
    images, output = (name and tmp_path / name for name in (images, output))
    with pytest.raises(InputError, match=message):
        look.look(runs / "one", images, output, overrides)
    assert not (tmp_path / "out").exists()
    assert sorted(runs.rglob("*")) == before
