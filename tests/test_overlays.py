import re

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vitft_jax import overlays
from vitft_jax.overlays import Overlay

GREY = np.full((16, 16, 3), 90, np.uint8)


TITLE = "what is drawn, and what it cannot show " * 4


def drawn(tmp_path, monkeypatch, *maps, caption="a $name", **changes):
    """The figure, and the file as an array."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), real(self, *a, **k)))
    overlays.draw(tmp_path / "map.png", [Overlay(GREY, values, caption, **changes) for values in maps], TITLE)
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    return figures[0], np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))


def test_values_are_multiples_of_their_mean():
    values = np.array([[0.0, 2.0], [4.0, 2.0]])
    np.testing.assert_allclose(overlays.relative(values), [[0, 1], [2, 1]])
    np.testing.assert_allclose(overlays.relative(1e-9 * values), [[0, 1], [2, 1]])
    np.testing.assert_array_equal(overlays.relative(np.zeros((2, 2))), np.ones((2, 2)))


def test_one_spot_does_not_set_the_scale():
    spot = np.ones((16, 16))
    spot[3, 3] = 1000
    assert overlays.top([np.linspace(0, 2, 256), spot]) < 3
    assert overlays.top([np.ones(4)]) > 1  # a scale even where all maps are flat


def test_only_what_is_above_the_mean_is_coloured(tmp_path, monkeypatch):
    values = np.ones((4, 4))
    values[1, 2] = 4  # above the mean; all others are below
    _, pixels = drawn(tmp_path, monkeypatch, values)
    coloured = (pixels.max(axis=2).astype(int) - pixels.min(axis=2)) > 40
    left = coloured[:, : pixels.shape[1] * 3 // 4]  # without the colour bar
    rows, columns = np.flatnonzero(left.any(axis=1)), np.flatnonzero(left.any(axis=0))
    assert left[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95  # one square
    grey = np.flatnonzero((pixels == 90).all(axis=2).any(axis=0))  # of the image, plain and covered
    side = (grey[-1] - grey[0]) / 2
    assert 0.8 * side / 4 < np.ptp(columns) < 1.2 * side / 4
    _, pixels = drawn(tmp_path, monkeypatch, np.ones((4, 4)))
    assert not ((pixels.max(axis=2).astype(int) - pixels.min(axis=2)) > 40)[:, : pixels.shape[1] * 3 // 4].any()


def test_every_image_stands_beside_its_map_in_its_own_shape(tmp_path, monkeypatch):
    figure, _ = drawn(tmp_path, monkeypatch, *np.random.default_rng(0).uniform(size=(3, 4, 4)), aspect=0.5, right=False)
    panels = [axis for axis in figure.axes if axis.images]
    assert [len(axis.images) for axis in panels] == [1, 2, 1, 2, 1, 2]
    assert [axis.get_title(loc="left") for axis in panels] == ["a $name", ""] * 3
    assert {axis.get_aspect() for axis in panels} == {0.5}
    assert "times the mean" in figure.axes[-1].get_ylabel()


def test_title_and_captions_fit_one_image_too(tmp_path, monkeypatch):
    """A long name is cut at its beginning."""
    figure, _ = drawn(tmp_path, monkeypatch, np.ones((2, 2)), caption=f"{'folder/' * 20}name.png")
    assert re.fullmatch(r"\.\.\..*/name\.png", figure.axes[0].get_title(loc="left"))
    for text in (figure._suptitle, figure.axes[0]._left_title):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
