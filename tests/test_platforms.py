"""The train step and the int8 forward pass lower for platforms that are not here; what a step keeps, and gives away."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import randomised, tiny

from vitft_jax import config as configs
from vitft_jax import methods, optim, step, tree, vit

RNG = np.random.default_rng(0)
BATCH = {"image": RNG.integers(0, 255, (4, 16, 16, 3), np.uint8), "label": np.array([0, 1, 2, 1])}
METHODS = {
    "full": (),
    "lora": ("lora",),
    "adalora": ("adalora",),
    "skip": ("lora", "skip"),
    "qat": ("quant",),
    "int8": ("quant", "lora"),
}


def setup(name, remat="none", tx=None, accumulate=1, depth=2, dropout=0.0, size=16, dtype=jnp.float32):
    """A tiny program with its state and frozen variables."""
    config = configs.default()
    config.methods = METHODS[name]
    config.skip.update(layers=(0,), drop_ratio=(0.4,))
    config.lora.dropout = dropout
    config.quant.base = "int8" if name == "int8" else "float"
    method = methods.load(config)
    model = tiny(dot_general_cls=method.dot_general_cls, select=method.select, remat=remat, depth=depth, dtype=dtype)
    tx = optim.optimizer(config, method, 20) if tx is None else tx
    program = step.Program(model, method, tx, (0.5,) * 3, (0.25,) * 3, accumulate=accumulate)
    variables = dict(model.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))
    variables["params"] = randomised(variables["params"])
    variables |= {name: randomised(variables[name]) for name in method.collections}
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    trains = ("params",) if name in ("full", "qat") else ("params/head", *method.collections)
    trainable, frozen = tree.split(method.prepare(variables), lambda leaf: leaf.startswith(trains))
    return program, trainable, frozen


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", METHODS)
def test_the_train_step_lowers_for_every_platform(name, platform):
    program, trainable, frozen = setup(name)
    traced = step.train_step.trace(step.init_state(program, trainable), frozen, BATCH, program=program)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text
    assert ("xi8>" in text) == (name in ("qat", "int8"))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_int8_forward_pass_lowers_to_integer_products_for_every_platform(platform):
    program, trainable, frozen = setup("int8")
    traced = step.eval_step.trace(trainable, frozen, BATCH["image"], program=program)
    products = [
        line
        for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        if "stablehlo.dot_general" in line and "xi8>" in line and "xi32>" in line
    ]
    assert len(products) == 2 * 6  # blocks, linear layers


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_donated_whole(name):
    program, trainable, frozen = setup(name)
    state = step.init_state(program, trainable)
    compiled = step.train_step.lower(state, frozen, BATCH, program=program).compile()
    assert "input_output_alias" in compiled.as_text()
    unread = name == "adalora"  # its flag `final`, one byte, which the step sets anew
    assert compiled.memory_analysis().alias_size_in_bytes == tree.nbytes(state) - unread


@pytest.mark.parametrize("name", METHODS)
def test_what_is_computed_again_changes_neither_loss_nor_gradients_nor_names(name):
    def gradient(remat):
        program, trainable, frozen = setup(name, remat, dropout=0.2)
        compute = jax.jit(jax.value_and_grad(step.loss, has_aux=True), static_argnums=4)
        (loss, _), grads = compute(trainable, frozen, BATCH, jax.random.key(3), program)
        return loss, grads

    loss, grads = gradient("none")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    for remat in vit.REMAT:
        loss_again, grads_again = gradient(remat)
        np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
        assert set(tree.flatten(grads)) == set(tree.flatten(grads_again))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * largest), grads, grads_again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora", "int8"])
def test_computing_again_saves_memory(name):
    def temporaries(remat):
        program, trainable, frozen = setup(name, remat, depth=6, size=32)
        batch = {"image": np.zeros((8, 32, 32, 3), np.uint8), "label": np.zeros(8, np.int32)}
        state = step.init_state(program, trainable)
        compiled = step.train_step.lower(state, frozen, batch, program=program).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = map(temporaries, ("none", *vit.REMAT))
    assert full < dots < none
    assert full < 0.6 * none


@pytest.mark.parametrize("name", ["full", "lora"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    """With plain gradient descent: Adam would divide what rounding leaves of a zero gradient by its own size.

    In float64, since in float32 sums in another order differ by 1e-6 by themselves, on one processor more than on another.
    """
    found = []
    with jax.enable_x64(True):
        for accumulate in (1, 2, 4):
            program, trainable, frozen = setup(name, tx=optax.sgd(1.0), accumulate=accumulate, dtype=jnp.float64)
            state, values = step.train_step(step.init_state(program, trainable), frozen, BATCH, program=program)
            moved = jax.tree.map(lambda new, old: np.asarray(new - old), state.trainable, trainable)
            found.append((moved, values))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found[0][0]))
    for moved, values in found[1:]:
        np.testing.assert_allclose(values["loss"], found[0][1]["loss"], rtol=1e-6)
        np.testing.assert_allclose(values["grad_norm"], found[0][1]["grad_norm"], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6 * largest), found[0][0], moved)
