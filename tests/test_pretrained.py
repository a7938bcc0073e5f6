"""Reading published weights: parity with stored logits of torch, and every kind of bad input.

The golden files come from `scripts/make_golden.py`. What is compared here again with live libraries is in
`interop/test_pretrained_parity.py`.
"""

import http.server
import io
import json
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from functools import cache
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vitft_jax import position, pretrained, tree
from vitft_jax.errors import InputError
from vitft_jax.vit import VARIANTS, ViT

GOLDEN = Path(__file__).parent / "golden"
HF = ("vit", "deit", "deit_teacher", "dinov2")
TIMM = ("timm_vit", "timm_deit", "timm_deit3", "timm_dinov2")
FAMILIES = (*HF, *TIMM, "augreg")
TOLERANCE = 1e-4  # of logits whose standard deviation is about 1


@cache
def golden(family):
    with np.load(GOLDEN / f"{family}.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    config = str(arrays["config"])
    tensors = {name[7:]: array for name, array in arrays.items() if name.startswith("tensor/")}
    cases = {
        int(name[6:]): (array.transpose(0, 2, 3, 1), arrays[f"logits/{name[6:]}"])
        for name, array in arrays.items()
        if name.startswith("image/")
    }
    return (json.loads(config) if config else None), tensors, cases


def write(folder, family, tensors=None, **changes):
    """Writes a golden model as its library does and returns the source; `changes` go to config.json."""
    config, original, _ = golden(family)
    tensors = original if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        np.savez(folder / "weights.npz", **tensors)
        return str(folder / "weights.npz")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def model_for(loaded, **changes):
    outputs = tree.flatten(loaded.params).get("head/bias", np.zeros(0)).size
    return ViT(**{**loaded.model, "classes": outputs, **changes})


def abstract(model, size):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


def initial(model, size):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract(model, size))


@cache
def compiled(model):
    return jax.jit(model.apply)


def logits(model, params, images):
    return np.asarray(compiled(model)({"params": params}, images))


def without(tensors, regex):
    return {name: array for name, array in tensors.items() if not re.search(regex, name)}


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_torch_at_native_and_other_sizes(family, tmp_path):
    loaded = pretrained.load(write(tmp_path, family))
    model = model_for(loaded)
    for size, (images, expected) in golden(family)[2].items():
        if size == 12 and family not in ("vit", "timm_vit"):
            continue  # a smaller grid once per library; the interop tests do all
        params = pretrained.fit(loaded, abstract(model, size))
        got = logits(model, params, images)
        assert 0.3 < expected.std() < 3
        assert np.abs(got - expected).max() <= TOLERANCE, size
    assert loaded.image_size == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_matters_to_the_parity(family, tmp_path):
    """Else a leaf could be filled with anything and the test above would still pass.

    Key biases are the exception: they shift all scores of a query alike, which softmax undoes.
    """
    loaded = pretrained.load(write(tmp_path, family))
    images, _ = golden(family)[2][16]
    model = model_for(loaded)
    leaves = tree.flatten(loaded.params)
    before = logits(model, loaded.params, images)
    rng = np.random.default_rng(0)
    for name, leaf in leaves.items():
        noise = rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        change = np.abs(logits(model, tree.unflatten({**leaves, name: leaf + noise}), images) - before).max()
        assert (change < TOLERANCE) if name.endswith("key/bias") else (change > 10 * TOLERANCE), name


def test_key_biases_are_placed_where_they_belong(tmp_path):
    for family, name in (
        ("vit", "vit.encoder.layer.1.attention.attention.key.bias"),
        ("timm_vit", "blocks.1.attn.qkv.bias"),
        ("augreg", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"),
    ):
        loaded = pretrained.load(write(tmp_path / family, family))
        stored = golden(family)[1][name]
        stored = stored[32:64] if family == "timm_vit" else stored.ravel()
        np.testing.assert_array_equal(loaded.params["blocks_1"]["attn"]["key"]["bias"], stored)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_backbone_without_prefix_head_but_pooler_and_mask_token(family, tmp_path):
    tensors = {re.sub(rf"^{family}\.", "", name): array for name, array in golden(family)[1].items()}
    full = pretrained.load(write(tmp_path / "full", family))
    bare = without(tensors, "classifier") | {
        "pooler.dense.weight": np.ones((32, 32), np.float32),
        "pooler.dense.bias": np.ones(32, np.float32),
        "embeddings.mask_token": np.ones((1, 32), np.float32),
    }
    loaded = pretrained.load(write(tmp_path / "bare", family, bare))
    heads = {"head/kernel", "head/bias"}
    kept = {name: leaf for name, leaf in tree.flatten(full.params).items() if name not in heads}
    assert tree.flatten(loaded.params).keys() == kept.keys()
    for name, leaf in tree.flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, kept[name])
    assert loaded.classes == ()
    assert loaded.model["features"] == full.model["features"]


