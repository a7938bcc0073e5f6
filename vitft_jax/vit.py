"""Vision Transformers as plain Flax modules.

ViT (Dosovitskiy et al. 2020), DeiT (Touvron et al. 2020), and the LayerScale variants DeiT-III (Touvron et al. 2022) and
DINOv2 (Oquab et al. 2023).

The model names no fine-tuning method. Methods come in through three doors: `dot_general_cls`, the constructor of the
product in every linear layer, `attend`, the attention between the projections, and `select`, which chooses the tokens that
go on after a block.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array

from vitft_jax import attention, product
from vitft_jax.attention import Attend
from vitft_jax.gelu import gelu

DotGeneralCls = Callable[[], Callable[..., Array]]
FEATURES = ("cls", "mean", "cls+mean")
REMAT: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}
"""What a block keeps for its backward pass: the products with weights, or nothing but its input."""
_INIT = nn.initializers.truncated_normal(0.02)


class Select(Protocol):
    """Chooses which tokens go on after a block; hashable, since it is part of the static model."""

    def wants_rows(self, block: int) -> bool:
        """Whether the attention rows of the prefix tokens in this block are needed."""

    def __call__(self, block: int, x: Array, rows: Array | None, carry: Any) -> tuple[Array, Array | None, Any]:
        """Returns the tokens `(B, N', D)` for the next block, which of them count, and what its next call gets.

        Those that count, bool `(B, N')` or None for all, are the keys of the next block and what a mean runs over; the
        prefix tokens always count.

        Args:
            block: Index of the block that has just run.
            x: Its output tokens, `(B, N, D)`, prefix tokens first. The last block puts out these alone where the head
                reads nothing else.
            rows: Attention of the prefix tokens in this block, `(B, H, P, N)`, where `wants_rows`.
            carry: What the call before returned last; None at the first block.
        """


def _promote(x: Array, kernel: Array, bias: Array, *, dtype: Dtype, **_: Any) -> tuple[Array, Array, Array]:
    """Casts to the compute dtype, but for the kernel: the product casts that, or quantises what was stored."""
    return jnp.asarray(x, dtype), kernel, jnp.asarray(bias, dtype)


def _dense(module: nn.Module, features: int, name: str) -> nn.Dense:
    """A linear layer of a module that has `dtype` and `dot_general_cls`."""
    return nn.Dense(
        features,
        dtype=module.dtype,
        kernel_init=_INIT,
        promote_dtype=_promote,
        dot_general_cls=module.dot_general_cls or (lambda: product.dot_general),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head self-attention with query, key, value and out projections kept apart."""

    heads: int
    prefix: int
    dtype: Dtype = jnp.float32
    dot_general_cls: DotGeneralCls | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(self, x: Array, leave: int, rows: bool, keys: Array | None = None) -> tuple[Array, Array | None]:
        """Attention of the first `leave` tokens to all of them, or to those where `keys`, bool `(B, N)`, is true.

        Maps tokens `(B, N, D)` to `(B, leave, D)`, and where `rows`, to the prefix tokens' attention `(B, H, P, N)`.
        """
        batch, _, width = x.shape

        def project(name: str, x: Array) -> Array:
            y = _dense(self, width, name)(x)
            return y.reshape(batch, x.shape[1], self.heads, -1).transpose(0, 2, 1, 3)

        q, k, v = project("query", x[:, :leave]), project("key", x), project("value", x)
        y = (self.attend or attention.attend)(q, k, v, keys)
        y = _dense(self, width, "out")(y.transpose(0, 2, 1, 3).reshape(batch, leave, width))
        return y, attention.prefix_rows(q, k, self.prefix, keys) if rows else None


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    hidden: int
    dtype: Dtype = jnp.float32
    dot_general_cls: DotGeneralCls | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens `(B, N, D)` to `(B, N, D)`."""
        return _dense(self, x.shape[-1], "fc2")(gelu(_dense(self, self.hidden, "fc1")(x)))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, CaiT)."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scales the channels of tokens `(B, N, D)`."""
        return x * self.param("scale", nn.initializers.constant(1e-5), x.shape[-1:]).astype(self.dtype)


class Block(nn.Module):
    """A pre-norm transformer block."""

    heads: int
    hidden: int
    prefix: int
    layer_scale: bool
    eps: float
    dtype: Dtype = jnp.float32
    dot_general_cls: DotGeneralCls | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(self, x: Array, leave: int, rows: bool, keys: Array | None = None) -> tuple[Array, Array | None]:
        """Maps tokens `(B, N, D)` to the first `leave` of them, which have seen all, or those where `keys` is true.

        Where `rows`, the prefix tokens' attention `(B, H, P, N)` comes second.
        """

        def scale(y: Array, name: str) -> Array:
            return LayerScale(self.dtype, name=name)(y) if self.layer_scale else y

        y = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm1")(x)
        y, prefix_rows = Attention(self.heads, self.prefix, self.dtype, self.dot_general_cls, self.attend, name="attn")(
            y, leave, rows, keys
        )
        x = x[:, :leave] + scale(y, "scale1")
        y = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm2")(x)
        y = Mlp(self.hidden, self.dtype, self.dot_general_cls, name="mlp")(y)
        return x + scale(y, "scale2"), prefix_rows


