"""Quantisation of the linear layers in the blocks: int8 products, in training and after (Jacob et al. 2018, arXiv:1712.05877).

    y = s_x s_w (q_x q_w)        q: int8, summed in int32;   s_x per token,   s_w per output channel

Two kinds of base, by ``quant.base``:

- 'float', quantisation-aware training: kernels stay float32 and are quantised anew in every forward pass, by AQT; gradients
  are those of the quantised product, straight through the rounding. With ``quant.static`` the ranges of activations are
  calibrated before step 0, and stay.
- 'int8': kernels that do not train are int8 arrays in `params` themselves, with their scales in the collection `quant`.
  Before step 0 the float kernels are read once and let go. Adapters train in float beside the integers.
  `vitft_jax.quantize` writes runs of this kind.

Either way it is the kernel in float32 that is quantised, whatever the model computes in.

AQT differentiates its training products only, not its products with stored integers, so the second kind is our own
`quantizer.frozen_product`. All that comes from AQT is the forward pass of `trained_product`: its backward pass reads operands
along columns, see `product`. `quantizer.trained_product` is the same in plain JAX.

With ``quant.attention`` the two products of attention are int8 too (`quantized_attention`), in either kind. The head and the
patch embedding stay in float by default, and LayerNorm, softmax and GELU always do.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from aqt.jax.v2 import config as aqt
from aqt.jax.v2.calibration import ConstantCalibration
from jax import Array

from vitft_jax import quantized_attention, quantizer, tree
from vitft_jax.errors import InputError
from vitft_jax.methods import DotGeneralCls, Method, Variables
from vitft_jax.ptq import ranges
from vitft_jax.ptq.observe import Seen
from vitft_jax.quantizer import Product, Quantised

COLLECTION = "quant"
BASES = ("float", "int8")


@dataclass(frozen=True)
class Settings:
    """What is quantised, and how.

    Attributes:
        bits: Of kernels, 8 or 4; activations have 8.
        weight_only: Leaves activations in float.
        static: One range per layer, calibrated before step 0 or by `vitft_jax.quantize`, instead of one per token.
        attention: Also the products of attention.
        base: See the module.
        skip_layers: Regex on paths of linear layers that stay in float; '' for none.
    """

    bits: int = 8
    weight_only: bool = False
    static: bool = False
    attention: bool = False
    base: str = "float"
    skip_layers: str = "^(embed|head)"

    def converts(self, path: str) -> bool:
        """Whether the linear layer `path`, such as 'blocks_0/attn/query', is quantised."""
        return not (self.skip_layers and re.search(self.skip_layers, path))


@cache
def trained_product(bits: int, weight_only: bool) -> Product:
    """`quantizer.trained_product` with AQT's forward pass; `weight_only` multiplies no integers, and is our own."""
    if weight_only:
        return quantizer.trained_product(bits, weight_only)

    def multiply(x: Array, kernel: Array, bound: Array | None) -> Array:
        c = aqt.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
        aqt.set_bits(c, 8, bits, None, None, None, None)
        aqt.set_stochastic_rounding(c, False, False, "jax.uniform")
        aqt.set_scale_and_bias_dtype(c, jnp.float32)
        if bound is not None:
            # AQT asks for a scale of the rank of x, and would take 0 for a range.
            largest = jnp.where(bound == 0, 1.0, bound).reshape((1,) * x.ndim)
            c.fwd.dg_quantizer.lhs.calibration = partial(ConstantCalibration, bound=largest)
        # It wants both in one dtype, and in bfloat16 would round the sums before it scales them.
        wide = (a.astype(jnp.float32) for a in (x, kernel))
        return c(*wide, (((x.ndim - 1,), (0,)), ((), ()))).astype(x.dtype)

    return quantizer.trained_product(bits, multiply=multiply)


