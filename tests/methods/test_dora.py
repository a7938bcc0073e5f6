import json

import jax
import jax.numpy as jnp
import numpy as np
import peft_names
import pytest
from support import adapted, adapters_and_head, init, lora_config, randomised, tiny

from vitft_jax import methods, train, tree
from vitft_jax.methods import dora, lora

IMAGES = jax.random.normal(jax.random.key(7), (2, 16, 16, 3))
DIMENSIONS = (((1,), (0,)), ((), ()))


def layer(rows=6, columns=5, dropout=0.0, scale=1.5):
    """A product alone: (module, x, kernel, random adapter)."""
    dot = dora.DoraDot(lora.Settings(3, 3 * scale, "", dropout), lambda: jax.lax.dot_general, name="dot")
    x, kernel = jax.random.normal(jax.random.key(0), (4, rows)), jax.random.normal(jax.random.key(1), (rows, columns))
    return dot, x, kernel, randomised(dot.init(jax.random.key(2), x, kernel, DIMENSIONS)["lora"])


def weight(kernel, adapter, norm, scale=1.5):
    """(m / n) V, from eq. 5 of the paper; `norm` maps V to n."""
    v = kernel + scale * adapter["a"] @ adapter["b"]
    return adapter["m"] / norm(v) * v


def column_norms(v):
    return jnp.sqrt((v**2).sum(axis=0))


def test_parameters_are_those_of_lora_and_one_for_each_output():
    of_lora = adapters_and_head("vit_base_patch16", 101)
    assert adapters_and_head("vit_base_patch16", 101, "dora") == of_lora + 24 * 768
    encoder = adapters_and_head("vit_base_patch16", 3, "dora", targets="encoder")
    assert encoder == 1_327_104 + 12 * (5 * 768 + 3072) + 769 * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_nothing(dtype):
    plain = tiny(dtype=jnp.dtype(dtype))
    _, model, variables = adapted("dora", random=False, model=plain, targets="encoder")
    expected = plain.apply({"params": variables["params"]}, IMAGES)
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]  # of logits up to 2; an ulp of bfloat16 there
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, rtol=0, atol=tolerance)


def test_magnitudes_start_at_the_norms_of_the_columns():
    _, _, variables = adapted("dora", random=False)
    kernel = np.asarray(variables["params"]["blocks_0"]["attn"]["value"]["kernel"], np.float64)
    m = variables["lora"]["blocks_0"]["attn"]["value"]["dot"]["m"]
    np.testing.assert_allclose(m, np.linalg.norm(kernel, axis=0), rtol=1e-6)


@pytest.mark.parametrize("size", [16, 24])
def test_logits_equal_those_of_peft(size):
    """Golden file of scripts/make_golden.py: rank 4, alpha 6, rsLoRA, all linear layers, rank 2 in one of them."""
    with np.load(peft_names.GOLDEN / "dora.npz") as golden:
        source, adapter = peft_names.separate(golden)
        method = methods.load(lora_config("dora", **peft_names.SETTINGS))
        difference = peft_names.largest_difference(
            method, source, adapter, golden[f"image/{size}"], golden[f"logits/{size}"]
        )
    assert difference < 1e-5


def test_output_is_the_product_with_the_scaled_directions():
    dot, x, kernel, adapter = layer()
    y = dot.apply({"lora": adapter}, x, kernel, DIMENSIONS)
    np.testing.assert_allclose(y, x @ weight(kernel, adapter, column_norms), rtol=1e-5, atol=1e-5)


def test_with_magnitudes_at_the_norms_it_is_lora():
    dot, x, kernel, adapter = layer()
    adapter["m"] = column_norms(kernel + 1.5 * adapter["a"] @ adapter["b"])
    plain = lora.LoraDot(dot.settings, dot.base, name="dot")
    expected = plain.apply({"lora": {key: adapter[key] for key in "ab"}}, x, kernel, DIMENSIONS)
    np.testing.assert_allclose(dot.apply({"lora": adapter}, x, kernel, DIMENSIONS), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_goes_through_the_norm():
    dot, x, kernel, adapter = layer()

    def grads(function):
        return jax.grad(lambda adapter: jnp.sum(function(adapter) ** 2))(adapter)

    ours = grads(lambda adapter: dot.apply({"lora": adapter}, x, kernel, DIMENSIONS))
    constant = grads(lambda adapter: x @ weight(kernel, adapter, lambda v: jax.lax.stop_gradient(column_norms(v))))
    through = grads(lambda adapter: x @ weight(kernel, adapter, column_norms))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, constant)
    assert np.abs(ours["b"] - through["b"]).max() > 0.1  # and that is a difference to be seen


