import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitft_jax import config as configs
from vitft_jax import methods, product, vit


def problem(inputs, outputs, dtype=jnp.float32):
    k = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(k[0], (2, 5, inputs), dtype), jax.random.normal(k[1], (inputs, outputs), dtype)
    return x, w, jax.random.normal(k[2], (2, 5, outputs), dtype)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 9), (9, 6), (6, 6), (6, 1)])
def test_product_and_gradients_equal_those_of_autodiff(inputs, outputs):
    x, w, g = problem(inputs, outputs)
    ours, pull = jax.vjp(product.matmul, x, w)
    theirs, pull_reference = jax.vjp(jnp.matmul, x, w)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for a, b in zip(pull(g), pull_reference(g), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_keep_bfloat16():
    x, w, g = problem(6, 9, jnp.bfloat16)
    out, pull = jax.vjp(product.matmul, x, w)
    assert {a.dtype for a in (out, *pull(g))} == {jnp.dtype(jnp.bfloat16)}


def test_a_float32_kernel_is_multiplied_in_the_dtype_of_x_and_gets_a_float32_gradient():
    x, w, g = problem(6, 9)
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    out, pull = jax.vjp(lambda x, w: product.dot_general(x, w, None), x, w)
    expected, pull_reference = jax.vjp(product.matmul, x, w.astype(jnp.bfloat16))
    np.testing.assert_array_equal(out, expected)
    assert [a.dtype for a in (out, *pull(g))] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(pull(g), pull_reference(g), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


@pytest.mark.parametrize(("method", "products"), [("", 3), ("lora", 3), ("adalora", 3), ("quant", 2)])
def test_every_bfloat16_product_of_a_step_reads_rows(method, products):
    """Backward products included: contraction over the last axis of the left and the first of the right operand."""
    rows = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    if "= bf16[64,64]{1,0} dot(" not in jax.jit(jnp.matmul).lower(rows, rows).compile().as_text():
        pytest.skip("the XLA of this jax multiplies bfloat16 in float32 on a CPU, however it is laid out")
    config = configs.default()
    config.methods = (method,) * bool(method)
    loaded = methods.load(config)
    shape = {"patch": 8, "width": 64, "depth": 2, "heads": 2, "hidden": 128, "classes": 3}
    model = vit.ViT(**shape, dtype=jnp.bfloat16, dot_general_cls=loaded.dot_general_cls)
    images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.grad(lambda variables, images: model.apply(variables, images).sum())
    text = jax.jit(gradient).lower(variables, images).compile().as_text()
    dots = re.findall(
        r"= bf16\[\d+,\d+\]\S* dot\(.*?lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}", text
    )
    assert len(dots) >= 2 * 6 * products  # blocks, linear layers, products of each that are not in int8
    assert set(dots) == {("1", "0")}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lays_nothing_out_on_other_platforms(platform):
    arrays = problem(8, 16)
    gradients = jax.jit(lambda x, w, g: jax.vjp(product.matmul, x, w)[1](g)).trace(*arrays)
    assert "LayoutConstraint" in gradients.lower().as_text()
    assert "LayoutConstraint" not in gradients.lower(lowering_platforms=(platform,)).as_text()
