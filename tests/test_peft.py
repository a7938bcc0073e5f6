"""Adapters in the files of PEFT: reading them, what is refused, and runs that start from one."""

import json
import re
import shutil
from dataclasses import replace

import exports
import numpy as np
import pytest
from peft_names import GOLDEN, PREFIX, adapter_tree
from safetensors.numpy import load_file, save_file

from vitft_jax import hf_names, peft, pretrained, run, train, tree, weightfiles
from vitft_jax.build import Weights, build
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError
from vitft_jax.export import export
from vitft_jax.folder import Folder

LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {"layers.1.attention.q_proj": 2},
}
RNG = np.random.default_rng(0)


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / peft.CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / peft.TENSORS)
    return folder


def pair(module, r=2, size=8, **more):
    """Tensors of an adapter on a square layer."""
    parts = {"lora_A.weight": (r, size), "lora_B.weight": (size, r), **more}
    return {f"{PREFIX}{module}.{part}": RNG.normal(size=shape).astype(np.float32) for part, shape in parts.items()}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix("tensor/"): file[key] for key in file.files if key.startswith(f"tensor/{PREFIX}")}


def renamed(tensors, how):
    names = {new: how(ours) for ours, new in hf_names.layers("vit", "hf5", 2).items()}
    return {re.sub(r"vit\.layers.*(?=\.lora)", lambda m: names[m[0]], name): t for name, t in tensors.items()}


@pytest.mark.parametrize("naming", ["hf5", "hf4", "no prefix"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_peft_wrote_is_read_as_the_golden_tests_read_it(method, naming, tmp_path):
    tensors = golden(method)
    expected = tree.flatten(adapter_tree(tensors))
    config = {**LORA, "use_dora": method == "dora"}
    if naming == "hf4":
        config["rank_pattern"] = {"layer.1.attention.attention.query": 2}
    if naming != "hf5":
        scheme = "hf4" if naming == "hf4" else "hf5"
        names = hf_names.layers("vit", scheme, 2)
        tensors = renamed(tensors, lambda ours: names[ours].removeprefix("" if naming == "hf4" else "vit."))
        assert not any(".vit.layers." in name for name in tensors)
    adapter = peft.read(write(tmp_path / "adapter", config, tensors))
    found = {f"{path}/dot/{part}": array for path, parts in adapter.layers.items() for part, array in parts.items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.rs) == (method, 4, 6.0, True)
    assert not adapter.head


def test_alphas_by_layer_are_folded_into_b(tmp_path):
    query, fc2 = "vit.layers.1.attention.q_proj", "vit.layers.1.mlp.fc2"
    tensors = pair(query) | pair(fc2) | pair("vit.layers.0.mlp.fc2")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "alpha_pattern": {"q_proj": 6, r"layers\.1\.mlp\.fc2": 2, "fc2": 8},
    }
    layers = peft.read(write(tmp_path / "adapter", config, tensors)).layers
    for path, module, ratio in (
        ("blocks_1/attn/query", query, 1.5),
        ("blocks_1/mlp/fc2", fc2, 0.5),  # the first that matches
        ("blocks_0/mlp/fc2", "vit.layers.0.mlp.fc2", 2.0),
    ):
        np.testing.assert_array_equal(layers[path]["a"], tensors[f"{PREFIX}{module}.lora_A.weight"].T)
        np.testing.assert_array_equal(layers[path]["b"], ratio * tensors[f"{PREFIX}{module}.lora_B.weight"].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, "not supported: use_qalora=True"),
        ({"lora_bias": True}, "not supported: lora_bias=True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"target_parameters": ["w"]}, "target_parameters="),
        ({"use_something_new": True}, "use_something_new=True"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": None}, "peft_type None"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is not supported"),
        ({"r": 0}, "r=0, expected a whole number above 0"),
        ({"r": 2.0}, "r=2.0, expected a whole number above 0"),
        ({"r": 4}, "rank 4 for vit.layers.0.mlp.fc1 (r, or rank_pattern), and its tensors have rank 2"),
        (
            {"rank_pattern": {"fc1": 3}},
            "rank 3 for vit.layers.0.mlp.fc1 (r, or rank_pattern), and its tensors have rank 2",
        ),
        ({"rank_pattern": {"fc1": "2"}}, "rank_pattern['fc1']='2', expected a whole number"),
        ({"lora_alpha": "8"}, "lora_alpha='8', expected"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"alpha_pattern": [1]}, "alpha_pattern=[1], expected an object"),
        ({"alpha_pattern": {"(": 1}}, "adapter_config.json: alpha_pattern has '(', which is no regex"),
        ({"rank_pattern": {"(": 1}}, "adapter_config.json: rank_pattern has '(', which is no regex"),
        ({"alpha_pattern": {"fc1": -1}}, "alpha_pattern['fc1']=-1, expected a number above 0"),
        ({"use_dora": True}, "has lora_A, lora_B, not lora_A, lora_B, lora_magnitude_vector"),
        ({"peft_type": "ADALORA", "use_rslora": True}, "use_dora and use_rslora are not supported with ADALORA"),
    ],
)
def test_settings_that_are_not_supported_are_named(changes, message, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    with pytest.raises(InputError) as error:
        peft.read(write(tmp_path / "adapter", config, pair("vit.layers.0.mlp.fc1")))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "adapter"))


