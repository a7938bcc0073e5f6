"""Attention roll-out against live random models of transformers, by the attention that they give out."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.numpy import save_file  # noqa: E402

from vitft_jax import pretrained, rollout, tree  # noqa: E402
from vitft_jax.vit import ViT  # noqa: E402

pytestmark = pytest.mark.interop
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_golden.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_golden", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["vit", "deit", "deit_teacher", "dinov2"])
def test_fresh_models(script, family, tmp_path):
    torch.manual_seed(200)
    tensors, text, _ = script.make()[family]()
    images = torch.randn(3, 3, 16, 16).numpy()
    expected = script.rolled_out(family, tensors, text, images)
    assert expected.std() > 0.005
    (tmp_path / "config.json").write_text(text)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = pretrained.load(str(tmp_path))
    model = ViT(**loaded.model, classes=tree.flatten(loaded.params)["head/bias"].size)
    got = jax.jit(lambda v, x: rollout.rollout(model, v, x))({"params": loaded.params}, images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, expected, atol=1e-6)
