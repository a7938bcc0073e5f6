import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import init, tiny

from vitft_jax import config as configs
from vitft_jax import methods, optim, quantized_attention, quantizer, step, tree
from vitft_jax.methods import quant
from vitft_jax.ptq import simulate

IMAGES = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(("static", "attention"), [(False, False), (True, False), (False, True)])
def test_it_is_the_int8_model_and_without_any_layer_the_float_model(static, attention):
    model = tiny()
    params = init(model)["params"]
    leaves = tree.flatten(params)
    paths = [n.removesuffix("/kernel") for n in leaves if n.endswith("/kernel") and "blocks_" in n]
    bound = jnp.float32(3.0) if static else None
    layers = {
        path: simulate.Layer(quantizer.quantise_kernel(leaves[f"{path}/kernel"]), leaves[f"{path}/bias"] + 0.1, bound)
        for path in paths
    }
    config = configs.default()
    base = step.Program(model, methods.stack([]), optim.optimizer(config, methods.stack([]), 9), (0.5,) * 3, (0.5,) * 3)
    program = simulate.program(base, layers, quant.Settings(static=static, attention=attention))

    def simulated(in_float):
        variables = simulate.variables(params, layers, in_float, False)
        return step.eval_step(variables, {}, IMAGES, program=program)

    attend = quantized_attention.attend if attention else None
    exact_program = dataclasses.replace(base, model=model.clone(attend=attend))
    exact = step.eval_step({"params": params}, {}, IMAGES, program=exact_program)
    np.testing.assert_allclose(simulated(paths), exact, rtol=0, atol=1e-6)

    some, size = paths[:3], step.eval_step._cache_size()
    settings = quant.Settings(static=static, base="int8", skip_layers=f"^(embed|head)|^({'|'.join(some)})$")
    dot = quant.QuantDot
    real = exact_program.model.clone(dot_general_cls=lambda: dot(settings, lambda: jax.lax.dot_general, name="quant"))
    shapes = jax.eval_shape(real.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    kept = {path: layer for path, layer in layers.items() if path not in some}
    biased = tree.unflatten(leaves | {f"{path}/bias": layer.bias for path, layer in kept.items()})
    variables = quant.insert(
        {"params": biased, "quant": shapes["quant"]},
        {path: layer.kernel for path, layer in kept.items()},
        {path: layer.bound for path, layer in kept.items()} if static else None,
    )
    logits = simulated(some)
    assert step.eval_step._cache_size() == size  # no compilation for another choice
    expected = step.eval_step(variables, {}, IMAGES, program=dataclasses.replace(base, model=real))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert jnp.abs(simulated(some) - exact).max() > 1e-3


def test_divergence():
    p, q = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.25, 0.75], [0.5, 0.5]])
    expected = (0.5 * np.log(2) + 0.5 * np.log(2 / 3) + np.log(2)) / 2
    assert simulate.divergence(p, q, False) == pytest.approx(expected)
    assert simulate.divergence(p, p, False) == 0
    both = simulate.divergence(p[:, :1], q[:, :1], True)  # one label is a softmax over two classes
    assert both == pytest.approx(expected)
