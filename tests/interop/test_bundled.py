"""The weights that come with the package open in transformers, with the same answers and the same class names."""

import jax.numpy as jnp
import numpy as np
import pytest

from vitft_jax import pretrained
from vitft_jax.vit import ViT

pytestmark = pytest.mark.interop


def test_the_bundled_weights_are_a_hugging_face_model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTForImageClassification.from_pretrained(pretrained.BUNDLED, dtype=torch.float32).eval()
    ours = pretrained.load("bundled")
    assert ours.classes == tuple(theirs.config.id2label.values()) == ("normal", "benign", "malignant")
    x = np.random.default_rng(0).normal(size=(2, 128, 128, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.numpy()
    logits = ViT(**ours.model, classes=3).apply({"params": ours.params}, jnp.asarray(x))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
