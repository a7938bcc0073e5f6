"""Token skipping: patch tokens that the class token does not attend to leave the encoder, for good or for some blocks.

After block s the score of a token is the attention that the class token pays to it there, the mean over heads (with a
distillation token, over both rows). The k best go on in their order, behind the prefix tokens, which always go on:

    k = max(1, ceil((1 - drop_ratio) n))        n: patch tokens before the split

The others are pruned for good (as in EViT, Liang et al. 2022, which can `fuse` them into one token, the sum of score times
token), or skip some blocks and rejoin unchanged (SkipViT, Ataiefard et al. 2024). Splits lie between blocks, EViT's in the
middle of one. Counts are Python integers, so shapes are static and the blocks after a split cost less. The indices carry
no gradient.

Mode 'mask' computes the same with all tokens in place, at the dense cost: those out of the stream are no keys, and keep
their values. It is the reference for 'gather'.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from vitft_jax.errors import InputError
from vitft_jax.methods import Method, Variables

MODES = ("gather", "mask")
PHASES = 4  # of the warm-up: each compiles a step of its own


@dataclass(frozen=True)
class Split:
    """Where tokens leave.

    Attributes:
        after: Block after which they leave.
        drop_ratio: Share of the patch tokens that leaves.
        keep: Number of patch tokens that go on, in place of the ratio; 0 = by the ratio.
        rejoin: Block before which they come back (the depth of the model: after its last block); None = never.
    """

    after: int
    drop_ratio: float
    keep: int = 0
    rejoin: int | None = None

    def count(self, n: int) -> int:
        """How many of `n` patch tokens go on."""
        # 0.55 * 100 is 55.000000000000007 in floating point: without the small term one token too many.
        return self.keep or max(1, math.ceil((1 - self.drop_ratio) * n - 1e-9))


@dataclass(frozen=True)
class Stream:
    """The tokens between two splits.

    Attributes:
        n: Number of those behind the prefix.
        total: Number of places: the tokens of the image, and one for each fused token.
        place: 'gather': their places, `(B, P + n)`.
        live: 'mask': which places are in the stream, bool `(B, total)`; None = all.
        x: 'mask': what went into the next block, `(B, total, D)`.
        rest: 'gather': the tokens that left and will rejoin, `(B, R, D)`.
        order: 'gather': the permutation of the tokens of `outer` that gave the stream followed by `rest`, `(B, P + n + R)`.
        inverse: 'gather': its inverse.
        rejoin: Block before which the stream ends; None = never.
        outer: The stream that goes on then.
    """

    n: int
    total: int
    place: Array | None = None
    live: Array | None = None
    x: Array | None = None
    rest: Array | None = None
    order: Array | None = None
    inverse: Array | None = None
    rejoin: int | None = None
    outer: "Stream | None" = None

    def kept(self) -> Array | None:
        """Which places are in the stream, bool `(B, total)`; None = all."""
        if self.place is None:
            return self.live
        return (self.place[:, :, None] == jnp.arange(self.total)).any(axis=1)


@dataclass(frozen=True)
class Skip:
    """The selector (`vit.Select`).

    Attributes:
        splits: In the order of the blocks.
        fuse: Append the sum of score times token over those that leave.
        mode: 'gather' or 'mask'.
        slack: Share of the tokens to drop that stays after all; above 0 in the warm-up.
    """

    splits: tuple[Split, ...]
    fuse: bool = False
    mode: str = "gather"
    slack: float = 0.0

    def wants_rows(self, block: int) -> bool:
        """The blocks before a split give the score."""
        return any(split.after == block for split in self.splits)

    def count(self, split: Split, n: int) -> int:
        """How many of `n` patch tokens go on."""
        k = split.count(n)
        return k + round(self.slack * (n - k))

    def counts(self, patches: int) -> list[tuple[int, int]]:
        """Tokens behind the prefix before and after each split (without the one it fuses), of so many patches."""
        n, outer, found = patches, [], []
        for split in self.splits:
            while outer and outer[-1][0] <= split.after:
                n = outer.pop()[1]
            k = self.count(split, n)
            found.append((n, k))
            if split.rejoin is not None:
                outer.append((split.rejoin, n))
            n = k + (self.fuse and k < n)
        return found

    def __call__(
        self, block: int, x: Array, rows: Array | None, carry: Stream | None
    ) -> tuple[Array, Array | None, Stream | None]:
        """Puts the tokens together again that rejoin after `block`, and splits them where a split is."""
        stream = carry
        if stream is not None and stream.live is not None:
            x = jnp.where(stream.live[:, : x.shape[1], None], x, stream.x[:, : x.shape[1]])
        while stream is not None and stream.rejoin == block + 1:
            if stream.rest is not None:
                x = _permute(jnp.concatenate([x, stream.rest], axis=1), stream.inverse, stream.order)
            stream = stream.outer
        for split in self.splits:
            if split.after == block:
                x, stream = self._split(split, x, rows, stream)
        if stream is not None and self.mode == "mask":
            stream = replace(stream, x=x)
        return x, None if stream is None else stream.live, stream

    def _split(self, split: Split, x: Array, rows: Array, stream: Stream | None) -> tuple[Array, Stream]:
        batch, total, _ = x.shape
        prefix = rows.shape[2]
        if stream is None:
            place = jnp.broadcast_to(jnp.arange(total), (batch, total)) if self.mode == "gather" else None
            stream = Stream(total - prefix, total, place)
        k = self.count(split, stream.n)
        if k >= stream.n:
            return x, stream
        score = rows.mean(axis=(1, 2))
        kept = best(score, prefix, k, stream.live)
        fused = None
        if self.fuse:
            left = ~kept if stream.live is None else stream.live & ~kept
            fused = jnp.einsum("bn,bnd->bd", jnp.where(left, score, 0).astype(x.dtype), x)[:, None]

        inner = Stream(k, stream.total, rejoin=split.rejoin, outer=None if split.rejoin is None else stream)
        if self.mode == "mask":
            inner = replace(inner, live=kept)
        else:
            order, inverse = partition(kept, prefix + k)
            ordered = _permute(x, order, inverse)
            x = ordered[:, : prefix + k]
            inner = replace(inner, place=jnp.take_along_axis(stream.place, order[:, : prefix + k], axis=1))
            if split.rejoin is not None:
                inner = replace(inner, rest=ordered[:, prefix + k :], order=order, inverse=inverse)
        return (x, inner) if fused is None else _append(x, inner, fused)


def _append(x: Array, stream: Stream, fused: Array) -> tuple[Array, Stream]:
    """Appends the fused token `(B, 1, D)` as one more token of the stream, at a place of its own."""

    def wider(known: Array | None, value: int) -> Array | None:
        new = jnp.full((x.shape[0], 1), value)
        return None if known is None else jnp.concatenate([known, new.astype(known.dtype)], axis=1)

    stream = replace(
        stream,
        n=stream.n + 1,
        total=stream.total + 1,
        place=wider(stream.place, stream.total),
        live=wider(stream.live, 1),
    )
    return jnp.concatenate([x, fused], axis=1), stream


def best(score: Array, prefix: int, k: int, live: Array | None = None) -> Array:
    """Which tokens go on, bool `(B, N)`: the prefix and the `k` of highest score; of equal ones the first.

    Args:
        score: `(B, N)`, none negative.
        prefix: Number of prefix tokens.
        k: Number of others.
        live: Which to choose from, bool `(B, N)`; None = all.
    """
    places = jnp.arange(score.shape[1])
    score = score if live is None else jnp.where(live, score, -1)
    score = lax.stop_gradient(jnp.where(places < prefix, jnp.inf, score))
    chosen = jnp.argsort(-score, axis=1)[:, : prefix + k]  # of a mesh, lax.top_k would gather the scores of all images
    return (chosen[:, :, None] == places).any(axis=1)


def partition(kept: Array, count: int) -> tuple[Array, Array]:
    """The permutation that puts those kept first, both parts in their order, and its inverse; int32 `(B, N)`.

    Args:
        kept: bool `(B, N)`, true `count` times in each row.
        count: Number of those kept.
    """
    inverse = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, count + jnp.cumsum(~kept, axis=1) - 1)
    return jnp.argsort(inverse), inverse


@jax.custom_vjp
def _permute(x: Array, order: Array, inverse: Array) -> Array:
    """Tokens `x` `(B, N, D)` in the given order.

    Its gradient is taken by the inverse: autodiff would scatter, which a CPU does one row after the other.
    """
    return jnp.take_along_axis(x, order[:, :, None], axis=1, mode="promise_in_bounds")


def _permute_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    order, inverse = residuals
    return _permute(g, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


class _Spy:
    """A selector that notes the stream after each split."""

    def __init__(self, select: Skip) -> None:
        self.select, self.wants_rows, self.seen = select, select.wants_rows, {}

    def __call__(self, block: int, x: Array, rows: Array | None, carry: Any) -> tuple[Array, Array | None, Any]:
        x, keys, stream = self.select(block, x, rows, carry)
        if rows is not None:
            self.seen[block] = stream
        return x, keys, stream


def kept_patches(model: Any, variables: Variables, images: Array) -> dict[int, Array]:
    """Which patches of normalised images `(B, S, S, 3)` go on after each split: bool `(B, patches)` by block."""
    spy = _Spy(model.select)
    model.clone(select=spy).apply(variables, images)
    patches = images.shape[1] // model.patch * (images.shape[2] // model.patch)
    here = slice(model.prefix, model.prefix + patches)
    every = jnp.ones((images.shape[0], model.prefix + patches), bool)
    masks = {block: stream.kept() for block, stream in spy.seen.items()}
    return {block: (every if kept is None else kept)[:, here] for block, kept in masks.items()}


def check(select: Skip, model: Any, patches: int) -> None:
    """Refuses a model, or a number of patch tokens, on which the splits make no sense.

    Raises:
        InputError: The class token is not read, a split or a rejoin lies where it has no effect or beyond the model, or
            there are fewer tokens than shall be kept.
    """
    if "cls" not in model.features.split("+"):
        raise InputError(
            f"skip: the head of this model reads {model.features!r}, not the class token, whose attention is the score; "
            "set model.features to 'cls' or 'cls+mean', or take 'skip' out of config.methods"
        )
    for split in select.splits:
        if split.after >= model.depth - 1:
            raise InputError(
                f"skip.layers: a split after block {split.after}: the model has the blocks 0 to {model.depth - 1}, and "
                f"after the last one nothing is left to save; at most {model.depth - 2}"
            )
        if split.rejoin is not None and split.rejoin > model.depth:
            raise InputError(
                f"skip.rejoin: before block {split.rejoin}, but the model has {model.depth} blocks; at most {model.depth}"
            )
        if split.rejoin == model.depth and model.features == "cls":
            raise InputError(
                f"skip.rejoin: {model.depth} is after the last block, where the head reads the class token alone; "
                f"at most {model.depth - 1}, or None to prune for good"
            )
    for split, (n, k) in zip(select.splits, select.counts(patches), strict=True):
        if k > n:
            raise InputError(f"skip.keep: {k} tokens after block {split.after}, where {n} are left; at most {n}")


def phases(select: Skip, share: float, total_steps: int) -> tuple[tuple[int, Skip], ...]:
    """The warm-up: selectors that drop less, each with the step at which it ends.

    The kept share falls from 1 to its value along a cosine, as EViT's does, in `PHASES` equal stairs.
    """
    steps = round(share * total_steps)
    slack = [(1 + math.cos(math.pi * (i + 0.5) / PHASES)) / 2 for i in range(PHASES)]
    ends = [round(steps * (i + 1) / PHASES) for i in range(PHASES)]
    return tuple((end, replace(select, slack=s)) for end, s in zip(ends, slack, strict=True)) if steps else ()


def selector(c: Any) -> Skip:
    """Builds the selector from ``config.skip``.

    Raises:
        InputError: A setting is out of range, or settings contradict each other.
    """
    if c.mode not in MODES:
        raise InputError(f"skip.mode={c.mode!r}: one of {', '.join(map(repr, MODES))}")
    if not c.layers or any(type(block) is not int or block < 0 for block in c.layers):
        raise InputError(f"skip.layers={c.layers}: numbers of blocks, from 0, after which tokens leave; at least one")
    if any(a >= b for a, b in zip(c.layers, c.layers[1:], strict=False)):
        raise InputError(f"skip.layers={c.layers}: out of order; each block once, rising")
    if any(type(ratio) not in (int, float) or not 0 <= ratio < 1 for ratio in c.drop_ratio):
        raise InputError(f"skip.drop_ratio={c.drop_ratio}: at least 0 and below 1")
    if any(type(k) is not int or k < 1 for k in c.keep):
        raise InputError(f"skip.keep={c.keep}: numbers of patch tokens, at least 1")
    if not 0 <= c.warmup < 1:
        raise InputError(f"skip.warmup={c.warmup}: a share of the steps, at least 0 and below 1")
    ratios = _each(c, "drop_ratio") if not c.keep else (0.0,) * len(c.layers)
    keeps = _each(c, "keep") if c.keep else (0,) * len(c.layers)
    rejoins = _each(c, "rejoin") if c.rejoin else (None,) * len(c.layers)
    if c.fuse and any(block is not None for block in rejoins):
        raise InputError("skip.fuse with skip.rejoin: tokens that come back would count twice; choose one")
    splits = tuple(map(Split, c.layers, ratios, keeps, rejoins))
    _check_rejoins(splits)
    return Skip(splits, c.fuse, c.mode)


def _each(c: Any, key: str) -> tuple[Any, ...]:
    """One value a split, of one for all or one for each."""
    values = c[key]
    if len(values) not in (1, len(c.layers)):
        raise InputError(
            f"skip.{key}={values}: one value, or one for each of the {len(c.layers)} splits in skip.layers"
        )
    return values * len(c.layers) if len(values) == 1 else values


def _check_rejoins(splits: tuple[Split, ...]) -> None:
    """Refuses a rejoin before its split, and splits inside one another that do not close in turn."""
    for i, split in enumerate(splits):
        if split.rejoin is None:
            continue
        if type(split.rejoin) is not int or split.rejoin < split.after + 2:
            raise InputError(
                f"skip.rejoin={split.rejoin} for the split after block {split.after}: tokens rejoin before a block, and "
                f"have skipped at least one then; at least {split.after + 2}, or None"
            )
        for inner in splits[i + 1 :]:
            if inner.after + 1 == split.rejoin:
                raise InputError(
                    f"skip.layers: a split after block {inner.after}, where tokens rejoin that have no score there; "
                    f"split after block {inner.after + 1}, or let them rejoin at another block"
                )
            if inner.after < split.rejoin and (inner.rejoin is None or inner.rejoin > split.rejoin):
                raise InputError(
                    f"skip.rejoin: the split after block {inner.after} lies inside the one from block {split.after} to "
                    f"{split.rejoin} and must rejoin by then; it has {inner.rejoin}"
                )


def method(config: Any) -> Method:
    """Builds token skipping from ``config.skip``.

    Raises:
        InputError: A setting is out of range, or settings contradict each other.
    """
    select = selector(config.skip)
    return Method(
        select=select,
        phases=partial(phases, select, config.skip.warmup),
        check=partial(check, select),
        patches=kept_patches,
    )
