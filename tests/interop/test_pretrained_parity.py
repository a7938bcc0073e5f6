"""Parity with live random models of transformers and timm, with torch's interpolation, and with real weights."""

import importlib.util
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import save_file  # noqa: E402

from vitft_jax import position, pretrained, tree  # noqa: E402
from vitft_jax.vit import ViT  # noqa: E402

pytestmark = pytest.mark.interop
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # of logits whose standard deviation is about 1


@cache
def golden_script():
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts" / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, tensors, config):
    """Writes what the builders of `make_golden` return and gives the source."""
    if not config:
        np.savez(folder / "weights.npz", **tensors)
        return str(folder / "weights.npz")
    (folder / "config.json").write_text(config)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def run(loaded, images, classes=None):
    """Our output for NCHW images."""
    outputs = tree.flatten(loaded.params).get("head/bias", np.zeros(0)).size if classes is None else classes
    images = images.transpose(0, 2, 3, 1)
    model = ViT(**loaded.model, classes=outputs)
    params = pretrained.fit(loaded, jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    return np.asarray(jax.jit(model.apply)({"params": params}, images))


def largest_difference(source, reference, sizes, classes=None):
    loaded = pretrained.load(source)
    worst = 0.0
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = reference(images).numpy()
        assert 0.2 < expected.std() < 5
        worst = max(worst, float(np.abs(run(loaded, images.numpy(), classes) - expected).max()))
    print(f"largest difference {worst:.2e}")
    return worst


FAMILIES = ("vit", "deit", "deit_teacher", "dinov2", "timm_vit", "timm_deit", "timm_deit3", "timm_dinov2", "augreg")


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_models(family, tmp_path):
    torch.manual_seed(100)
    tensors, config, reference = golden_script().make()[family]()
    assert largest_difference(write(tmp_path, tensors, config), reference, (16, 24, 12)) <= TOLERANCE


def test_the_families_are_all_here():
    assert set(golden_script().make()) - {"lora", "dora", "pissa"} == set(FAMILIES)  # test_lora_parity has PEFT


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ViT", {"qkv_bias": False}),
        ("ViT", {"layer_norm_eps": 0.1}),
        ("ViT", {"patch_size": 8}),
        ("DeiT", {"qkv_bias": False}),
        ("Dinov2", {"qkv_bias": False, "layer_norm_eps": 0.1, "num_attention_heads": 4}),
    ],
)
def test_settings_of_hugging_face(name, change, tmp_path):
    script = golden_script()
    torch.manual_seed(1)
    mlp = {"mlp_ratio": 3} if name == "Dinov2" else {"intermediate_size": 40}
    config = getattr(transformers, f"{name}Config")(**{**script.HF, **mlp, **change})
    model_class = getattr(transformers, f"{name}ForImageClassification")
    tensors, text, reference = script.hugging_face(model_class, config)
    assert largest_difference(write(tmp_path, tensors, text), reference, (16, 32)) <= TOLERANCE


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
def test_backbones_of_hugging_face_without_head(name, tmp_path):
    script = golden_script()
    torch.manual_seed(2)
    mlp = {"mlp_ratio": 2} if name == "Dinov2" else {"intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**{**script.HF, **mlp})
    model = script.randomise(getattr(transformers, f"{name}Model")(config))
    model.save_pretrained(tmp_path)

    def features(images):
        x = model(images).last_hidden_state
        return {
            "ViT": lambda: x[:, 0],
            "DeiT": lambda: torch.cat([x[:, 0], x[:, 1]], 1),
            "Dinov2": lambda: torch.cat([x[:, 0], x[:, 1:].mean(1)], 1),
        }[name]()

    assert largest_difference(str(tmp_path), features, (16,), classes=0) <= TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("vit_small_patch16_224", {"qkv_bias": False}),
        ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("deit_small_patch16_224", {"no_embed_class": True}),
        ("deit_small_distilled_patch16_224", {"no_embed_class": False, "init_values": 0.5}),
        ("flexivit_small", {}),
    ],
)
def test_settings_of_timm(architecture, change, tmp_path):
    script = golden_script()
    torch.manual_seed(3)
    tensors, config, reference = script.of_timm(architecture, num_classes=script.CLASSES, **change)
    assert largest_difference(write(tmp_path, tensors, config), reference, (16, 24)) <= TOLERANCE


@pytest.mark.parametrize(
    "architecture", ["vit_small_patch16_224", "deit_small_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_lone_timm_file_and_resampling_as_timm_does_it_when_it_loads(architecture, tmp_path):
    script = golden_script()
    torch.manual_seed(4)
    change = {"embed_dim": 128, "num_heads": 2, "depth": 1, "mlp_ratio": 0.5, "num_classes": script.CLASSES}
    tensors, _, native = script.of_timm(architecture, **change)
    save_file(tensors, tmp_path / "lone.safetensors")
    larger = timm.create_model(architecture, **{**script.TIMM, **change, "img_size": 28}).eval()
    state = timm.models.vision_transformer.checkpoint_filter_fn(native.state_dict(), larger)
    larger.load_state_dict(state)

    def reference(images):
        return (larger if images.shape[-1] == 28 else native)(images)

    # Logits are larger here by the width, so they are scaled to the size that the tolerance is for.
    loaded = pretrained.load(str(tmp_path / "lone.safetensors"))
    for size in (16, 28):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = reference(images).numpy()
        assert np.abs(run(loaded, images.numpy()) - expected).max() <= TOLERANCE * max(1.0, float(expected.std()))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("old", [1, 2, 5, 14, 16, 24, 37])
def test_resizing_is_torch_interpolate(old, antialias):
    rng = np.random.default_rng(old)
    grid = rng.normal(size=(1, old * old, 3))
    square = torch.tensor(grid).reshape(1, old, old, 3).permute(0, 3, 1, 2)
    for new in (1, 2, 3, 7, 14, 16, 23, 32, 37):
        options = {"size": (new, new), "mode": "bicubic", "align_corners": False, "antialias": antialias}
        expected = torch.nn.functional.interpolate(square, **options).permute(0, 2, 3, 1).reshape(1, -1, 3).numpy()
        got = position.resize(np.concatenate([grid[:, :1], grid], axis=1), 1, new, antialias)
        assert np.abs(got[:, 1:] - expected).max() < 1e-12, new
        np.testing.assert_array_equal(got[:, :1], grid[:, :1])


@pytest.mark.parametrize("size", [224, 518])
def test_real_weights_have_the_features_of_transformers(size, focus):
    loaded = pretrained.load(str(focus), name="dinov2_small_patch14")
    assert (loaded.image_size, loaded.model["eps"], loaded.antialias) == (518, 1e-6, False)
    images = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    model = transformers.Dinov2Model.from_pretrained(focus, dtype=torch.float32).eval()
    with torch.no_grad():
        x = model(torch.tensor(images)).last_hidden_state
        expected = torch.cat([x[:, 0], x[:, 1:].mean(1)], 1).numpy()
    got = run(loaded, images, classes=0)
    relative = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(f"largest difference at {size}: {relative:.2e} of the largest feature")
    assert relative <= 1e-3
    assert jnp.isfinite(got).all()
