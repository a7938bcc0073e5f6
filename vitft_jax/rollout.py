"""Attention roll-out: which input tokens the attention mixes into what the head reads (Abnar & Zuidema 2020, arXiv:2005.00928).

    R_0 = I,   R_l = 1/2 (A_l + I) R_(l-1)        A_l: attention of block l, the mean over heads; I: the residual branch

A row of R says of what shares of the input tokens a token is made, were attention all that moves anything: values, MLPs and
signs are left out, so it is no explanation of a decision.

Where a method lets tokens leave, its selector does to the rows of R what it does to the tokens: it acts on every channel of a
token alone, so the shares are channels like any. Hence a token that has left takes up nothing more: one that skips blocks
rejoins with the row that it had, one that leaves for good counts by what others took from it before, and not afterwards, and a
fused token is the mean of those that it stands for, by their scores.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from vitft_jax import attention
from vitft_jax.attention import Attend
from vitft_jax.methods import Variables
from vitft_jax.vit import ViT


class _Listener:
    """An attention that notes its probabilities: those of any `attend` are what it returns where the values are I."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.heard: Array | None = None

    def __call__(self, q: Array, k: Array, v: Array, keys: Array | None = None) -> Array:
        eye = jnp.eye(k.shape[2], dtype=jnp.float32)
        self.heard = self.attend(q, k, jnp.broadcast_to(eye, (*k.shape[:2], *eye.shape)), keys).mean(axis=1)
        return self.attend(q, k, v, keys)


class _Roll:
    """A selector that multiplies what a `_Listener` heard in each block, and does to tokens what `select` does."""

    def __init__(self, listener: _Listener, select: Any) -> None:
        self.listener, self.select = listener, select
        self.rows = self.keys = None

    def wants_rows(self, block: int) -> bool:
        return self.select is not None and self.select.wants_rows(block)

    def __call__(self, block: int, x: Array, rows: Array | None, carry: Any) -> tuple[Array, Array | None, Any]:
        heard = self.listener.heard  # (B, tokens that leave the block, all)
        start = jnp.broadcast_to(jnp.eye(heard.shape[2]), (heard.shape[0], *[heard.shape[2]] * 2))
        rolled, of_tokens, of_rows = carry or (start, None, None)
        rolled = jnp.matmul(_shares(heard + jnp.eye(*heard.shape[1:])), rolled, precision=lax.Precision.HIGHEST)
        keys = None
        if self.select is not None:
            x, keys, of_tokens = self.select(block, x, rows, of_tokens)
            rolled, _, of_rows = self.select(block, rolled, rows, of_rows)
            rolled = _shares(rolled)  # a fused token is a sum
        self.rows, self.keys = rolled, keys
        return x, keys, (rolled, of_tokens, of_rows)


def _shares(rows: Array) -> Array:
    """Rows that sum to 1; those of the attention in int8 do so to its rounding only."""
    return rows / rows.sum(axis=-1, keepdims=True)


def rollout(model: ViT, variables: Variables, images: Array) -> Array:
    """Shares of the input tokens in what the head reads.

    That is the class token (of DeiT with two heads the mean of both special tokens), the mean of the patch tokens that are
    left, or for 'cls+mean' the mean of the two.

    Args:
        model: Any, with the products, the attention and the selector of its methods.
        variables: Of the model.
        images: Normalised, `(B, S, S, 3)`.

    Returns:
        `(B, P + patches)` in float32, none negative, each row sums to 1: prefix tokens first, then patches in rows of the
        image.
    """
    listener = _Listener(model.attend or attention.attend)
    roll = _Roll(listener, model.select)
    model.clone(attend=listener, select=roll, remat="none").apply(variables, images)
    rows, prefix = roll.rows, model.prefix
    where = None if roll.keys is None else roll.keys[:, prefix:, None]
    heads = 2 if model.distilled and model.dist_head else 1
    read = {"cls": lambda: rows[:, :heads].mean(axis=1), "mean": lambda: rows[:, prefix:].mean(axis=1, where=where)}
    parts = [read[part]() for part in model.features.split("+")]
    return sum(parts) / len(parts)
