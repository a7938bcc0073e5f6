import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_names
import pytest
from support import adapted, adapters_and_head, lora_config, randomised, tiny

from vitft_jax import config as configs
from vitft_jax import methods, tree
from vitft_jax.errors import InputError
from vitft_jax.methods import lora

IMAGES = jax.random.normal(jax.random.key(7), (2, 16, 16, 3))


def test_golden_counts():
    assert adapters_and_head("vit_base_patch16", 101, targets="qv", rank=8) == 372_581
    assert adapters_and_head("vit_base_patch16", 1000, targets="qkv", rank=64) == 4_307_944
    assert adapters_and_head("vit_base_patch16", 3, targets="encoder", rank=8) == 1_327_104 + 769 * 3


def test_a_fresh_adapter_changes_nothing_to_the_bit():
    _, model, variables = adapted(random=False)
    plain = tiny().apply({"params": variables["params"]}, IMAGES)
    np.testing.assert_array_equal(model.apply(variables, IMAGES), plain)


def test_a_starts_as_peft_starts_it_and_b_at_zero():
    _, _, variables = adapted(random=False, model=tiny(width=64), rank=16)
    leaves = tree.flatten(variables["lora"])
    a = np.concatenate([np.ravel(x) for n, x in leaves.items() if n.endswith("/a")])
    assert np.abs(a).max() <= 1 / np.sqrt(64)
    np.testing.assert_allclose(a.std(), 1 / np.sqrt(3 * 64), rtol=0.05)  # 4096 draws: 5 standard errors is 3 %
    assert all((x == 0).all() for n, x in leaves.items() if n.endswith("/b"))


@pytest.mark.parametrize("size", [16, 24])
def test_logits_equal_those_of_peft(size):
    """Golden file of scripts/make_golden.py: rank 4, alpha 6, rsLoRA, all linear layers, rank 2 in one of them."""
    with np.load(peft_names.GOLDEN / "lora.npz") as golden:
        source, adapter = peft_names.separate(golden)
        method = methods.load(lora_config(**peft_names.SETTINGS))
        difference = peft_names.largest_difference(
            method, source, adapter, golden[f"image/{size}"], golden[f"logits/{size}"]
        )
    assert difference < 1e-5


