import csv

import jax
import jax.numpy as jnp
import numpy as np
import peft_names
import pytest
from support import adapted, adapters_and_head, init, lora_config, randomised, tiny

from vitft_jax import evaluate, methods, train, tree
from vitft_jax.errors import InputError
from vitft_jax.methods import lora, pissa

IMAGES = jax.random.normal(jax.random.key(7), (2, 16, 16, 3))
RNG = np.random.default_rng(0)
ULP = 2.0**-23


def kernel_with(singular, rows=40, columns=24):
    """A kernel with these singular values."""
    u, v = (np.linalg.qr(RNG.normal(size=(n, len(singular))))[0] for n in (rows, columns))
    return (u * singular @ v.T).astype(np.float32)


def by_svd(kernel, rank):
    """What `pissa.principal` computes, another way and with other signs."""
    u, s, vt = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    signs = np.where(np.arange(rank) % 2, 1, -1)
    return u[:, :rank] * signs * s[:rank] ** 0.5, (s[:rank] ** 0.5 * signs)[:, None] * vt[:rank]


def base_and_adapted(random=False, **changes):
    """The original variables, and those of `adapted`: (method, base, model, variables)."""
    method, model, variables = adapted("pissa", random=random, **changes)
    return method, {"params": randomised(init(model, random=False)["params"])}, model, variables


def test_parameters_are_those_of_lora():
    assert adapters_and_head("vit_base_patch16", 101, "pissa") == 372_581


@pytest.mark.parametrize("rs", [False, True])
def test_a_fresh_adapter_changes_nothing_though_it_is_not_zero(rs):
    _, base, model, variables = base_and_adapted(targets="encoder", alpha=5.0, rs=rs)
    expected = tiny().apply(base, IMAGES)
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, rtol=1e-5, atol=1e-5)
    residual = tiny().apply({"params": variables["params"]}, IMAGES)
    assert np.abs(residual - expected).max() > 0.1


def test_residual_and_adapter_add_up_to_the_kernel():
    method, base, _, variables = base_and_adapted(targets="encoder")
    kernels = tree.flatten(base["params"])
    for name, leaf in tree.flatten(method.merge(variables)["params"]).items():
        np.testing.assert_allclose(leaf, kernels[name], rtol=0, atol=4 * ULP * np.abs(kernels[name]).max())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_principal_part_is_the_truncated_singular_value_decomposition(shape):
    kernel = RNG.normal(size=shape).astype(np.float32)
    left, right = pissa.principal(kernel, 5)
    expected = np.matmul(*by_svd(kernel, 5))
    np.testing.assert_allclose(left @ right, expected, atol=1e-12)
    singular = np.linalg.svd(kernel.astype(np.float64), compute_uv=False)
    for gram in (left.T @ left, right @ right.T):  # S_r is shared out evenly
        np.testing.assert_allclose(gram, np.diag(singular[:5]), atol=1e-10)
    residual = np.linalg.svd(kernel - left @ right, compute_uv=False)
    np.testing.assert_allclose(residual[: len(singular) - 5], singular[5:], atol=1e-10)


def test_the_whole_kernel_can_be_the_principal_part():
    kernel = RNG.normal(size=(6, 9)).astype(np.float32)
    np.testing.assert_allclose(np.matmul(*pissa.principal(kernel, 6)), kernel, atol=1e-12)


@pytest.mark.parametrize(
    "singular",
    [
        np.linspace(2, 1, 24),
        np.array([3.0, 3, 3, 3] + [1.0] * 20),  # any rotation of the first four will do
        np.array([1.0, 1, 1, 1 - 1e-7] + [1 - 1e-6] * 20),  # hardly told apart
    ],
    ids=["spread", "repeated", "close"],
)
def test_the_residual_is_a_function_of_the_kernel_alone(singular):
    """Rows in another order are other sums, as on another machine."""
    kernel = kernel_with(singular)
    residual = (kernel - np.matmul(*pissa.principal(kernel, 4))).astype(np.float32)
    order = RNG.permutation(len(kernel))
    left, right = pissa.principal(kernel[order], 4)
    again = np.empty_like(residual)
    again[order] = (kernel[order] - left @ right).astype(np.float32)
    another = (kernel - np.matmul(*by_svd(kernel, 4))).astype(np.float32)
    for other in (again, another):
        np.testing.assert_allclose(other, residual, rtol=0, atol=ULP * np.abs(kernel).max())


