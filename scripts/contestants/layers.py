"""Parts of a layer alone, forward and backward: ours, JAX's own ('autodiff'), and torch's. And the processor's matrix peak."""

import argparse
import os
from typing import Any

import contest

from contestants import Built, Label

PEAK = 2048  # side of the square product that stands for the peak
STEPS_PER_TURN = 4  # of it


def build(who: Label, options: argparse.Namespace) -> Built:
    """A part of a layer; of `matmul` and `peak`, the product alone."""
    make = _torch if who.name == "torch" else _jax
    return Built(make(who, options), {})


def peak_operations() -> float:
    """Of a step of the task `peak`."""
    return 2.0 * PEAK**3 * STEPS_PER_TURN


def _shape(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """Tokens, width, heads and hidden channels of a layer."""
    shape = options.shape
    return (options.size // shape["patch"]) ** 2 + 1, shape["width"], shape["heads"], shape["hidden"]


def _torch(who: Label, options: argparse.Namespace) -> Any:
    import torch

    contest.imported()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokens, width, heads, hidden = _shape(options)
    torch.set_default_dtype(getattr(torch, who.dtype))
    if who.task == "peak":
        a, b = torch.randn(2, PEAK, PEAK)
        return lambda: [a @ b for _ in range(STEPS_PER_TURN)]
    if who.task == "matmul":
        x, kernel = torch.randn(options.batch * tokens, width), torch.randn(width, hidden)
        return lambda: x @ kernel
    if who.task == "gelu":
        x, g = torch.randn(2, options.batch, tokens, hidden)
        x.requires_grad_()
        return lambda: torch.autograd.grad(torch.nn.functional.gelu(x), x, g)
    if who.task == "linear":
        x, kernel = torch.randn(options.batch * tokens, width), torch.randn(width, hidden)
        x.requires_grad_(), kernel.requires_grad_()
        g = torch.randn(options.batch * tokens, hidden)
        return lambda: torch.autograd.grad(x @ kernel, (x, kernel), g)
    qkv = [torch.randn(options.batch, tokens, width).requires_grad_() for _ in range(3)]
    g = torch.randn(options.batch, tokens, width)

    def turn() -> None:
        split = [x.view(options.batch, tokens, heads, -1).transpose(1, 2) for x in qkv]
        out = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(g.shape)
        torch.autograd.grad(out, qkv, g)

    return turn


def _jax(who: Label, options: argparse.Namespace) -> Any:
    import jax
    import jax.numpy as jnp

    from vitft_jax import attention, gelu, product, runtime

    contest.imported()
    runtime.start()
    tokens, width, heads, hidden = _shape(options)
    autodiff = who.name == "autodiff"

    if who.task in ("matmul", "peak"):
        shapes = ((options.batch * tokens, width), (width, hidden)) if who.task == "matmul" else ((PEAK, PEAK),) * 2
        x, kernel = (jnp.ones(shape, who.dtype) for shape in shapes)
        out = jnp.int32 if who.dtype == "int8" else who.dtype
        multiply = jax.jit(lambda x, kernel: jnp.matmul(x, kernel, preferred_element_type=out))
        repeats = STEPS_PER_TURN if who.task == "peak" else 1
        return lambda: [jax.block_until_ready(multiply(x, kernel)) for _ in range(repeats)]

    def attend(*qkv: Any) -> Any:
        split = [x.reshape(options.batch, tokens, heads, -1) for x in qkv]
        if autodiff:
            return jax.nn.dot_product_attention(*split).reshape(qkv[0].shape)
        return attention.attend(*(x.swapaxes(1, 2) for x in split)).swapaxes(1, 2).reshape(qkv[0].shape)

    def activate(x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False) if autodiff else gelu.gelu(x)

    def linear(x: Any, kernel: Any) -> Any:
        return x @ kernel if autodiff else product.matmul(x, kernel)

    rows = (options.batch, tokens)
    layer, *shapes = {
        "attention": (attend, *[(*rows, width)] * 4),
        "gelu": (activate, *[(*rows, hidden)] * 2),
        "linear": (linear, (*rows, width), (width, hidden), (*rows, hidden)),
    }[who.task]
    *x, g = (jax.random.normal(jax.random.key(i), s, jnp.dtype(who.dtype)) for i, s in enumerate(shapes))

    @jax.jit
    def both(x: Any, g: Any) -> Any:
        out, pull = jax.vjp(layer, *x)
        return out, pull(g)

    return lambda: jax.block_until_ready(both(x, g))
