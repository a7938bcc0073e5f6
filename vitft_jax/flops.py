"""Floating-point operations of a forward pass and of a train step, from shapes: two for each multiplication with its addition.

A block of n tokens, of which m leave it (all but in the last block, where the head may read the prefix tokens alone), costs

    query and out  2 m D^2     key and value  2 n D^2     attention  2 m n D     MLP  2 m D hidden

multiplications. Norms, GELU, softmax and additions do not count; nor do adapters, which `merge` folds in. The backward pass of
a linear layer costs its forward pass for the gradient of its input, and again for that of its kernel where it trains; that of
attention costs two forward passes, for its two products have two inputs each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vitft_jax.vit import ViT


class _Counting:
    """A selector that notes the number of tokens it was given and has returned after each block."""

    def __init__(self, select: Any) -> None:
        self.select, self.seen = select, []

    def wants_rows(self, block: int) -> bool:
        return self.select is not None and self.select.wants_rows(block)

    def __call__(self, block: int, x: Array, rows: Array | None, carry: Any) -> tuple[Array, Array | None, Any]:
        left = x.shape[1]
        keys = None
        if self.select is not None:
            x, keys, carry = self.select(block, x, rows, carry)
        self.seen.append((left, x.shape[1]))
        return x, keys, carry


def tokens(model: ViT, image_size: int) -> list[tuple[int, int]]:
    """Tokens that enter each block, and tokens that leave it: read off the model's own trace."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    counting = _Counting(model.select)
    jax.eval_shape(lambda images: model.clone(select=counting).init(jax.random.key(0), images), images)
    first = (image_size // model.patch) ** 2 + model.prefix
    entering = [first, *(after for _, after in counting.seen[:-1])]
    return list(zip(entering, (left for left, _ in counting.seen), strict=True))


def _parts(model: ViT, image_size: int) -> tuple[int, int, int, int, int]:
    """Multiplications of one image: patch embedding, query, key and value of block 0, other linear layers, attention, heads."""
    width, patches = model.width, (image_size // model.patch) ** 2
    first = linear = attention = 0
    for i, (n, m) in enumerate(tokens(model, image_size)):
        qkv = (m + 2 * n) * width**2
        first += qkv if i == 0 else 0
        linear += (qkv if i else 0) + m * width**2 + 2 * m * width * model.hidden
        attention += 2 * m * n * width
    heads = (2 if model.distilled and model.dist_head else 1) * len(model.features.split("+")) * width * model.classes
    return patches * 3 * model.patch**2 * width, first, linear, attention, heads


def forward(model: ViT, image_size: int) -> int:
    """Operations of one image's forward pass."""
    rows = [n for i, (n, _) in enumerate(tokens(model, image_size)) if model.select and model.select.wants_rows(i)]
    return 2 * (sum(_parts(model, image_size)) + model.prefix * model.width * sum(rows))


def train_step(model: ViT, image_size: int, *, full: bool) -> int:
    """Operations of one image in a train step without recomputation.

    Args:
        model: The network.
        image_size: Pixels.
        full: Whether everything trains; else adapters in every block, and the head.
    """
    embed, first, linear, attention, heads = _parts(model, image_size)
    backward = linear + 2 * attention + 2 * heads  # nothing below the adapters of block 0 gets a gradient
    if full:
        backward += first + embed + first + linear  # inputs of block 0; kernels
    return forward(model, image_size) + 2 * backward


def report(model: ViT, image_size: int) -> dict[str, float]:
    """Operations of one image: of the model, of the same with all tokens, and the first over the second."""
    ours, dense = forward(model, image_size), forward(model.clone(select=None), image_size)
    return {"forward": ours, "dense_forward": dense, "ratio": ours / dense}