def test_a_run_gives_the_same_answers_where_the_decomposition_has_other_signs(
    tiny_config, tmp_path, monkeypatch, pytestconfig
):
    """The command, end to end; then its checkpoint in a program that decomposes the base weights another way."""
    train.main([
        f"--config={pytestconfig.rootpath / 'configs' / 'pissa.py'}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tiny_config.data.path}", "--config.data.image_size=16", "--config.data.val_fraction=0.2",
        "--config.model.name=tiny_test", "--config.model.pretrained=", "--config.train.batch_size=6", "--config.train.epochs=6",
        "--config.train.lr=0.01",
    ])  # fmt: skip

    def predicted():
        rows = list(csv.DictReader((tmp_path / "run" / "predictions_test.csv").open()))
        return np.array([[float(row[f"p:{name}"]) for name in ("dark", "grey", "light")] for row in rows])

    here = predicted()
    monkeypatch.setattr(pissa, "principal", by_svd)
    results = evaluate.evaluate(tmp_path / "run")
    np.testing.assert_allclose(predicted(), here, atol=1e-5)
    assert results["accuracy"]["value"] >= 0.8  # brightness alone tells the classes apart


@pytest.mark.parametrize("size", [16, 24])
def test_logits_equal_those_of_peft(size):
    """Golden file of scripts/make_golden.py: rank 4, alpha 6, rsLoRA, all linear layers, rank 2 in one of them.

    PEFT decomposes in float32, so the kernels that it leaves are rounded otherwise than ours.
    """
    with np.load(peft_names.GOLDEN / "pissa.npz") as golden:
        source, adapter = peft_names.separate(golden)
        method = methods.load(lora_config("pissa", **peft_names.SETTINGS))
        logits = golden[f"logits/{size}"]
        difference = peft_names.largest_difference(method, source, adapter, golden[f"image/{size}"], logits)
    assert difference < 1e-5 * np.abs(logits).max()


def test_gradients_at_the_start_reach_a_and_b():
    _, _, model, variables = base_and_adapted()
    grads = jax.grad(lambda ad: jnp.sum(model.apply({**variables, "lora": ad}, IMAGES) ** 2))(variables["lora"])
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))


def test_merge_gives_the_same_output():
    method, _, model, variables = base_and_adapted(random=True, targets="encoder")
    expected = model.apply(variables, IMAGES)
    np.testing.assert_allclose(tiny().apply(method.merge(variables), IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rs", [False, True])
def test_as_lora_of_twice_the_rank_on_the_original_kernels_it_is_the_same_model(rs):
    changes = {"targets": "encoder", "rank": 3, "alpha": 5.0, "rs": rs, "rank_pattern": (("fc1", 4), ("fc2", 0))}
    _, base, model, variables = base_and_adapted(random=True, **changes)
    initial = base_and_adapted(**changes)[3]["lora"]
    settings = lora.settings_of(lora_config("pissa", **changes))
    adapters, doubled = pissa.to_lora(variables["lora"], initial, settings)
    assert (doubled.rank_at("blocks_0/attn/out"), doubled.rank_at("blocks_0/mlp/fc1")) == (6, 8)
    assert doubled.scale(6) == pytest.approx(settings.scale(3))
    as_lora = methods.load(
        lora_config(targets="encoder", rank=6, alpha=doubled.alpha, rs=rs, rank_pattern=doubled.rank_pattern)
    )
    expected = model.apply(variables, IMAGES)
    actual = tiny(dot_general_cls=as_lora.dot_general_cls).apply({**base, "lora": adapters}, IMAGES)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_rank_without_a_principal_part_is_refused():
    with pytest.raises(InputError, match=r"pissa: blocks_0/attn/query: a 32 x 32 kernel has no .* rank 33; choose"):
        adapted("pissa", rank=33)
    _, _, variables = adapted(rank=2)
    variables["params"]["blocks_1"]["attn"]["value"]["kernel"] = np.eye(32, dtype=np.float32)
    with pytest.raises(InputError, match=r"pissa: blocks_1/attn/value: its principal part of rank 2 is not unique"):
        methods.load(lora_config("pissa", rank=2)).prepare(variables)
    with pytest.raises(ValueError, match="not unique"):
        pissa.principal(np.zeros((4, 3), np.float32), 1)
