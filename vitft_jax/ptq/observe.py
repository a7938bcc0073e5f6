"""What goes into every linear layer: extremes over all tokens, and a sample of tokens."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vitft_jax import product, tree
from vitft_jax.errors import InputError
from vitft_jax.vit import ViT

ROWS = 1024  # tokens sampled per layer over all images; memory is this times all layers' inputs


class Seen(NamedTuple):
    """Inputs of a linear layer.

    Attributes:
        absmax: Largest magnitude of each channel over all tokens of all images, `(in,)`.
        rows: Tokens taken evenly from every image, `(R, in)`.
    """

    absmax: Array
    rows: Array


class Tap(nn.Module):
    """A product in float that notes its input."""

    tokens: int

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        chosen = np.unique(np.linspace(0, flat.shape[1] - 1, self.tokens).round().astype(int))
        self.sow("seen", "absmax", jnp.max(jnp.abs(flat), axis=(0, 1)))
        self.sow("seen", "rows", flat[:, chosen].reshape(-1, x.shape[-1]))
        return product.dot_general(x, kernel, dimensions, **kwargs)


def observe(model: ViT, params: tree.Tree, batches: Iterable[Array], images: int) -> dict[str, Seen]:
    """Runs the float model over normalised images `(b, S, S, 3)`, `images` of them in all; returns what each layer saw.

    Raises:
        InputError: A layer saw a value that is not finite.
    """
    tap = model.clone(dot_general_cls=partial(Tap, -(-ROWS // images), name="tap"))

    @jax.jit
    def run(params: tree.Tree, x: Array) -> Mapping[str, Any]:
        return tap.apply({"params": params}, x, mutable=["seen"])[1]["seen"]

    absmax: dict[str, np.ndarray] = {}
    rows: dict[str, list[np.ndarray]] = {}
    for x in batches:
        for name, (leaf,) in tree.flatten(run(params, x)).items():
            path, part = name.split("/tap/")
            if part == "absmax":
                absmax[path] = np.maximum(absmax.get(path, 0.0), leaf)
            else:
                rows.setdefault(path, []).append(np.asarray(leaf, np.float32))
    seen = {path: Seen(jnp.asarray(absmax[path], jnp.float32), jnp.concatenate(rows[path])) for path in rows}
    if damaged := [path for path, s in seen.items() if not np.isfinite(s.absmax).all()]:
        raise InputError(
            f"on the calibration images the inputs of {len(damaged)} layers are not finite, such as that of {damaged[0]}: "
            "weights or images are damaged"
        )
    return seen
