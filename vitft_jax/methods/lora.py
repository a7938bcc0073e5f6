"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    y = x W + s (drop(x) A) B        A: (in, r),  B: (r, out),  s = alpha / r

A starts uniform in +-1/sqrt(in) and B at zero, so a fresh adapter changes nothing. W + BA is never formed while training:
the frozen kernel gets no gradient, and the step costs two thin products per layer. rsLoRA (Kalajdzievski 2023) scales by
alpha / sqrt(r); LoRA+ (Hayou et al. 2024) trains B at a higher rate than A.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jax import Array

from vitft_jax import tree
from vitft_jax.errors import InputError
from vitft_jax.methods import DotGeneralCls, Method, Variables
from vitft_jax.product import matmul

COLLECTION = "lora"
TARGETS = {
    "qv": r"attn/(query|value)$",
    "qkv": r"attn/(query|key|value)$",
    "encoder": r"attn/(query|key|value|out)$|mlp/fc[12]$",
}
"""Sets of linear layers by name: regexes on module paths such as 'blocks_0/attn/query'."""

_init_a = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class Settings:
    """Which layers get an adapter of which rank, and its scale.

    Attributes:
        rank: Rank r of the adapters.
        alpha: Numerator of the scale.
        targets: Regex on the path of a linear layer.
        dropout: Probability that an input of the adapter is dropped; the frozen branch sees the whole input.
        rank_pattern: Rules ``(regex, rank)``; the first that is found in a layer's path replaces `rank`, and 0 leaves the
            layer alone.
        rs: Scale by alpha / sqrt(r).
    """

    rank: int
    alpha: float
    targets: str
    dropout: float = 0.0
    rank_pattern: tuple[tuple[str, int], ...] = ()
    rs: bool = False

    def rank_at(self, path: str) -> int:
        """Rank of the adapter at the linear layer `path`; 0 where there is none."""
        return tree.first_match(self.rank_pattern, path, self.rank) if re.search(self.targets, path) else 0

    def scale(self, rank: int) -> float:
        """The factor s of an adapter of this rank."""
        return self.alpha / (math.sqrt(rank) if self.rs else rank)


class LoraDot(nn.Module):
    """A product with an adapter beside it; stands in for `lax.dot_general` inside a linear layer.

    Dropout is on where an rng named 'dropout' is given, that is, while training.
    """

    settings: Settings
    base: DotGeneralCls

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        y = self.base()(x, kernel, dimensions, **kwargs)
        if not self.rank:
            return y
        return y + self.low(self.drop(x), *self.factors(kernel))

    @property
    def rank(self) -> int:
        """Rank of the adapter here; 0 where there is none."""
        return self.settings.rank_at("/".join(self.path[:-1]))

    def factors(self, kernel: Array) -> tuple[Array, Array]:
        """The variables A and B, in float32."""

        def draw(init: Callable[..., Array], shape: tuple[int, ...]) -> Array:
            return init(self.make_rng("params"), shape, jnp.float32)

        a = self.variable(COLLECTION, "a", draw, _init_a, (kernel.shape[0], self.rank)).value
        b = self.variable(COLLECTION, "b", draw, nn.initializers.zeros, (self.rank, kernel.shape[1])).value
        return a, b

    def drop(self, x: Array) -> Array:
        """The input of the adapter."""
        return nn.Dropout(self.settings.dropout, deterministic=not self.has_rng("dropout"))(x)

    def low(self, x: Array, a: Array, b: Array) -> Array:
        """The output of the adapter, s (x A) B, in the dtype of x."""
        # Scaling the thin product costs (tokens x r), scaling the sum would cost (tokens x out).
        return matmul(matmul(x, a.astype(x.dtype)) * self.settings.scale(self.rank), b.astype(x.dtype))


def delta(adapter: dict[str, Array], settings: Settings) -> Array:
    """The change of a kernel that an adapter ``{a, b}`` stands for: s A B, `(in, out)`."""
    return settings.scale(adapter["a"].shape[1]) * (adapter["a"] @ adapter["b"])


