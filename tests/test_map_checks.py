"""The checks of maps, by scripts/map_checks.py."""

import map_checks
import numpy as np
import pytest

from vitft_jax import predictor, train
from vitft_jax.errors import InputError


def test_equal_maps_are_alike_and_opposite_ones_not():
    maps = np.random.default_rng(0).random((3, 20, 20))
    assert map_checks.alike(maps, 2 * maps) == ("1.00 to 1.00", "1.00 to 1.00")
    assert map_checks.alike(maps, -maps) == ("-1.00 to -1.00", "0.00 to 0.00")


def test_what_is_changed_in_the_model():
    leaf = np.arange(12.0).reshape(3, 4)
    change = map_checks.shuffled("/head", "blocks_1/")
    assert change("params/blocks_0/kernel", leaf) is leaf
    moved = change("params/blocks_1/kernel", leaf)
    assert sorted(moved.ravel()) == sorted(leaf.ravel())
    assert (moved != leaf).any()
    assert not map_checks.without_adapters("lora/blocks_0/b", leaf).any()
    assert map_checks.without_adapters("lora/blocks_0/a", leaf) is leaf


@pytest.mark.slow
def test_table_and_covers_of_a_run(tiny_config, tmp_path):
    tiny_config.methods = ("lora",)
    tiny_config.train.epochs = 1.0
    train.train(tiny_config, tmp_path / "run")
    model = predictor.load(tmp_path / "run")
    size = model.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    head, _, *rows = [line[2:-2].split(" | ") for line in map_checks.checks(model, pictures)]
    found = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert len(found) == 6
    assert found["head shuffled"]["roll-out"] == "1.00 to 1.00"  # which does not know of it
    assert found["all blocks shuffled"]["roll-out"] != "1.00 to 1.00"
    lines = map_checks.covered(model, pictures[0], (2, 6, 0, 4), 4)
    assert [line[:22].strip() for line in lines] == ["as it is", "covered", "covered elsewhere"]
    assert len({line[22:] for line in lines}) == 3
    with pytest.raises(InputError, match=f"not within the {size} pixels"):
        map_checks.covered(model, pictures[0], (2, 6, 0, 4), size)
