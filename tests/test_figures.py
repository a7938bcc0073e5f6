import numpy as np
from matplotlib.contour import QuadContourSet

from vitft_jax import figures


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