def map_layers(function: Callable[..., tuple[Any, dict[str, Any]]], variables: Variables) -> dict[str, Any]:
    """Rewrites every layer with an adapter: ``function(path, kernel, adapter) -> (kernel, adapter)``.

    Raises:
        InputError: A kernel is stored in integers.
    """
    params, leaves = tree.flatten(variables["params"]), tree.flatten(variables[COLLECTION])
    adapters: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        path, part = name.split("/dot/")  # '<path of the linear layer>/dot/a'
        adapters.setdefault(path, {})[part] = leaf
    for path, adapter in adapters.items():
        if jnp.issubdtype(params[f"{path}/kernel"].dtype, jnp.integer):
            raise InputError(
                f"this adapter reads the kernel of {path} in float, and quant.base='int8' stores it in integers; "
                "use lora or adalora, or quant.base='float'"
            )
        params[f"{path}/kernel"], adapter = function(path, params[f"{path}/kernel"], adapter)
        leaves |= {f"{path}/dot/{part}": leaf for part, leaf in adapter.items()}
    return {**variables, "params": tree.unflatten(params), COLLECTION: tree.unflatten(leaves)}


def fold(kernel_of: Callable[[Array, dict[str, Array]], Array], variables: Variables) -> dict[str, Any]:
    """Variables without adapters, where ``kernel_of(kernel, adapter)`` is the kernel of each layer that had one.

    The variables given stay as they are: keep them to go back, since subtracting is exact only up to rounding.
    """

    def function(path: str, kernel: Array, adapter: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return kernel_of(kernel, adapter).astype(kernel.dtype), adapter

    folded = map_layers(function, variables)
    return {name: value for name, value in folded.items() if name != COLLECTION}


def merge(variables: Variables, settings: Settings) -> Variables:
    """Folds the adapters into the kernels: W + s A B."""
    return fold(lambda kernel, adapter: kernel + delta(adapter, settings), variables)


def scale_b(ratio: float) -> optax.GradientTransformation:
    """LoRA+: multiplies the finished update of every B by `ratio`, which is the same as its learning rate.

    So it does with DoRA's magnitudes, as PEFT. The head keeps its rate, where PEFT raises that of its bias alone.
    """

    def scale(updates: Any) -> Any:
        return tree.map_named(lambda name, u: u * ratio if re.search(f"^{COLLECTION}/.*/[bm]$", name) else u, updates)

    return optax.stateless(lambda updates, params: scale(updates))


def targets_of(group: str, targets: str) -> str:
    """The regex that a value of ``targets`` stands for.

    Raises:
        InputError: It is empty, which as a regex would match every layer.
    """
    if not targets:
        raise InputError(
            f"{group}.targets='': would match every layer; one of {sorted(TARGETS)}, or a regex such as '.'"
        )
    return TARGETS.get(targets, targets)


def settings_of(config: Any) -> Settings:
    """The settings in ``config.lora``.

    Raises:
        InputError: A setting is out of range, or a regex does not compile.
    """
    c = config.lora
    for pair in c.rank_pattern:
        if not (isinstance(pair, tuple) and [type(part) for part in pair] == [str, int]):
            raise InputError(f"lora.rank_pattern={c.rank_pattern}: pairs of a regex and a rank, such as (('fc1', 4),)")
    if c.rank < 1 or any(rank < 0 for _, rank in c.rank_pattern):
        raise InputError(
            f"lora.rank={c.rank}, lora.rank_pattern={c.rank_pattern}: a rank is at least 1 (0 in a pattern)"
        )
    if c.alpha <= 0:
        raise InputError(f"lora.alpha={c.alpha}: above 0; the adapters are scaled by it")
    if not 0 <= c.dropout < 1:
        raise InputError(f"lora.dropout={c.dropout}: a probability below 1")
    if c.lr_ratio < 1:
        raise InputError(f"lora.lr_ratio={c.lr_ratio}: LoRA+ trains B at least as fast as A; 1 is off")
    targets = targets_of("lora", c.targets)
    for pattern in (targets, *(p for p, _ in c.rank_pattern)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"lora: {pattern!r} is none of {sorted(TARGETS)} and no regex: {error}") from None
    return Settings(c.rank, c.alpha, targets, c.dropout, c.rank_pattern, c.rs)


def method(config: Any) -> Method:
    """Builds LoRA from ``config.lora``.

    Raises:
        InputError: As `settings_of`.
    """
    settings, ratio = settings_of(config), config.lora.lr_ratio

    def wrap_tx(tx: optax.GradientTransformation, total_steps: int) -> optax.GradientTransformation:
        return optax.chain(tx, scale_b(ratio)) if ratio != 1 else tx

    return Method(
        collections=(COLLECTION,),
        sharding=((r"/dot/a$", ("in", None)), (r"/dot/b$", (None, "out"))),
        dot=lambda base: partial(LoraDot, settings, base, name="dot"),
        wrap_tx=wrap_tx,
        merge=partial(merge, settings=settings),
    )