class QuantDot(nn.Module):
    """A quantised product; stands in for `lax.dot_general` inside a linear layer."""

    settings: Settings
    base: DotGeneralCls

    @nn.compact
    def __call__(self, x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
        """Maps x `(..., in)` and a kernel `(in, out)` to `(..., out)`."""
        s = self.settings
        if not s.converts(layer_of("/".join(self.path))):
            return self.base()(x, kernel, dimensions, **kwargs)
        bound = self.variable(COLLECTION, "bound", partial(jnp.full, (), jnp.nan)).value if s.static else None
        if s.base == "float":
            return trained_product(s.bits, s.weight_only)(x, kernel, bound)
        scale = self.variable(COLLECTION, "scale", jnp.ones, kernel.shape[1]).value
        if self.is_initializing():  # the kernel is still float
            return self.base()(x, kernel, dimensions, **kwargs)
        return quantizer.frozen_product(x, Quantised(kernel, scale), bound, s.weight_only)


def layer_of(path: str) -> str:
    """The path of the linear layer whose product is quantised at `path`, alone or inside an adapter's product."""
    return path.removesuffix("/quant").removesuffix("/dot")


def _scales(variables: Variables) -> Iterator[tuple[str, str]]:
    """Pairs of the name of a scale in the collection and the path of its layer."""
    for name in tree.flatten(variables.get(COLLECTION, {})):
        if name.endswith("/scale"):
            yield name, layer_of(name.removesuffix("/scale"))


def layers(variables: Variables) -> list[str]:
    """Paths of the layers whose kernels are integers."""
    return [path for _, path in _scales(variables)]


def insert(variables: Variables, kernels: dict[str, Quantised], bounds: dict[str, Array] | None = None) -> Variables:
    """Puts integers in the place of kernels: `kernels` and static `bounds` by path of a layer."""
    params, leaves = tree.flatten(variables["params"]), tree.flatten(variables[COLLECTION])
    for name, path in _scales(variables):
        params[f"{path}/kernel"], leaves[name] = kernels[path]
        if bounds is not None:
            leaves[f"{name.removesuffix('/scale')}/bound"] = bounds[path]
    return {**variables, "params": tree.unflatten(params), COLLECTION: tree.unflatten(leaves)}


def prepare(variables: Variables, settings: Settings, trainable: str) -> Variables:
    """Replaces every kernel that is quantised and frozen by integers.

    Raises:
        InputError: A kernel is to train, no layer is quantised, or static ranges are asked for, which only calibration has.
    """
    if not (settings.attention and settings.base == "float" and not settings.static):  # then attention may be all of it
        names = tree.flatten(variables["params"])
        if not any(n.endswith("/kernel") and settings.converts(n.removesuffix("/kernel")) for n in names):
            raise InputError(
                f"quant.skip_layers={settings.skip_layers!r} skips every linear layer: nothing is quantised"
            )
    if settings.base != "int8":
        return variables
    if settings.static:
        raise InputError(
            "quant.static=True: no ranges were calibrated for this model. `python -m vitft_jax.quantize --static` "
            "calibrates a trained run; to train, use quant.static=False or quant.base='float'"
        )
    paths = layers(variables)
    for path in paths:
        if re.search(trainable, f"{path}/kernel"):
            raise InputError(
                f"train.trainable={trainable!r} trains the kernel of {path}, which quant.base='int8' stores in integers. "
                "Use quant.base='float' to train it, or a narrower train.trainable"
            )
    params = tree.flatten(variables["params"])
    return insert(
        variables,
        {path: quantizer.quantise_kernel(jnp.asarray(params[f"{path}/kernel"]), settings.bits) for path in paths},
    )


def calibrate(variables: Variables, seen: Mapping[str, Seen]) -> Variables:
    """Gives every static range of a float base the value with the least squared error (`ptq.ranges.least_error`)."""

    def bound(name: str, leaf: Array) -> Array:
        return ranges.least_error(seen[layer_of(name.removesuffix("/bound"))])

    if COLLECTION not in variables:  # nothing is quantised
        return variables
    return {**variables, COLLECTION: tree.map_named(bound, variables[COLLECTION])}


def merge(variables: Variables) -> Variables:
    """Float32 kernels in the place of integers, without the collection; kernels of a float base stay as they are."""
    if COLLECTION not in variables:
        return variables
    params, leaves = tree.flatten(variables["params"]), tree.flatten(variables[COLLECTION])
    for name, path in _scales(variables):
        params[f"{path}/kernel"] = quantizer.dequantise(Quantised(params[f"{path}/kernel"], leaves[name]))
    rest = {collection: value for collection, value in variables.items() if collection != COLLECTION}
    return {**rest, "params": tree.unflatten(params)}


def settings_of(config: Any) -> Settings:
    """The settings in ``config.quant``.

    Raises:
        InputError: A setting is out of range, two exclude each other, or the regex does not compile.
    """
    c = config.quant
    if c.bits not in (4, 8):
        raise InputError(f"quant.bits={c.bits}: 8 or 4")
    if c.base not in BASES:
        raise InputError(f"quant.base={c.base!r}: one of {', '.join(map(repr, BASES))}")
    if c.static and c.weight_only:
        raise InputError("quant.static=True: ranges are of activations, which quant.weight_only leaves in float")
    if c.attention and c.weight_only:
        raise InputError(
            "quant.attention=True: its products are of activations, which quant.weight_only leaves in float"
        )
    try:
        re.compile(c.skip_layers)
    except re.error as error:
        raise InputError(f"quant.skip_layers={c.skip_layers!r}: no regex: {error}") from None
    return Settings(c.bits, c.weight_only, c.static, c.attention, c.base, c.skip_layers)


def method(config: Any) -> Method:
    """Builds quantisation from ``config.quant``.

    Raises:
        InputError: As `settings_of`; or another method comes before this one.
    """
    if config.methods[0] != "quant":
        raise InputError(f"config.methods={config.methods}: 'quant' comes first, since others add to its product")
    settings = settings_of(config)
    calibrated = settings.static and settings.base == "float"
    scale, bound = (r"/quant/scale$", ("out",)), (r"/quant/bound$", ())
    return Method(
        ranges=(COLLECTION,) if calibrated else (),
        sharding=(scale,) * (settings.base == "int8") + (bound,) * settings.static,
        dot=lambda base: partial(QuantDot, settings, base, name="quant"),
        attend=quantized_attention.attend if settings.attention else None,
        prepare=partial(prepare, settings=settings, trainable=config.train.trainable),
        calibrate=calibrate if calibrated else lambda variables, seen: variables,
        merge=merge,
    )