def test_deit_without_teacher_reads_the_class_token_alone(tmp_path):
    assert pretrained.load(write(tmp_path / "a", "deit")).model["dist_head"] is False
    assert pretrained.load(write(tmp_path / "b", "deit_teacher")).model["dist_head"] is True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["vit", "augreg"])
def test_half_precision_becomes_float32(family, dtype, tmp_path):
    tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in golden(family)[1].items()}
    full = tree.flatten(pretrained.load(write(tmp_path / "full", family)).params)
    for name, leaf in tree.flatten(pretrained.load(write(tmp_path / "half", family, tensors)).params).items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, full[name].astype(jnp.dtype(dtype)).astype(np.float32))


def test_qkv_bias_false_is_zero_biases(tmp_path):
    tensors = without(golden("vit")[1], r"(query|key|value)\.bias")
    loaded = pretrained.load(write(tmp_path / "hf", "vit", tensors, qkv_bias=False))
    timm = pretrained.load(write(tmp_path / "timm", "timm_vit", without(golden("timm_vit")[1], r"qkv\.bias")))
    for source in (loaded, timm):
        for role in ("query", "key", "value"):
            assert not source.params["blocks_1"]["attn"][role]["bias"].any()
    # The config states that they are there, so here they are lost.
    with pytest.raises(InputError, match=r"6 problems:\s+missing blocks_0/attn/key/bias \(32,\)"):
        pretrained.load(write(tmp_path / "lost", "vit", tensors))


def shard(folder, family, parts=3):
    source = Path(write(folder, family))
    tensors = golden(family)[1]
    (source / "model.safetensors").unlink()
    files = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return source


def test_sharded_equals_single(tmp_path):
    single = tree.flatten(pretrained.load(write(tmp_path / "one", "dinov2")).params)
    sharded = tree.flatten(pretrained.load(str(shard(tmp_path / "three", "dinov2"))).params)
    assert single.keys() == sharded.keys()
    for name, leaf in single.items():
        np.testing.assert_array_equal(leaf, sharded[name])


def test_sha256_is_over_the_files_in_order(tmp_path):
    import hashlib

    source = shard(tmp_path, "vit")
    data = b"".join(file.read_bytes() for file in sorted(source.glob("*.safetensors")))
    loaded = pretrained.load(str(source))
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()
    assert (loaded.source, loaded.revision) == (str(source.resolve()), "")


# --- a lone file -----------------------------------------------------------------------------------------------------