@pytest.mark.parametrize("settings", [{"r": 4, "rank_pattern": {r"layers\.0\.mlp\.fc1": 2}}, {"r": 2}])
def test_a_rank_is_that_of_the_first_pattern_or_r(settings, tmp_path):
    folder = write(
        tmp_path / "adapter", {"peft_type": "LORA", "lora_alpha": 4, **settings}, pair("vit.layers.0.mlp.fc1")
    )
    assert peft.read(folder).layers["blocks_0/mlp/fc1"]["a"].shape == (8, 2)


def test_settings_without_effect_are_no_matter(tmp_path):
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": True, "megatron_core": "megatron.core",
        "qalora_group_size": 16, "lora_dropout": 0.1, "init_lora_weights": "gaussian", "layers_to_transform": [0],
        "use_qalora": False, "lora_bias": False, "layer_replication": None, "task_type": "X", "peft_version": "0.21",
    }  # fmt: skip
    assert set(peft.read(write(tmp_path / "adapter", config, pair("vit.layers.0.mlp.fc1"))).layers) == {
        "blocks_0/mlp/fc1"
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("vit.layers.0.mlp.fc1", **{"lora_B.bias": (8,)}), "lora_B.bias is not supported"),
        (pair("classifier"), "an adapter on classifier, which is no linear layer in a block"),
        (pair("vit.layers.0.mlp.fc3"), "an adapter on vit.layers.0.mlp.fc3"),
        ({f"{PREFIX}vit.layernorm.weight": np.ones(8, np.float32)}, "vit.layernorm.weight is not supported"),
        ({f"{PREFIX}classifier.weight": np.ones((3, 8), np.float32)}, "no adapter on any layer"),
        (pair("vit.layers.0.mlp.fc1", **{"lora_A.weight": (3, 8)}), "do not belong together"),
        (pair("vit.layers.0.mlp.fc1", **{"lora_A.weight": (2, 8, 1)}), "do not belong together"),
        (pair("vit.layers.0.mlp.fc1", r=0), "do not belong together"),
    ],
)
def test_tensors_that_are_not_supported_are_named(tensors, message, tmp_path):
    with pytest.raises(InputError) as error:
        peft.read(write(tmp_path / "adapter", {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, tensors))
    assert message in str(error.value)


def test_pickles_and_what_is_no_adapter_are_refused(tmp_path):
    with pytest.raises(InputError, match="no PEFT adapter here"):
        peft.read(tmp_path)
    folder = write(tmp_path / "adapter", {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, pair("vit.layers.0.mlp.fc1"))
    (folder / peft.TENSORS).rename(folder / peft.PICKLE)
    with pytest.raises(InputError) as error:
        peft.read(folder)
    assert str(error.value).endswith(weightfiles.CONVERT)
    (folder / peft.PICKLE).rename(folder / "else")
    with pytest.raises(InputError, match=f"restore {peft.TENSORS}"):
        peft.read(folder)
    (folder / peft.TENSORS).write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match="pickle"):
        peft.read(folder)


# --- Runs ------------------------------------------------------------------------------------------------------------


def prune(name, leaf):
    """Of AdaLoRA: some triplets, and all in one layer."""
    if not name.endswith("/lam"):
        return leaf
    return 0 * leaf if "blocks_0/attn/key" in name else leaf * (np.arange(leaf.size) != 1)


@pytest.fixture(scope="module")
def root(image_folder, tmp_path_factory):
    """A run with each kind of adapter on one base, and these adapters as PEFT has them."""
    root = tmp_path_factory.mktemp("runs")
    base = exports.write_base(root / "base", "vit")
    changes = {
        "lora.rank": 3,
        "lora.alpha": 5.0,
        "lora.targets": "encoder",
        "lora.rank_pattern": (("blocks_1/mlp", 2),),
    }
    for method in ("lora", "dora", "adalora"):
        config = exports.config_for(image_folder, base, method, **(changes if method != "adalora" else {}))
        exports.hand_made(root / method, config, Decision(1.5), prune)
        export(root / method, root / f"{method}_peft", "peft")
    return root


def started(image_folder, root, method, folder=None, classes=None, **changes):
    """A run before its first step that starts from an adapter, why its head is fresh, and its config."""
    folder = folder or root / f"{method}_peft"
    config = exports.config_for(image_folder, root / "base", method, init_adapter=str(folder), **changes)
    config, base = run.resolve(config)
    config, adapter = peft.resolve(config, base)
    dataset = Folder(root / "new").dataset(config)
    return *peft.insert(build(config, dataset, base), adapter, classes or dataset.classes), config


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_run_starts_where_the_other_ended(method, root, image_folder):
    changes = {"adalora.init_r": 12} if method == "adalora" else {}  # the default, which the adapter replaces
    built, fresh_head, config = started(image_folder, root, method, **changes)
    best = run.best(root / method)
    assert not fresh_head
    if method != "adalora":
        assert config.lora.targets == "encoder"
        assert (config.lora.rank, config.lora.alpha) == (3, 5.0)
        assert dict(config.lora.rank_pattern) == {"^(blocks_1/mlp/fc1|blocks_1/mlp/fc2)$": 2}
    else:
        assert (config.adalora.init_r, config.adalora.targets) == (4, "qkv")
        assert config.adalora.alpha == best.config.adalora.alpha
    ours, theirs = tree.flatten(built.trainable), tree.flatten(best.trainable)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        kept = np.ones(leaf.shape, bool)
        if method == "adalora" and name.endswith(("/q", "/p")):  # vectors of pruned triplets are drawn anew
            left = np.asarray(theirs[name[:-1] + "lam"]) != 0
            kept = np.broadcast_to(left if name.endswith("/q") else left[:, None], leaf.shape)
        np.testing.assert_array_equal(np.asarray(ours[name])[kept], np.asarray(leaf)[kept], err_msg=name)
        assert np.isfinite(ours[name]).all()


def test_the_command_starts_from_it_and_goes_on(root, image_folder, tmp_path, capsys):
    adapter = shutil.copytree(root / "dora_peft", tmp_path / "adapter")
    told = json.loads((adapter / peft.CONFIG).read_text())
    (adapter / peft.CONFIG).write_text(json.dumps({**told, "base_model_name_or_path": "some/other"}))
    config = exports.config_for(image_folder, root / "base", "dora", init_adapter=str(adapter))
    config.train.update(steps=1, lr=0.0)
    config.figures.count = 0
    summary = train.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"starts from the adapter {adapter}\n" in said
    assert f"note: the adapter says that its base is some/other, and that of this run is {root / 'base'}\n" in said
    assert summary["environment"]["adapter"]["sha256"] == peft.read(root / "dora_peft").sha256
    _, logits = exports.images_and_logits(root / "dora")
    np.testing.assert_array_equal(exports.images_and_logits(tmp_path / "run")[1], logits)
    assert train.train(config, tmp_path / "run") == summary
    assert Folder(tmp_path / "run").config().lora.rank == 3


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"lora.rank": 5}, "lora.rank=5: the adapter in init_adapter="),
        ("lora", {"lora.targets": "qv2"}, "lora.targets='qv2'"),
        ("lora", {"lora.rs": True}, "lora.rs=True"),
        ("adalora", {"adalora.alpha": 3.0}, "adalora.alpha=3.0"),
        ("dora", {"methods": ("lora",)}, "is a dora adapter, and config.methods is ('lora',)"),
        ("lora", {"methods": ("pissa",)}, "set --config.methods=lora"),
        ("lora", {"methods": ()}, "set --config.methods=lora"),
        ("lora", {"model.pretrained": "", "model.name": "vit_tiny_patch16"}, "give the base as model.pretrained"),
        ("lora", {"init_adapter": "nowhere"}, "no PEFT adapter here"),
    ],
)
def test_a_config_that_does_not_agree(method, changes, message, root, image_folder):
    config = exports.config_for(image_folder, root / "base", method, init_adapter=str(root / f"{method}_peft"))
    config.adalora.init_r = 12
    config.update_from_flattened_dict(changes)
    base = pretrained.load(str(root / "base")) if config.model.pretrained else None
    with pytest.raises(InputError) as error:
        peft.resolve(config, base)
    assert message in str(error.value)


