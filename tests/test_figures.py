import numpy as np
import pytest
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from PIL import Image

from vitft_jax import config as configs
from vitft_jax import figures, report, train


def test_patches_are_dimmed_where_the_mask_is_false_and_nowhere_else():
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    mask = np.ones(9, bool)
    mask[5] = False  # second row, third column
    out = figures.dim(picture, mask)
    changed = (out != picture).any(axis=-1)
    assert changed[4:8, 8:12].mean() > 0.9
    changed[4:8, 8:12] = False
    assert not changed.any()
    black = figures.dim(np.zeros((12, 12, 3), np.uint8), mask)
    assert black[5, 9].max() > 30  # visible where the image is black


def test_a_sheet_has_a_row_for_each_image_and_a_column_for_each_block():
    pictures, masks = np.zeros((2, 8, 8, 3), np.uint8), {0: np.ones((2, 4), bool), 3: np.eye(2, 4, dtype=bool)}
    sheet = figures.sheet(pictures, masks, ["a.png", "b.png"])
    stages = ["after block 0\n4 of 4 patches go on", "after block 3\n1 of 4 patches go on"]
    assert [axis.get_title() for axis in sheet.axes] == ["a.png", *stages, "b.png", *stages]
    assert "take no part" in sheet.get_suptitle()
    drawn = [sum(isinstance(item, QuadContourSet) for item in axis.collections) for axis in sheet.axes]
    assert drawn == [0, 0, 1, 0, 0, 1]  # an outline where some go on and others not


def test_as_many_images_as_the_config_allows_fit_into_one_picture(tmp_path):
    n = configs.MOST_FIGURES
    sheet = figures.sheet(np.zeros((n, 8, 8, 3), np.uint8), {0: np.ones((n, 4), bool)}, [str(i) for i in range(n)])
    report.write_figure(tmp_path / "figures" / "sheet.png", sheet)
    with Image.open(tmp_path / "figures" / "sheet.png") as picture:
        assert picture.height > 200 * n
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["sheet.png"]


def test_a_figure_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    report.write_figure(tmp_path / "a.png", Figure())
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        report.write_figure(tmp_path / "a.png", Figure())
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.slow
def test_a_run_whose_figures_fail_is_finished_all_the_same(tiny_config, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("Image size of 700x70000 pixels is too large")

    monkeypatch.setattr(figures, "sheet", fails)
    tiny_config.methods, tiny_config.skip.layers, tiny_config.train.steps = ("skip",), (0,), 1
    summary = train.train(tiny_config, tmp_path / "run")
    said = f"warning: figures of {tmp_path / 'run'} could not be written (ValueError: Image size"
    assert said in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").exists()
    assert train.train(tiny_config, tmp_path / "run")["metrics"] == summary["metrics"]


def test_a_heat_map_has_the_blocks_from_the_first_to_the_last_and_each_number_in_its_place(tmp_path, monkeypatch):
    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), real(self, *a, **k)))
    values = {f"blocks_{i}/{name}": i + 0.5 * j for i in (10, 2, 0) for j, name in enumerate(("attn/query", "mlp/up"))}
    del values["blocks_2/mlp/up"]
    values["head"] = 7
    report.heat_map(tmp_path / "figures" / "ranks.png", values, "ranks")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["head", "blocks_0", "blocks_2", "blocks_10"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attn/query", "mlp/up", ""]
    assert axes.get_title() == "ranks"
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert written == {(0, 2): "7", (1, 0): "0", (1, 1): "0.5", (2, 0): "2", (3, 0): "10", (3, 1): "10.5"}
    none = np.nan
    drawn_there = [[none, none, 7], [0, 0.5, none], [2, none, none], [10, 10.5, none]]
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), none), drawn_there)
    with Image.open(tmp_path / "figures" / "ranks.png") as picture:
        assert picture.format == "PNG"
