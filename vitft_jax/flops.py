"""Floating-point operations of a forward pass, from shapes: two for each multiplication with its addition.

A block of n tokens, of which m leave it (all but in the last block, where the head may read the prefix tokens alone), costs

    query and out  2 m D^2     key and value  2 n D^2     attention  2 m n D     MLP  2 m D hidden

multiplications. Norms, GELU, softmax and additions do not count; nor do adapters, which `merge` folds in.
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


def forward(model: ViT, image_size: int) -> int:
    """Operations of one image's forward pass."""
    width, patches = model.width, (image_size // model.patch) ** 2
    products = patches * 3 * model.patch**2 * width
    for i, (n, m) in enumerate(tokens(model, image_size)):
        products += (2 * m + 2 * n) * width**2 + 2 * m * n * width + 2 * m * width * model.hidden
        if model.select is not None and model.select.wants_rows(i):
            products += model.prefix * n * width
    heads = 2 if model.distilled and model.dist_head else 1
    products += heads * len(model.features.split("+")) * width * model.classes
    return 2 * products


def report(model: ViT, image_size: int) -> dict[str, float]:
    """Operations of one image: of the model, of the same with all tokens, and the first over the second."""
    ours, dense = forward(model, image_size), forward(model.clone(select=None), image_size)
    return {"forward": ours, "dense_forward": dense, "ratio": ours / dense}