def test_a_config_that_says_the_same_agrees(root, image_folder):
    config = exports.config_for(image_folder, root / "base", "lora", init_adapter=str(root / "lora_peft"))
    config.lora.update(rank=3, alpha=5.0, targets=r"attn/|mlp/", dropout=0.1)
    config, _ = peft.resolve(config, pretrained.load(str(root / "base")))
    assert config.lora.dropout == 0.1


def test_the_head_comes_along_for_the_same_classes_alone(root):
    adapter = peft.read(root / "lora_peft")
    kernel = adapter.head["head/kernel"]
    head = peft.head_for(adapter, ("light", "dark", "grey"))
    np.testing.assert_array_equal(head["params/head/kernel"], kernel[:, [2, 0, 1]])
    np.testing.assert_array_equal(head["params/head/bias"], adapter.head["head/bias"][[2, 0, 1]])
    assert not peft.head_for(adapter, ("light", "dark", "blue"))
    unnamed = replace(adapter, classes=())  # as PEFT writes it: the number of classes decides
    np.testing.assert_array_equal(peft.head_for(unnamed, ("light", "dark", "blue"))["params/head/kernel"], kernel)
    assert not peft.head_for(unnamed, ("light", "dark"))
    assert not peft.head_for(replace(unnamed, head={}), ("light", "dark", "grey"))


