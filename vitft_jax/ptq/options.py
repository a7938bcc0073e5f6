"""What `vitft_jax.quantize` is to do: its options, what they are for a run unless told otherwise, and its flags."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.methods import quant
from vitft_jax.ptq import calibration, ranges
from vitft_jax.ptq.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
        recipe: Stages.
        bits: Of kernels, 8 or 4.
        weight_only: Leaves activations in float.
        attention: Also the products of attention in int8.
        skip_layers: Regex on paths of linear layers that stay in float; '' for none.
        images: Calibration images.
        calibration: Where they come from, see `calibration.images_from`: the training split there; '' = that of the run.
        max_drop: Percentage points that the first metric (accuracy) may fall on the validation split: the most sensitive
            layers stay in float until it falls no further. None for no limit.
        sensitivity_images: Images on which every layer is left out once; 0 to leave that away.
    """

    recipe: Recipe = field(default_factory=Recipe)
    bits: int = 8
    weight_only: bool = False
    attention: bool = False
    skip_layers: str = "^(embed|head)"
    images: int = calibration.IMAGES
    calibration: str = ""
    max_drop: float | None = None
    sensitivity_images: int = 32


def defaults(config: Config) -> Options:
    """What is done with a run of this config unless told otherwise: one that trained in int8 becomes what it trained to be."""
    if not trained_in_int8(config):
        return Options()
    settings = quant.settings_of(config)
    return Options(
        Recipe(smooth=False, clip=False, correct=False, static=ranges.TRAINED if settings.static else ""),
        bits=settings.bits,
        weight_only=settings.weight_only,
        attention=settings.attention,
        skip_layers=settings.skip_layers,
    )


def trained_in_int8(config: Config) -> bool:
    """Whether the products of a run were int8 over kernels that are float."""
    return "quant" in config.methods and config.quant.base == "float"


def check(options: Options) -> None:
    """Refuses what can be seen to be wrong before anything is read.

    Raises:
        InputError: A value is out of range, or two contradict each other; the flags are named.
    """
    if options.max_drop is not None and not (options.max_drop >= 0 and options.sensitivity_images):
        raise InputError(
            f"--max_drop {options.max_drop} with --sensitivity_images {options.sensitivity_images}: the limit is at least "
            "0, and which layers are sensitive must be measured"
        )
    if options.images < calibration.FEWEST or options.sensitivity_images < 0:
        raise InputError(
            f"--images {options.images} --sensitivity_images {options.sensitivity_images}: at least "
            f"{calibration.FEWEST} and 0"
        )
    if options.bits not in (4, 8):
        raise InputError(f"--bits {options.bits}: 8 or 4")
    static = options.recipe.static
    if static and options.weight_only:
        raise InputError(f"--static {static} with --weight_only: ranges are of activations, which stay in float")
    if options.attention and options.weight_only:
        raise InputError("--attention with --weight_only: its products are of activations, which stay in float")
    if static and static != ranges.TRAINED:
        ranges.share(static)
    if static == ranges.TRAINED and options.recipe.smooth:
        raise InputError(f"--smooth with --static {static}: smoothing changes what the ranges are of; use --static mse")
    try:
        re.compile(options.skip_layers)
    except re.error as error:
        raise InputError(f"--skip_layers {options.skip_layers!r}: no regex: {error}") from None


def add_flags(arguments: argparse.ArgumentParser) -> None:
    """Adds a flag for each option; one that is not given is absent, since its default depends on the run."""
    plain = Options()

    def flag(name: str, text: str, **how: Any) -> None:
        arguments.add_argument(name, default=argparse.SUPPRESS, help=text, **how)

    switch = argparse.BooleanOptionalAction
    flag("--images", f"calibration images (default: {plain.images})", type=int)
    flag("--calibration", "folder, CSV table or .npz file of which the training split calibrates (default: the run's)")
    flag(
        "--smooth",
        "smoothing folds with a search for alpha (default: yes, but not of a run that trained in int8)",
        action=switch,
    )
    flag("--clip", "search for where kernels saturate (default: as --smooth)", action=switch)
    flag("--correct", "bias correction (default: as --smooth)", action=switch)
    flag(
        "--static",
        f"static ranges: mse, max, a percentile or {ranges.TRAINED} (default: per token; of a run that trained with static "
        f"ranges, {ranges.TRAINED})",
    )
    flag("--bits", f"of kernels, 8 or 4 (default: {plain.bits}, or as trained)", type=int)
    flag("--weight_only", "activations stay in float (default: no, or as trained)", action=switch)
    flag("--attention", "also the products of attention in int8 (default: no, or as trained)", action=switch)
    flag("--skip_layers", f"regex on layers that stay in float (default: {plain.skip_layers}, or as trained)")
    flag("--max_drop", "points that validation accuracy may fall; sensitive layers stay in float for it", type=float)
    flag(
        "--sensitivity_images",
        f"images on which each layer is left out once, 0 for not (default: {plain.sensitivity_images})",
        type=int,
    )


def changed(options: Options, given: Mapping[str, Any]) -> Options:
    """Options with the values of the flags that were given."""
    stages = {name: value for name, value in given.items() if name in asdict(options.recipe)}
    others = {name: value for name, value in given.items() if name not in stages}
    return replace(options, recipe=replace(options.recipe, **stages), **others)