def lone(folder, distilled=False, layer_scale=False, positions=True, width=128, patch=8, side=3, classes=4):
    """A random safetensors file in timm's names, and the same leaves under ours."""
    model = ViT(patch, width, 1, max(width // 64, 1), 48, classes, distilled=distilled, layer_scale=layer_scale)
    rng = np.random.default_rng(1)
    leaves = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in tree.flatten(abstract(model, patch * side)).items()
    }
    block = {name.removeprefix("blocks_0/"): leaf for name, leaf in leaves.items() if name.startswith("blocks_0")}
    qkv = ("attn/query", "attn/key", "attn/value")
    kernel = leaves["embed/patch/kernel"].reshape(patch, patch, 3, width)
    position = leaves["embed/position"]
    prefix = 2 if distilled else 1
    if not positions:
        position[:, :prefix] = 0
    tensors = {
        "cls_token": leaves["embed/cls_token"],
        "pos_embed": position if positions else position[:, prefix:],
        "patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": leaves["embed/patch/bias"],
        "norm.weight": leaves["norm/scale"],
        "norm.bias": leaves["norm/bias"],
        "head.weight": leaves["head/kernel"].T,
        "head.bias": leaves["head/bias"],
        "blocks.0.attn.qkv.weight": np.concatenate([block[f"{name}/kernel"].T for name in qkv]),
        "blocks.0.attn.qkv.bias": np.concatenate([block[f"{name}/bias"] for name in qkv]),
        "blocks.0.attn.proj.weight": block["attn/out/kernel"].T,
        "blocks.0.attn.proj.bias": block["attn/out/bias"],
    }
    for i in (1, 2):
        tensors[f"blocks.0.norm{i}.weight"] = block[f"norm{i}/scale"]
        tensors[f"blocks.0.norm{i}.bias"] = block[f"norm{i}/bias"]
        tensors[f"blocks.0.mlp.fc{i}.weight"] = block[f"mlp/fc{i}/kernel"].T
        tensors[f"blocks.0.mlp.fc{i}.bias"] = block[f"mlp/fc{i}/bias"]
        if layer_scale:
            tensors[f"blocks.0.ls{i}.gamma"] = block[f"scale{i}/scale"]
    if distilled:
        tensors["dist_token"] = leaves["embed/dist_token"]
        tensors["head_dist.weight"] = leaves["head_dist/kernel"].T
        tensors["head_dist.bias"] = leaves["head_dist/bias"]
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "timm.safetensors")
    return str(folder / "timm.safetensors"), leaves


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_architecture_of_a_lone_timm_file_comes_from_its_shapes(distilled, layer_scale, positions, tmp_path):
    source, leaves = lone(tmp_path, distilled, layer_scale, positions)
    loaded = pretrained.load(source)
    assert loaded.model == {
        "patch": 8,
        "width": 128,
        "depth": 1,
        "heads": 2,
        "hidden": 48,
        "distilled": distilled,
        "dist_head": True,
        "layer_scale": layer_scale,
        "features": "cls",
        "eps": 1e-6,
    }
    assert (loaded.image_size, loaded.antialias, loaded.classes) == (24, True, ())
    assert loaded.mean == ((0.485, 0.456, 0.406) if distilled or layer_scale else (0.5, 0.5, 0.5))
    got = tree.flatten(loaded.params)
    assert got.keys() == leaves.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(got[name], leaf)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_lone_hugging_face_file_agrees_with_its_directory_where_heads_are_64_wide(family, tmp_path):
    # Width 64 by repeating the tensors of width 32, with the one head of 64 in the config.
    def widen(array):
        return np.tile(array, [2 if size in (32, 64) else 1 for size in array.shape])

    tensors = {name: widen(array) for name, array in golden(family)[1].items()}
    for name in tensors:
        if name == "classifier.weight" and family == "dinov2":
            assert tensors[name].shape == (5, 128)
    config = {"hidden_size": 64, "num_attention_heads": 1}
    config |= {} if family == "dinov2" else {"intermediate_size": 128}
    source = write(tmp_path, family, tensors, **config)
    directory, file = pretrained.load(source), pretrained.load(f"{source}/model.safetensors")
    assert directory.model == file.model
    assert (directory.image_size, directory.antialias) == (file.image_size, file.antialias)
    assert directory.sha256 == file.sha256


def test_name_confirms_the_architecture_but_not_the_features(tmp_path, monkeypatch):
    source, _ = lone(tmp_path, layer_scale=True)
    variant = {"patch": 8, "width": 128, "depth": 1, "heads": 2, "hidden": 48, "layer_scale": True}
    monkeypatch.setitem(VARIANTS, "dinov2_mini_patch8", {**variant, "features": "cls+mean"})
    monkeypatch.setitem(VARIANTS, "deit_mini_patch8", {**variant, "depth": 2, "layer_scale": False, "distilled": True})
    assert pretrained.load(source, name="dinov2_mini_patch8").model["features"] == "cls"
    with pytest.raises(InputError, match=r"is no deit_mini_patch8: it has distilled False, not True; .*depth 1, not 2"):
        pretrained.load(source, name="deit_mini_patch8")
    with pytest.raises(InputError, match="did you mean 'dinov2_mini_patch8'"):
        pretrained.load(source, name="dinov2_mini_patch_8")


def test_heads_that_shapes_do_not_tell(tmp_path):
    source, _ = lone(tmp_path, width=96)
    with pytest.raises(InputError, match=r"number of heads cannot be told from width 96; give a directory"):
        pretrained.load(source)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_epsilon_is_the_librarys(family, tmp_path):
    # Far too small a difference for the parity above to notice.
    assert pretrained.load(write(tmp_path, family)).model["eps"] == (
        1e-12 if family.startswith(("vit", "deit")) else 1e-6
    )


