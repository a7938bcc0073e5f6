import numpy as np

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
    titles = [axis.get_title() for axis in figures.sheet(pictures, masks, ["a.png", "b.png"]).axes]
    stages = ["after block 0: 4 of 4", "after block 3: 1 of 4"]
    assert titles == ["a.png", *stages, "b.png", *stages]