def test_why_a_head_is_fresh_is_said(root, image_folder, tmp_path):
    assert started(image_folder, root, "lora", classes=("light", "dark", "blue"))[1] == (
        "its own is for dark, grey, light, this one for light, dark, blue"
    )
    shutil.copytree(root / "lora_peft", tmp_path / "headless")
    tensors = load_file(root / "lora_peft" / peft.TENSORS)
    save_file({n: t for n, t in tensors.items() if "classifier" not in n}, tmp_path / "headless" / peft.TENSORS)
    assert started(image_folder, root, "lora", tmp_path / "headless")[1] == "none is saved with it"


def test_the_base_that_an_adapter_names_is_compared(root):
    adapter = peft.read(root / "lora_peft")
    own = Weights(str(root / "base"), "", "")
    assert adapter.base == str(root / "base")
    assert not peft.other_base(adapter, own)
    assert not peft.other_base(replace(adapter, base=f"{root}/lora/../base"), own)
    assert not peft.other_base(replace(adapter, base=""), own)
    assert not peft.other_base(replace(adapter, base=str(pretrained.BUNDLED)), Weights("bundled", "", ""))
    assert "other/base" in peft.other_base(replace(adapter, base="other/base"), own)
    assert "bundled" in peft.other_base(adapter, Weights("bundled", "", ""))


def test_an_adapter_of_another_model(root, image_folder, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    wide = write(tmp_path / "wide", config, pair("vit.layers.0.attention.q_proj", size=48))
    with pytest.raises(
        InputError, match=r"a at blocks_0/attn/query has shape \(48, 2\), and the model needs \(32, 2\)"
    ):
        started(image_folder, root, "lora", wide)


def test_what_is_read_is_written_again_as_it_was(root, image_folder, tmp_path):
    for method in ("dora", "adalora"):
        built, _, config = started(image_folder, root, method)
        folder = Folder(tmp_path / method)
        dataset = folder.dataset(config)
        exports.save(folder, config, dataset, built, built.trainable)
        export(tmp_path / method, tmp_path / f"{method}_peft", "peft")
        ours, before = (load_file(where / f"{method}_peft" / peft.TENSORS) for where in (tmp_path, root))
        assert ours.keys() == before.keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