@pytest.mark.parametrize("targets", ["qv", "qkv", "encoder", r"blocks_1/mlp"])
def test_output_equals_kernel_plus_scaled_product(targets):
    _, model, variables = adapted(targets=targets, rank=3, alpha=5.0)
    params = tree.flatten(variables["params"])
    adapters = tree.flatten(variables["lora"])
    for name in (n for n in adapters if n.endswith("/dot/a")):
        layer = name.removesuffix("/dot/a")
        params[f"{layer}/kernel"] += 5.0 / 3 * adapters[name] @ adapters[f"{layer}/dot/b"]
    expected = tiny().apply({"params": tree.unflatten(params)}, IMAGES)
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_merge_gives_the_same_output_and_the_original_stays_to_the_bit():
    method, model, variables = adapted(targets="encoder")
    before = jax.tree.map(np.array, variables)
    merged = method.merge(variables)
    assert set(merged) == {"params"}
    expected = model.apply(variables, IMAGES)
    np.testing.assert_allclose(tiny().apply(merged, IMAGES), expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_scale():
    assert lora.Settings(16, 8.0, "").scale(16) == 0.5
    assert lora.Settings(16, 16.0, "").scale(16) == 2 * lora.Settings(16, 8.0, "").scale(16)
    assert lora.Settings(16, 8.0, "", rs=True).scale(16) == 4 * lora.Settings(16, 8.0, "").scale(16)


def test_delta_has_the_rank_of_the_adapter():
    _, _, variables = adapted(rank=3)
    delta = lora.delta(variables["lora"]["blocks_0"]["attn"]["query"]["dot"], lora.Settings(3, 3.0, ""))
    singular = np.linalg.svd(delta, compute_uv=False)
    assert (singular[:3] > 1e-3 * singular[0]).all()
    assert (singular[3:] < 1e-5 * singular[0]).all()


def test_rank_pattern_first_match_wins_and_zero_leaves_a_layer_alone():
    _, _, variables = adapted(rank=2, rank_pattern=(("blocks_0/attn/query", 5), ("blocks_0", 0)))
    shapes = {name: leaf.shape for name, leaf in tree.flatten(variables["lora"]).items() if name.endswith("/a")}
    assert shapes == {
        "blocks_0/attn/query/dot/a": (32, 5),
        "blocks_1/attn/query/dot/a": (32, 2),
        "blocks_1/attn/value/dot/a": (32, 2),
    }


def test_gradients_at_the_start_are_zero_for_a_and_not_for_b():
    _, model, variables = adapted(random=False)
    grads = jax.grad(lambda ad: jnp.sum(model.apply({**variables, "lora": ad}, IMAGES) ** 2))(variables["lora"])
    for name, leaf in tree.flatten(grads).items():
        assert (leaf == 0).all() if name.endswith("/a") else (leaf != 0).any(), name


def test_dropout_is_on_only_with_an_rng_spares_the_frozen_branch_and_is_right_on_average():
    dot = lora.LoraDot(lora.Settings(4, 4.0, "", dropout=0.5), lambda: jax.lax.dot_general, name="dot")
    x, kernel = jax.random.normal(jax.random.key(0), (5, 8)), jnp.zeros((8, 6))
    dimensions = (((1,), (0,)), ((), ()))
    variables = randomised(dot.init(jax.random.key(1), x, kernel, dimensions))
    quiet = dot.apply(variables, x, kernel, dimensions)
    noisy = jax.vmap(lambda k: dot.apply(variables, x, kernel, dimensions, rngs={"dropout": k}))(
        jax.random.split(jax.random.key(2), 4000)
    )
    error = noisy.std(0) / np.sqrt(4000)
    assert (np.abs(noisy.mean(0) - quiet) < 5 * error).all()
    assert (noisy.std(0) > 0).all()
    no_adapter = {"lora": jax.tree.map(jnp.zeros_like, variables["lora"])}
    with_rng = dot.apply(no_adapter, x, kernel + 1, dimensions, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_array_equal(with_rng, x @ (kernel + 1))


@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_lora_plus_gives_b_the_ratio_of_the_rate_of_a(name):
    method = methods.load(lora_config(name, lr_ratio=16.0))
    tx = method.wrap_tx(optax.sgd(0.1), 10)
    adapters = {
        "lora": {"q": {"dot": {"a": jnp.ones(2), "b": jnp.ones(2), "m": jnp.ones(2)}}},
        "params": {"head": {"b": jnp.ones(2)}},
    }
    updates, _ = tx.update(adapters, tx.init(adapters), adapters)
    np.testing.assert_allclose(updates["lora"]["q"]["dot"]["a"], -0.1)
    for part in ("b", "m"):  # as PEFT, which puts DoRA's magnitudes beside B
        np.testing.assert_allclose(updates["lora"]["q"]["dot"][part], -1.6)
    np.testing.assert_allclose(updates["params"]["head"]["b"], -0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"lora\.rank=0"),
        ({"alpha": 0.0}, r"lora\.alpha=0\.0: above 0"),
        ({"dropout": 1.0}, r"lora\.dropout=1\.0"),
        ({"lr_ratio": 0.5}, r"lr_ratio=0\.5"),
        ({"targets": "(qv"}, r"'\(qv'.*no regex"),
        ({"targets": ""}, r"lora\.targets='': would match every layer"),
        ({"rank_pattern": (("[", 3),)}, "no regex"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        methods.load(lora_config(**changes))


@pytest.mark.parametrize("names", [("lora", "dora"), ("pissa", "lora")])
def test_two_adapters_on_the_same_layers_are_refused(names):
    config = configs.default()
    config.methods = names
    with pytest.raises(InputError, match="two methods put adapters on the linear layers"):
        methods.load(config)


def test_settings_that_no_method_reads_are_named():
    config = configs.default()
    config.methods = ("adalora",)
    assert methods.unread(config) == []
    configs.override(config, ["lora.rank=64", "adalora.target_r=2", "quant.static=True", "train.lr=1e-3"])
    assert methods.unread(config) == ["lora.rank=64", "quant.static=True"]
    config.methods = ("quant", "pissa")  # which reads the settings of LoRA
    assert methods.unread(config) == ["adalora.target_r=2"]


def test_unknown_and_repeated_methods_are_refused():
    config = configs.default()
    config.methods = ("lara",)
    with pytest.raises(InputError, match=r"'lara'.*did you mean 'lora'"):
        methods.load(config)
    config.methods = ("lora", "lora")
    with pytest.raises(InputError, match="twice"):
        methods.load(config)
