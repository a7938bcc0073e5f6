"""The exported program, run in a process that has jax and numpy alone."""

import json
import os
import subprocess
import sys

import exports
import numpy as np
import pytest
from jax import export as jax_export

import vitft_jax
from vitft_jax import exported
from vitft_jax.decision import Decision
from vitft_jax.export import export

RUNS = {
    "lora": ("lora", {}),
    "skip": (("lora", "skip"), {"skip.layers": (0,), "skip.drop_ratio": (0.5,)}),
    "int8": (("quant", "lora"), {"quant.base": "int8", "quant.attention": True}),
    "qat": (("quant",), {"train.trainable": "."}),
    "bfloat16": ("lora", {"dtype": "bfloat16"}),
}
ALONE = """
import json, sys
import jax.export
import numpy as np

images, said = np.load("images.npy"), {}
for name in sys.argv[1:]:
    about = json.load(open(f"{name}/vitft_jax.json"))
    model = jax.export.deserialize(bytearray(open(f"{name}/{about['file']}", "rb").read()))
    assert list(model.platforms) == about["platforms"] == ["cpu", "cuda", "tpu"]
    said[name] = np.concatenate([model.call(images[:1]), model.call(images[1:])])  # batches of 1 and of 3
assert not {"flax", "vitft_jax", "torch", "optax"} & set(sys.modules)
np.savez("said.npz", **said)
"""


@pytest.fixture(scope="module")
def said(image_folder, tmp_path_factory):
    """By run: its folder, that of its export, and the images; and what the exports say of them."""
    root = tmp_path_factory.mktemp("runs")
    base = exports.write_base(root / "base", "vit")
    for name, (method, changes) in RUNS.items():
        exports.hand_made(
            root / f"run_{name}", exports.config_for(image_folder, base, method, **changes), Decision(1.5)
        )
        export(root / f"run_{name}", root / name, "stablehlo")
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    np.save(root / "images.npy", images)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", ALONE, *RUNS], cwd=root, env=environment, check=True)
    return root, images, np.load(root / "said.npz")


@pytest.mark.parametrize("name", RUNS)
def test_it_says_what_the_run_says(said, name):
    root, images, probabilities = said
    expected = vitft_jax.load(root / f"run_{name}").probabilities(images)
    assert expected.std() > 0.02
    # Where activations are rounded, the last bit of a float may turn an integer over.
    rounded = {"int8": 1e-3, "qat": 1e-3, "bfloat16": 2e-2}
    np.testing.assert_allclose(probabilities[name], expected, atol=rounded.get(name, 2e-6))


def test_it_holds_integers_and_the_metadata(said):
    root = said[0]
    for name in RUNS:
        told = json.loads((root / name / exported.FILE).read_text())
        assert told["classes"] == ["dark", "grey", "light"]
        assert (told["image_size"], told["mean"], told["std"]) == (16, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        module = jax_export.deserialize(bytearray((root / name / told["file"]).read_bytes()))
        text = module.mlir_module()
        assert ("xi8>" in text) == (name in ("int8", "qat"))
        assert ("bf16" in text) == (name == "bfloat16")
    sizes = {name: (root / name / "model.jax").stat().st_size for name in RUNS}
    assert sizes["int8"] < 0.75 * sizes["qat"]  # integers, not floats, are stored