def test_epsilon_of_the_config_counts_and_has_a_default(tmp_path):
    assert pretrained.load(write(tmp_path / "a", "deit", layer_norm_eps=1e-5)).model["eps"] == 1e-5
    for family, eps in {"vit": 1e-12, "deit": 1e-12, "dinov2": 1e-6}.items():
        source = Path(write(tmp_path / family, family))
        config = json.loads((source / "config.json").read_text())
        del config["layer_norm_eps"]
        (source / "config.json").write_text(json.dumps(config))
        assert pretrained.load(str(source)).model["eps"] == eps


def test_classes_are_those_that_somebody_named(tmp_path):
    names = {str(i): name for i, name in reversed(list(enumerate("abcde")))}
    assert pretrained.load(write(tmp_path / "0", "vit")).classes == ()  # LABEL_0 ...
    assert pretrained.load(write(tmp_path / "1", "vit", id2label=names)).classes == tuple("abcde")
    assert pretrained.load(write(tmp_path / "2", "timm_vit", label_names=list("vwxyz"))).classes == tuple("vwxyz")
    with pytest.raises(InputError, match="names 2 classes, the head has 5"):
        pretrained.load(write(tmp_path / "3", "vit", id2label={"0": "a", "1": "b"}))
    with pytest.raises(InputError, match="id2label"):
        pretrained.load(write(tmp_path / "4", "vit", id2label={"a": 0}))