class Embed(nn.Module):
    """Patches, prefix tokens and learned position embeddings.

    The patch embedding is a reshape and a linear layer, the same mathematics as a convolution whose stride is its kernel
    size: kernel `(patch * patch * 3, width)` in the order row, column, channel.
    """

    width: int
    patch: int
    distilled: bool
    dtype: Dtype = jnp.float32
    dot_general_cls: DotGeneralCls | None = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images `(B, H, W, 3)` to tokens `(B, P + HW / patch^2, D)`."""
        batch, height, width, channels = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {self.patch}")
        rows, columns = height // self.patch, width // self.patch
        x = images.reshape(batch, rows, self.patch, columns, self.patch, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * columns, self.patch * self.patch * channels)
        x = _dense(self, self.width, "patch")(x)
        prefix = [self.param("cls_token", _INIT, (1, 1, self.width))]
        if self.distilled:
            prefix.append(self.param("dist_token", _INIT, (1, 1, self.width)))
        position = self.param("position", _INIT, (1, len(prefix) + rows * columns, self.width))
        prefix = [jnp.broadcast_to(token.astype(self.dtype), (batch, 1, self.width)) for token in prefix]
        return jnp.concatenate([*prefix, x], axis=1) + position.astype(self.dtype)


class ViT(nn.Module):
    """A Vision Transformer classifier.

    Parameters stay float32; `dtype` is what it computes in. With `distilled` there is a second prefix token, and with
    `dist_head` it has a head of its own: the logits are then the mean of both heads, in training and in evaluation, as
    DeiT evaluates.

    Attributes:
        patch: Side of a patch, pixels.
        width: Channels of a token (D).
        depth: Number of blocks.
        heads: Attention heads; they divide `width`.
        hidden: Channels inside the MLP.
        classes: Number of outputs; 0 returns the features.
        distilled: DeiT's distillation token.
        dist_head: Whether that token has a head of its own; without, the head reads the class token alone, as in Hugging
            Face's `DeiTForImageClassification`.
        layer_scale: A learned factor on each residual branch.
        features: What the head reads after the last LayerNorm: 'cls', the 'mean' of the patch tokens that are left, or
            'cls+mean' (concatenated).
        eps: LayerNorm epsilon: 1e-12 for Hugging Face's ViT and DeiT, 1e-6 elsewhere.
        dtype: Compute dtype.
        dot_general_cls: Constructor of the product in every linear layer, of x in `dtype` and a kernel as it is stored; None
            is `product.dot_general`.
        attend: Attention between the projections; None is `attention.attend`.
        select: Token selector; None keeps all tokens.
        remat: What the backward pass of a block computes again: 'none', or a key of `REMAT`.
    """

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    classes: int
    distilled: bool = False
    dist_head: bool = True
    layer_scale: bool = False
    features: str = "cls"
    eps: float = 1e-6
    dtype: Dtype = jnp.float32
    dot_general_cls: DotGeneralCls | None = None
    attend: Attend | None = None
    select: Select | None = None
    remat: str = "none"

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens."""
        return 2 if self.distilled else 1

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps normalised images `(B, H, W, 3)` to logits `(B, classes)` in float32, or to features if `classes` is 0.

        Raises:
            ValueError: The image size is not a multiple of the patch size, or `features` is not one of `FEATURES`.
        """
        if self.features not in FEATURES or (self.distilled and self.features != "cls"):
            raise ValueError(f"features={self.features!r} with distilled={self.distilled}: not one of {FEATURES}")
        x = Embed(self.width, self.patch, self.distilled, self.dtype, self.dot_general_cls, name="embed")(
            images.astype(self.dtype)
        )
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], static_argnums=(2, 3))  # counting self: leave and rows
        keys = carry = None
        for i in range(self.depth):
            # Nothing reads the patch tokens of the last block if the head reads prefix tokens: 7 % of a 12-block model.
            leave = self.prefix if self.features == "cls" and i == self.depth - 1 else x.shape[1]
            wants_rows = self.select is not None and self.select.wants_rows(i)
            x, rows = block(
                self.heads,
                self.hidden,
                self.prefix,
                self.layer_scale,
                self.eps,
                self.dtype,
                self.dot_general_cls,
                self.attend,
                name=f"blocks_{i}",
            )(x, leave, wants_rows, keys)
            if self.select is not None:
                x, keys, carry = self.select(i, x, rows, carry)
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)

        heads = [("head", self._pool(x, keys))]
        if self.distilled and self.dist_head:
            heads.append(("head_dist", x[:, 1]))
        if not self.classes:
            return jnp.concatenate([features for _, features in heads], axis=-1)
        logits = [_dense(self, self.classes, name)(features) for name, features in heads]
        return sum(y.astype(jnp.float32) for y in logits) / len(logits)

    def _pool(self, x: Array, keys: Array | None) -> Array:
        where = None if keys is None else keys[:, self.prefix :, None]
        parts = {"cls": lambda: x[:, 0], "mean": lambda: x[:, self.prefix :].mean(axis=1, where=where)}
        return jnp.concatenate([parts[part]() for part in self.features.split("+")], axis=-1)


_SIZES = {
    "micro": {"width": 128, "depth": 6, "heads": 4, "hidden": 512},  # the bundled weights: at most 3 MB in float16
    "tiny": {"width": 192, "depth": 12, "heads": 3, "hidden": 768},
    "small": {"width": 384, "depth": 12, "heads": 6, "hidden": 1536},
    "base": {"width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "large": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    "huge": {"width": 1280, "depth": 32, "heads": 16, "hidden": 5120},
}
_FAMILIES = {
    "vit": {},
    "deit": {"distilled": True},
    "deit3": {"layer_scale": True},
    "dinov2": {"layer_scale": True, "features": "cls+mean"},
}

VARIANTS: dict[str, dict[str, Any]] = {
    f"{family}_{size}_patch{patch}": {"patch": patch, **_SIZES[size], **_FAMILIES[family]}
    for family in _FAMILIES
    for size in _SIZES
    for patch in (8, 14, 16, 32)
}
"""Architectures by name, such as 'vit_base_patch16' or 'deit_small_patch16' (with distillation token): arguments of `ViT`."""
