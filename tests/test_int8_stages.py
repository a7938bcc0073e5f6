"""The table of the stages of the int8 recipe, by scripts/int8_stages.py."""

import csv
import json

import folders
import int8_stages
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, init, tiny

from vitft_jax import train, tree, vit
from vitft_jax.errors import InputError


def accuracy(workdir):
    with (workdir / "predictions_test.csv").open() as file:
        return np.mean([row["true"] == row["predicted"] for row in csv.DictReader(file)])


@pytest.mark.slow
def test_a_table_over_two_seeds_that_quantises_once(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", TINY)
    tiny_config.methods = ("lora",)
    tiny_config.train.epochs = 1.0
    runs = [tmp_path / f"lora_{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        tiny_config.seed = seed
        train.train(tiny_config, run)
    stages = ("min-max", "the default with 4-bit kernels", "planted: min-max")
    lines = int8_stages.table(runs, runs, tmp_path / "int8", stages)
    head, _, *rows = [line[2:-2].split(" | ") for line in lines]
    assert [row[0] for row in rows] == ["float", *stages[:2], "planted: float", stages[2]]
    assert all(len(row) == len(head) for row in rows)
    assert rows[3][1:3] == rows[0][1:3]  # outliers change nothing in float, to the bit
    assert rows[3][3] == "+0.0"
    made = sorted(path.name for path in (tmp_path / "int8").iterdir())
    slugs = ("min-max", "the-default-with-4-bit-kernels", "planted_min-max")
    assert made == sorted(f"lora_{seed}_{slug}" for seed in (0, 1) for slug in slugs)
    for row, slug in zip((*rows[1:3], rows[4]), slugs, strict=True):
        after = [accuracy(tmp_path / "int8" / f"lora_{seed}_{slug}") for seed in (0, 1)]
        assert row[1].startswith(f"{np.mean(after):.3f}")
        mean = 100 * np.mean([b - accuracy(run) for b, run in zip(after, runs, strict=True)])
        assert row[3].startswith(f"{mean:+.1f} (")
        low, high = map(float, row[3].split("(")[1].rstrip(")").split(" to "))
        assert low <= mean + 0.05
        assert mean - 0.05 <= high
    folder = tmp_path / "int8" / "lora_0_min-max" / "checkpoints"
    on_disk = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert float(rows[1][7].split()[0]) == pytest.approx(on_disk / 1e6, abs=0.06)
    monkeypatch.setattr(int8_stages, "quantize", None)
    assert int8_stages.table(runs, runs, tmp_path / "int8", stages) == lines
    with pytest.raises(InputError, match="its test images or their labels are not those of"):
        int8_stages.table(runs, runs[::-1], tmp_path / "int8", stages)


def test_runs_that_cannot_be_told_apart_or_are_not_there(tmp_path):
    runs = [tmp_path / f"demo_{seed}" / "lora" for seed in (0, 1)]
    with pytest.raises(InputError, match="each needs a name of its own"):
        int8_stages.table(runs, runs, tmp_path / "int8", ["min-max"])
    with pytest.raises(InputError, match=r"demo_0/lora: no summary\.json"):
        int8_stages.table(runs[:1], runs[:1], tmp_path / "int8", ["min-max"])


def test_int8_runs_of_another_run_are_not_taken_for_those_of_this_one(tmp_path):
    run = folders.write(tmp_path / "lora")
    made = folders.write(tmp_path / "int8" / "lora_min-max")
    told = json.loads((made / "summary.json").read_text())
    told["method"] = {"source": str(tmp_path / "elsewhere" / "lora")}
    (made / "summary.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"was made from .*elsewhere/lora, not from"):
        int8_stages.table([run], [run], tmp_path / "int8", ["min-max"])


def test_planted_outliers_change_nothing_in_float_to_the_bit():
    model = tiny()
    params, images = init(model)["params"], jnp.linspace(-1, 1, 4 * 16 * 16 * 3).reshape(4, 16, 16, 3)
    outliers = int8_stages.planted(params)
    np.testing.assert_array_equal(model.apply({"params": outliers}, images), model.apply({"params": params}, images))
    scale = "blocks_1/norm2/scale"
    ratio = np.asarray(tree.flatten(outliers)[scale] / tree.flatten(params)[scale])
    assert sorted(ratio)[-4:] == [1, 256, 512, 1024]