def test_normalisation_is_stated_or_the_familys(tmp_path):
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    half = ((0.5,) * 3, (0.5,) * 3)
    for family, expected in {"vit": half, "deit": imagenet, "dinov2": imagenet, "augreg": half}.items():
        loaded = pretrained.load(write(tmp_path / family, family))
        assert (loaded.mean, loaded.std) == expected, family
    config = golden("timm_vit")[0]
    stated = {**config["pretrained_cfg"], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    loaded = pretrained.load(write(tmp_path / "timm", "timm_vit", pretrained_cfg=stated))
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    preprocessor = tmp_path / "vit" / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    loaded = pretrained.load(str(tmp_path / "vit"))
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    preprocessor.write_text(json.dumps({"do_normalize": False}))
    loaded = pretrained.load(str(tmp_path / "vit"))
    assert (loaded.mean, loaded.std) == ((0.0,) * 3, (1.0,) * 3)
    for bad in ([0.1, 0.2, 0.0], [1.0], "ab", ["x", "y", "z"]):
        preprocessor.write_text(json.dumps({"image_std": bad}))
        with pytest.raises(InputError, match="mean and std"):
            pretrained.load(str(tmp_path / "vit"))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("vit", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new', only 'gelu'"),
        ("vit", {"num_channels": 1}, "num_channels=1"),
        ("vit", {"model_type": "swin"}, "model_type 'swin' is not supported, only vit, deit, dinov2"),
        ("dinov2", {"model_type": "dinov2_with_registers"}, "dinov2_with_registers"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True"),
        ("vit", {"hidden_size": "32"}, "hidden_size='32', expected a positive integer"),
        ("vit", {"image_size": [16, 24]}, r"image_size=\[16, 24\]"),
        ("vit", {"num_attention_heads": 5}, "width 32 does not divide into 5 heads"),
        ("vit", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("vit", {"qkv_bias": False}, r"6 problems:\s+unexpected vit.encoder.layer.0.attention.attention.key.bias"),
        ("vit", {"layer_norm_eps": "small"}, "layer_norm_eps='small', expected a number"),
        ("vit", {"id2label": ["a"]}, r"id2label=\['a'\], expected an object"),
        ("timm_vit", {"model_args": {"num_heads": "two"}}, "num_heads='two'"),
        ("timm_vit", {"model_args": [1]}, r"model_args=\[1\], expected an object"),
        ("timm_vit", {"pretrained_cfg": 1}, "pretrained_cfg=1, expected an object"),
        ("timm_vit", {"label_names": "cat"}, "label_names of config.json must be a list"),
        ("vit", {"image_size": 18}, "image size 18 is not a multiple of the patch 4"),
        ("vit", {"model_type": "deit"}, "missing embed/dist_token"),
        ("deit", {"model_type": "vit"}, "unexpected embed/dist_token"),
        ("vit", {"num_hidden_layers": 3}, "missing blocks_2/attn/key/bias"),
        ("vit", {"num_hidden_layers": 1}, r"unexpected blocks_1/\S+ \(in the file: vit\.encoder\.layer\.1\."),
        ("vit", {"image_size": 24}, r"position_embeddings\) has shape \(1, 17, 32\), expected \(1, 37, 32\)"),
        ("timm_vit", {"global_pool": "map"}, "global_pool 'map'"),
        ("timm_vit", {"global_pool": ["avg"]}, "global_pool"),
        ("vit", {"model_type": ["vit"]}, "model_type"),
        ("timm_vit", {"architecture": "vit_base_patch32_clip_quickgelu_224"}, "another activation"),
        ("timm_vit", {"model_args": {"act_layer": "relu"}}, "another activation"),
    ],
)
def test_configs_that_the_model_cannot_express(family, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        pretrained.load(write(tmp_path, family, **changes))


def test_square_sizes_may_be_pairs(tmp_path):
    loaded = pretrained.load(write(tmp_path, "vit", image_size=[16, 16], patch_size=[4, 4]))
    assert (loaded.image_size, loaded.model["patch"]) == (16, 4)


def test_config_of_another_library(tmp_path):
    source = write(tmp_path / "a", "timm_vit")
    (Path(source) / "config.json").write_text(json.dumps(golden("vit")[0]))
    with pytest.raises(InputError, match=r"tensors are timm's, but config\.json has no 'architecture'"):
        pretrained.load(source)
    source = write(tmp_path / "b", "vit")
    (Path(source) / "config.json").write_text(json.dumps(golden("timm_vit")[0]))
    with pytest.raises(InputError, match="model_type None"):
        pretrained.load(source)


# --- tensors that do not fit -----------------------------------------------------------------------------------------


def test_all_mismatches_come_in_one_message(tmp_path):
    tensors = without(golden("vit")[1], r"layer\.1\.(output|intermediate)")
    tensors["extra.weight"] = np.zeros((2, 3), np.float32)
    tensors["vit.layernorm.bias"] = np.zeros(31, np.float32)
    tensors["vit.embeddings.cls_token"] = np.full((1, 1, 32), np.nan, np.float32)
    with pytest.raises(InputError) as caught:
        pretrained.load(write(tmp_path, "vit", tensors))
    message = str(caught.value)
    assert "7 problems" in message
    assert "unexpected tensor extra.weight (2, 3)" in message
    assert "missing blocks_1/mlp/fc1/kernel (32, 64)" in message
    assert "norm/bias (in the file: vit.layernorm.bias) has shape (31,), expected (32,)" in message
    assert "vit.embeddings.cls_token is not finite" in message


def test_long_lists_are_cut_after_ten_and_counted(tmp_path):
    tensors = {**golden("vit")[1], **{f"more.{i}": np.zeros(1, np.float32) for i in range(25)}}
    with pytest.raises(InputError) as caught:
        pretrained.load(write(tmp_path, "vit", tensors))
    assert "25 problems" in str(caught.value)
    assert str(caught.value).count("unexpected") == 10
    assert str(caught.value).endswith("... and 15 more")


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("dinov2", "dinov2.embeddings.register_tokens", "register tokens"),
        ("dinov2", "dinov2.encoder.layer.0.mlp.weights_in.weight", "SwiGLU"),
        ("timm_vit", "reg_token", "register tokens"),
        ("timm_vit", "fc_norm.weight", "LayerNorm after pooling"),
        ("timm_vit", "norm_pre.weight", "LayerNorm before the blocks"),
        ("timm_vit", "attn_pool.q.weight", "attention pooling"),
        ("timm_vit", "patch_embed.backbone.stem.conv.weight", "convolutional stem"),
        ("timm_vit", "blocks.0.attn.q_norm.weight", "normalised queries"),
        ("timm_vit", "blocks.0.mlp.fc1_g.weight", "SwiGLU"),
        ("augreg", "pre_logits/kernel", "pre_logits"),
        ("augreg", "MAPHead_0/probe", "attention pooling"),
    ],
)
def test_parts_that_the_model_lacks_are_refused_by_name(family, name, reason, tmp_path):
    source = write(tmp_path, family, {**golden(family)[1], name: np.zeros(2, np.float32)})
    with pytest.raises(InputError, match=f"not supported: .*{reason}.*{re.escape(name)}"):
        pretrained.load(source)


def test_not_a_transformer(tmp_path):
    save_file({"conv1.weight": np.zeros((2, 2), np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match=r"its tensors are conv1\.weight"):
        pretrained.load(str(tmp_path / "resnet.safetensors"))
    save_file({"patch_embed.proj.weight": np.zeros((64, 3, 4, 4), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"not a whole ViT; 1 problem:\s+no tensor tells heads, hidden, width"):
        pretrained.load(str(tmp_path / "part.safetensors"))


def test_tensors_of_impossible_rank(tmp_path):
    tensors = {**golden("timm_vit")[1], "patch_embed.proj.weight": np.zeros(7, np.float32)}
    tensors["blocks.0.attn.qkv.bias"] = np.zeros(95, np.float32)
    with pytest.raises(InputError) as caught:
        pretrained.load(write(tmp_path, "timm_vit", tensors))
    assert "patch_embed.proj.weight has the impossible shape (7,)" in str(caught.value)
    assert "blocks.0.attn.qkv.bias has the impossible shape (95,)" in str(caught.value)


@pytest.mark.parametrize("family", ["dinov2", "timm_deit", "augreg"])
def test_each_tensor_is_needed_and_each_shape_checked(family, tmp_path):
    """Takes away, or spoils in one way or another, one tensor after another."""
    tensors = without(golden(family)[1], "mask_token")
    for i, name in enumerate(sorted(tensors)):
        shape = tensors[name].shape
        # Without a head it is a backbone, so the head's kernel is only spoilt; and its width is free.
        head = re.search(r"^head\.weight|^head/kernel|^classifier\.weight", name)
        spoilt = [(*shape[:-1], shape[-1] + 1), (), (0,), (2, *shape), None]
        new = (7, 7) if head else spoilt[(i + len(tensors)) % len(spoilt)]
        changed = without(tensors, f"^{re.escape(name)}$")
        if new is not None:
            changed[name] = np.zeros(new, np.float32)
        with pytest.raises(InputError, match=r"problem|not a Vision Transformer"):
            pretrained.load(write(tmp_path, family, changed))


# --- files that cannot be read ---------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was run",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.safetensors", "a.npz"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_refused_whatever_their_name(name, zipped, tmp_path, capsys):
    data = pickle.dumps({"cls_token": Bomb()})
    if zipped:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", data)
        data = buffer.getvalue()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"a pickle may run any code.*Convert it.*save_file") as caught:
        pretrained.load(str(tmp_path / name))
    assert name in str(caught.value)
    assert "a pickle was run" not in capsys.readouterr().out


def test_object_arrays_in_npz_are_refused(tmp_path, capsys):
    arrays = {**golden("augreg")[1], "cls": np.array([Bomb()], object)}
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(InputError, match="a pickle may run any code"):
        pretrained.load(str(tmp_path / "weights.npz"))
    assert "a pickle was run" not in capsys.readouterr().out


def test_directory_with_only_a_pickle(tmp_path):
    source = Path(write(tmp_path, "vit"))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"neither model.safetensors nor .*Convert it"):
        pretrained.load(str(source))


@pytest.mark.parametrize("damage", ["cut", "header", "long", "empty", "lfs", "text"])
def test_damaged_safetensors(damage, tmp_path):
    source = Path(write(tmp_path, "vit"))
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {
            "cut": data[:-100],
            "header": data.replace(b'"shape":[1,17,32]', b'"shape":[1,99,32]'),
            "long": b"\xff" * 8 + data[8:],
            "empty": b"",
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "text": b"hello, I am no tensors at all",
        }[damage]
    )
    with pytest.raises(InputError, match="Git LFS pointer" if damage == "lfs" else "damaged") as caught:
        pretrained.load(str(source))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flip", "method", "empty", "text"])
def test_damaged_npz(damage, tmp_path):
    source = Path(write(tmp_path, "augreg"))
    data = bytearray(source.read_bytes())
    flipped = data.copy()
    flipped[len(data) // 2] ^= 0xFF
    method = data.copy()
    method[method.index(b"PK\x01\x02") + 10] = 99  # a way of compressing that nobody has
    source.write_bytes(
        {"cut": data[: len(data) // 2], "flip": flipped, "method": method, "empty": b"", "text": b"hello"}[damage]
    )
    with pytest.raises(InputError, match="damaged") as caught:
        pretrained.load(str(source))
    assert str(source) in str(caught.value)


@pytest.mark.parametrize("family", ["vit", "augreg"])
def test_quantised_tensors_are_refused(family, tmp_path):
    tensors = {**golden(family)[1]}
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(InputError, match=f"not plain floats.*{re.escape(name)}"):
        pretrained.load(write(tmp_path, family, tensors))


def test_missing_shards_are_named(tmp_path):
    source = shard(tmp_path, "vit")
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        pretrained.load(str(source))


@pytest.mark.parametrize(
    "table", [{"a": "../secret.safetensors"}, {"a": "/etc/x.safetensors"}, {"a": "x.bin"}, [], {"a": 1}]
)
def test_shard_tables_that_lead_astray(table, tmp_path):
    source = shard(tmp_path, "vit")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(InputError, match=r"outside the folder|no 'weight_map'"):
        pretrained.load(str(source))


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_config(text, tmp_path):
    source = Path(write(tmp_path, "vit"))
    (source / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        pretrained.load(str(source))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (
        str(tmp_path / "none"),
        "none",
        "./weights/vit",
        "a/b/c",
        "owner/vit.safetensors",
        "owner/x.npz",
        "",
    ):
        with pytest.raises(InputError, match=r"no file or directory|no config\.json"):
            pretrained.load(source)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"expected \.safetensors, \.npz or a directory"):
        pretrained.load("notes.txt")
    with pytest.raises(InputError, match=r"no config\.json; give the weights file itself"):
        pretrained.load(str(tmp_path))
    with pytest.raises(InputError, match="revision='main' is for Hub ids"):
        pretrained.load(str(tmp_path), revision="main")


# --- the Hub ---------------------------------------------------------------------------------------------------------

COMMIT, OLD = "c" * 40, "d" * 40


@pytest.fixture
def hub(tmp_path):
    """A server that answers as the Hub does for downloads: the repositories owner/vit and owner/pickle."""
    folder = Path(write(tmp_path / "served", "vit"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    older = Path(write(tmp_path / "older", "vit", layer_norm_eps=1e-5))
    repos = {
        ("owner/vit", COMMIT): files,
        ("owner/vit", OLD): {path.name: path.read_bytes() for path in older.iterdir()},
        ("owner/pickle", COMMIT): {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x04N."},
    }
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            found = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([\w.]+)/([\w.-]+)", self.path)
            repo, revision, name = found.groups() if found else ("", "", "")
            commit = {"main": COMMIT, "v1": OLD}.get(revision, revision)
            code, error, body = 200, "", b""
            if repo == "owner/gated":
                code, error = 403, "GatedRepo"
            elif not any(known == repo for known, _ in repos):
                code, error = 404, "RepoNotFound"
            elif (repo, commit) not in repos:
                code, error = 404, "RevisionNotFound"
            elif name not in repos[repo, commit]:
                code, error = 404, "EntryNotFound"
            else:
                body = repos[repo, commit][name]
            asked.append((self.command, name))
            self.send_response(code)
            for key, value in {
                "X-Error-Code": error,
                "X-Repo-Commit": commit,
                "ETag": f'"{hash(body) & 0xFFFFFFFF:x}"',
                "Content-Length": str(len(body)),
            }.items():
                if value:
                    self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


# huggingface_hub reads its environment when it is imported, so each case needs a process of its own.
CLIENT = """
import json, sys
from vitft_jax import pretrained
from vitft_jax.errors import InputError
results = []
for source, revision in json.loads(sys.argv[1]):
    try:
        p = pretrained.load(source, revision)
        results.append([p.source, p.revision, p.sha256, p.model["eps"]])
    except InputError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def client(cases, tmp_path, endpoint, **environment):
    run = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(cases)],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "JAX_PLATFORMS": "cpu",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_hub_online_then_offline(hub, tmp_path):
    endpoint, asked = hub
    local = pretrained.load(str(tmp_path / "served"))
    newest = ["owner/vit", COMMIT, local.sha256, 1e-12]
    online = client(
        [
            ["owner/vit", ""],
            ["owner/vit", "v1"],
            ["owner/vit", "v9"],
            ["owner/none", ""],
            ["owner/gated", ""],
            ["owner/pickle", ""],
            ["owner/..bad--id", ""],
        ],
        tmp_path,
        endpoint,
    )
    assert online[0] == newest
    assert online[1][1::2] == [OLD, 1e-5]
    assert "owner/vit: no revision 'v9'" in online[2]
    assert "no file or directory 'owner/none', and no such repository" in online[3]
    assert "owner/gated: gated" in online[4]
    assert "owner/pickle: neither model.safetensors nor" in online[5]
    assert "Convert it" in online[5]
    assert "no file or directory" in online[6] or "owner/..bad--id" in online[6]
    fetched = {name for command, name in asked if command == "GET"}
    assert {"config.json", "model.safetensors"} <= fetched
    assert "pytorch_model.bin" not in fetched

    asked.clear()
    offline = client(
        [["owner/vit", ""], ["owner/vit", COMMIT], ["owner/other", ""]], tmp_path, endpoint, HF_HUB_OFFLINE="1"
    )
    assert offline[:2] == [newest, newest]
    assert "owner/other: HF_HUB_OFFLINE is set and config.json is not in the cache" in offline[2]
    assert asked == []


def test_no_connection(monkeypatch):
    def fail(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match=r"owner/vit: the Hub cannot be reached and config\.json is not in the cache"):
        pretrained.load("owner/vit")


# --- fit -------------------------------------------------------------------------------------------------------------


def test_fit_takes_heads_of_another_shape_from_the_initial_parameters(tmp_path):
    loaded = pretrained.load(write(tmp_path, "deit_teacher"))
    model = model_for(loaded, classes=3)
    start = initial(model, 24)
    fitted = tree.flatten(pretrained.fit(loaded, start))
    for name, leaf in tree.flatten(start).items():
        assert fitted[name].shape == leaf.shape
        if name.startswith("head"):
            np.testing.assert_array_equal(fitted[name], leaf)
        elif name != "embed/position":
            np.testing.assert_array_equal(fitted[name], tree.flatten(loaded.params)[name])
    same = pretrained.fit(loaded, initial(model_for(loaded), 16))
    jax.tree.map(np.testing.assert_array_equal, same, loaded.params)


def test_fit_other_features_only_change_the_head(tmp_path):
    loaded = pretrained.load(write(tmp_path, "dinov2"))
    start = initial(model_for(loaded, features="cls"), 16)
    fitted = pretrained.fit(loaded, start)
    assert fitted["head"]["kernel"].shape == (32, 5)
    np.testing.assert_array_equal(fitted["head"]["kernel"], start["head"]["kernel"])
    np.testing.assert_array_equal(fitted["embed"]["position"], loaded.params["embed"]["position"])
    assert "head" not in pretrained.fit(loaded, abstract(model_for(loaded, classes=0), 16))


def test_fit_collects_what_else_differs(tmp_path):
    loaded = pretrained.load(write(tmp_path, "vit"))
    other = model_for(loaded, depth=1, hidden=48)
    with pytest.raises(InputError) as caught:
        pretrained.fit(loaded, abstract(other, 16))
    message = str(caught.value)
    assert "19 problems" in message  # fc1's kernel and bias, fc2's kernel, and the 16 leaves of a block
    assert "blocks_0/mlp/fc1/kernel has shape (32, 64), expected (32, 48)" in message
    assert "unexpected blocks_1/" in message
    with pytest.raises(InputError, match=r"missing embed/dist_token \(1, 1, 32\)"):
        pretrained.fit(loaded, abstract(model_for(loaded, distilled=True), 16))


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(3, 7), (7, 3), (14, 16), (37, 16), (1, 4), (4, 1), (5, 5)])
def test_resize_matrix_keeps_constants_and_reversal(old, new, antialias):
    matrix = position.resize_matrix(old, new, antialias)
    assert matrix.shape == (new, old)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    if old == new:
        np.testing.assert_allclose(matrix, np.eye(old), atol=1e-12)


def test_resize_matrix_reproduces_straight_lines_inside():
    # A property of a = -0.5 alone (Keys 1981); with a = -0.75 lines come out wavy.
    line = position.resize_matrix(16, 24, antialias=True) @ (np.arange(16) + 0.5)
    np.testing.assert_allclose(line[3:-3], ((np.arange(24) + 0.5) * 16 / 24)[3:-3], atol=1e-12)


def test_resize_keeps_prefix_rows_and_columns_apart():
    rows, columns = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    grid = np.stack([rows, columns], axis=-1).reshape(1, 16, 2).astype(np.float32)
    prefix = np.full((1, 2, 2), 9, np.float32)
    small = np.concatenate([prefix, grid], axis=1)
    large = position.resize(small, 2, 8, antialias=False)
    np.testing.assert_array_equal(large[:, :2], prefix)
    large = large[0, 2:].reshape(8, 8, 2)
    assert np.ptp(large[..., 0], axis=1).max() < 1e-5
    assert np.ptp(large[..., 1], axis=0).max() < 1e-5
    assert np.all(np.diff(large[:, 0, 0]) > 0)
    assert position.resize(small, 2, 4, antialias=True) is small


def test_positions_must_be_square():
    with pytest.raises(ValueError, match="14 positions are not a square grid"):
        position.resize(np.zeros((1, 15, 2)), 1, 4, antialias=False)
