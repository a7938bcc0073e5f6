"""The worst case on purpose: a model with outlier channels, on which plain min-max quantisation fails and the recipe holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import init, tiny

from vitft_jax import config as configs
from vitft_jax import methods, optim, quantizer, step, tree
from vitft_jax.methods import quant
from vitft_jax.ptq import observe, recipe, simulate

OUTLIERS = {3: 100.0, 11: 60.0, 20: 30.0}  # factors by channel
IMAGES = np.random.default_rng(0).integers(0, 255, (400, 16, 16, 3), np.uint8)
CALIBRATION, TEST = IMAGES[:100], IMAGES[100:]


def planted(params):
    """The same function in float, with outliers at the inputs of query, key, value and fc1 of every block."""
    leaves = tree.flatten(params)
    for block in range(2):
        for norm, behind in (("norm1", ("attn/query", "attn/key", "attn/value")), ("norm2", ("mlp/fc1",))):
            for channel, factor in OUTLIERS.items():
                for part in ("scale", "bias"):
                    name = f"blocks_{block}/{norm}/{part}"
                    leaves[name] = leaves[name].at[channel].multiply(factor)
                for layer in behind:
                    name = f"blocks_{block}/{layer}/kernel"
                    leaves[name] = leaves[name].at[channel].divide(factor)
    return tree.unflatten(leaves)


@pytest.fixture(scope="module")
def model():
    """A program, and parameters whose float model gives each of three classes about a third of the images."""
    model, method, config = tiny(features="mean"), methods.stack([]), configs.default()
    program = step.Program(model, method, optim.optimizer(config, method, 9), (0.5,) * 3, (0.25,) * 3)
    params = init(model)["params"]
    logits = step.eval_step({"params": params}, {}, TEST, program=program)
    leaves = tree.flatten(params)
    leaves["head/bias"] = leaves["head/bias"] - logits.mean(0)
    leaves["head/kernel"] = leaves["head/kernel"] / logits.std(0)
    leaves["head/bias"] = leaves["head/bias"] / logits.std(0)
    return program, tree.unflatten(leaves)


@pytest.fixture(scope="module")
def observed(model):
    program, params = model
    return observe.observe(program.model, params, [step.normalise(program, jnp.asarray(CALIBRATION))], len(CALIBRATION))


def leaves_of(result):
    """Parameters and layers of `recipe.run` by name, less what is None."""
    params, layers, _ = result
    named = {f"{path}/{i}": leaf for path, layer in layers.items() for i, leaf in enumerate(jax.tree.leaves(layer))}
    return {**tree.flatten(params), **named}


def test_every_stage_can_be_left_out_alone(model, observed):
    params = model[1]
    before = tree.flatten(params)
    none = recipe.Recipe(smooth=False, clip=False, correct=False)
    changed = {
        "smooth": lambda after, layers: any((tree.flatten(after)[n] != leaf).any() for n, leaf in before.items()),
        "clip": lambda after, layers: any(
            (layer.kernel.scale != quantizer.quantise_kernel(tree.flatten(after)[f"{path}/kernel"], 4).scale).any()
            for path, layer in layers.items()
        ),
        "correct": lambda after, layers: any(
            (layer.bias != tree.flatten(after)[f"{path}/bias"]).any() for path, layer in layers.items()
        ),
        "static": lambda after, layers: any(layer.bound is not None for layer in layers.values()),
    }
    for on, how in {
        "": none,
        "smooth": dataclasses.replace(none, smooth=True),
        "clip": dataclasses.replace(none, clip=True),
        "correct": dataclasses.replace(none, correct=True),
        "static": dataclasses.replace(none, static="max"),
    }.items():
        settings = quant.Settings(bits=4, static=bool(how.static))  # 4 bits: every stage has something to do
        after, layers, told = recipe.run(params, observed, settings, how)
        assert {name for name, has in changed.items() if has(after, layers)} == ({on} if on else set())
        assert (on == "smooth") == any(of["alpha"] is not None for of in told.values())
        for path, layer in layers.items():
            if on != "clip":  # the largest magnitude is where a channel saturates
                largest = np.abs(tree.flatten(after)[f"{path}/kernel"]).max(0)
                np.testing.assert_allclose(layer.kernel.scale, largest / 7.5, rtol=1e-6)


def test_ranges_of_training_are_taken_as_they_are(model, observed):
    paths = [path for path in observed if quant.Settings().converts(path)]
    trained = {path: jnp.float32(i + 1) for i, path in enumerate(paths)}
    how = recipe.Recipe(smooth=False, static="trained")
    _, layers, _ = recipe.run(model[1], observed, quant.Settings(static=True), how, trained)
    assert {path: float(layer.bound) for path, layer in layers.items()} == {p: float(b) for p, b in trained.items()}


def test_the_recipe_gives_the_same_twice(model):
    """From the images on: what the layers saw, and every leaf."""
    program, params = model
    settings, how = quant.Settings(static=True), recipe.Recipe(static="mse")
    batch = step.normalise(program, jnp.asarray(CALIBRATION))
    first, second = (
        leaves_of(recipe.run(params, observe.observe(program.model, params, [batch], 100), settings, how))
        for _ in range(2)
    )
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def test_bias_correction_is_not_computed_where_it_is_left_out(model, observed, monkeypatch):
    monkeypatch.setattr(recipe.kernels, "mean_error", None)
    recipe.run(model[1], observed, quant.Settings(), recipe.Recipe(smooth=False, clip=False, correct=False))


def test_every_stage_says_that_it_begins(model, observed):
    lines = []
    recipe.run(model[1], observed, quant.Settings(static=True), recipe.Recipe(static="99.9"), say=lines.append)
    assert [line.split(":")[0] for line in lines] == ["smoothing", "clipping", "static ranges", "bias correction"]


def agreement(model, params, how):
    """Share of the test images on which the int8 model decides as the float model."""
    program, exact = model
    settings = quant.Settings(static=bool(how.static))
    batch = step.normalise(program, jnp.asarray(CALIBRATION))
    seen = observe.observe(program.model, params, [batch], len(CALIBRATION))
    params, layers, _ = recipe.run(params, seen, settings, how)
    simulated = simulate.program(program, layers, settings)
    ours = step.eval_step(simulate.variables(params, layers, (), False), {}, TEST, program=simulated)
    expected = step.eval_step({"params": exact}, {}, TEST, program=program)
    return float(jnp.mean(ours.argmax(1) == expected.argmax(1)))


def test_outliers_break_plain_ranges_and_not_the_recipe(model):
    """One range for all channels is 30 to 100 times too wide for most: they keep a few of 255 integers, and decisions suffer.

    A scale per token and smoothing give them back. Chance is 1/3, and an error of 1 % of the spread of the logits changes
    about 1 % of three balanced decisions: hence the levels.
    """
    program, params = model
    outliers = planted(params)
    plain = recipe.Recipe(smooth=False, clip=False, correct=False, static="max")
    exact, same = (step.eval_step({"params": p}, {}, TEST, program=program) for p in (params, outliers))
    np.testing.assert_allclose(same, exact, rtol=0, atol=1e-3)
    shares = np.bincount(exact.argmax(1), minlength=3) / len(TEST)
    assert shares.min() > 0.2
    assert agreement(model, params, plain) > 0.9  # it is the outliers
    assert agreement(model, outliers, plain) < 0.75
    assert agreement(model, outliers, recipe.Recipe()) > 0.95
