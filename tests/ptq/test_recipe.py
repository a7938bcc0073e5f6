"""The worst case on purpose: a model with outlier channels, on which plain min-max quantisation fails and the recipe holds."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import init, tiny

from vitft_jax import config as configs
from vitft_jax import methods, optim, step, tree
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