def test_gradients_at_the_start_are_zero_for_a_alone():
    _, model, variables = adapted("dora", random=False)
    grads = jax.grad(lambda ad: jnp.sum(model.apply({**variables, "lora": ad}, IMAGES) ** 2))(variables["lora"])
    for name, leaf in tree.flatten(grads).items():
        assert (leaf == 0).all() if name.endswith("/a") else (leaf != 0).any(), name


def test_merge_gives_the_same_output_and_the_original_stays_to_the_bit():
    method, model, variables = adapted("dora", targets="encoder", rank_pattern=(("blocks_0/mlp", 0),))
    before = jax.tree.map(np.array, variables)
    merged = method.merge(variables)
    assert set(merged) == {"params"}
    expected = model.apply(variables, IMAGES)
    np.testing.assert_allclose(tiny().apply(merged, IMAGES), expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_dropout_spares_the_frozen_branch_alone():
    """With a single input a token is dropped whole or doubled, so its output is one of two."""
    dot, _, kernel, adapter = layer(rows=1, dropout=0.5)
    x = jnp.linspace(1, 2, 200)[:, None]
    gain = adapter["m"] / column_norms(kernel + 1.5 * adapter["a"] @ adapter["b"])
    dropped = x @ kernel
    doubled = dropped + (gain - 1) * (2 * x @ kernel) + gain * (1.5 * (2 * x @ adapter["a"]) @ adapter["b"])
    y = dot.apply({"lora": adapter}, x, kernel, DIMENSIONS, rngs={"dropout": jax.random.key(3)})
    near = [np.isclose(y, case, rtol=1e-4, atol=1e-4).all(axis=1) for case in (dropped, doubled)]
    assert (near[0] ^ near[1]).all()
    assert 50 < near[0].sum() < 150
    quiet = dot.apply({"lora": adapter}, x, kernel, DIMENSIONS)
    np.testing.assert_allclose(quiet, x @ weight(kernel, adapter, column_norms), rtol=1e-5)


def test_an_output_whose_weights_are_all_zero_is_no_division_by_zero():
    dot, x, kernel, adapter = layer()
    adapter = {"a": adapter["a"], "b": jnp.zeros_like(adapter["b"])}
    kernel = kernel.at[:, 2].set(0)
    adapter["m"] = dora.norms(kernel, adapter, dot.settings)
    y, vjp = jax.vjp(lambda adapter, x: dot.apply({"lora": adapter}, x, kernel, DIMENSIONS), adapter, x)
    np.testing.assert_allclose(y, x @ kernel, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(vjp(jnp.ones_like(y))))


def test_the_command_trains(tiny_config, tmp_path, pytestconfig):
    train.main([
        f"--config={pytestconfig.rootpath / 'configs' / 'dora.py'}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tiny_config.data.path}", "--config.data.image_size=16", "--config.data.val_fraction=0.2",
        "--config.model.name=tiny_test", "--config.model.pretrained=", "--config.train.batch_size=6", "--config.train.epochs=6",
        "--config.train.lr=0.01", "--config.lora.dropout=0.1",
    ])  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["test"]["accuracy"]["value"] >= 0.8  # brightness alone tells the classes apart
    assert summary["parameters"]["trainable"] == 2 * 2 * (32 * 8 + 8 * 32 + 32) + 32 * 3 + 3


def test_model_init_alone_has_the_variables_of_an_adapter():
    """`prepare` finds them by name, so their names are part of the contract."""
    method = methods.load(lora_config("dora", targets="blocks_1/mlp/fc1$", rank=2))
    adapter = init(tiny(dot_general_cls=method.dot_general_cls))["lora"]
    assert jax.tree.map(jnp.shape, adapter) == {
        "blocks_1": {"mlp": {"fc1": {"dot": {"a": (32, 2), "b": (2, 64), "m": (64,)}}}}
    }
