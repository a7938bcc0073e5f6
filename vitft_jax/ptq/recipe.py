"""The stages in order: smoothing, clipping, static ranges, bias correction; each can be left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitft_jax import quantizer, tree
from vitft_jax.methods import quant
from vitft_jax.ptq import kernels, ranges, smooth
from vitft_jax.ptq.observe import Seen
from vitft_jax.ptq.simulate import Layer


@dataclass(frozen=True)
class Recipe:
    """Which stages run.

    Attributes:
        smooth: Smoothing folds, with a search for alpha.
        clip: Search for where the channels of a kernel saturate; without, nowhere.
        correct: Bias correction.
        static: How static ranges are found, see `ranges.bound_of`; '' for dynamic ones.
    """

    smooth: bool = True
    clip: bool = True
    correct: bool = True
    static: str = ""


def run(
    params: tree.Tree, seen: Mapping[str, Seen], settings: quant.Settings, recipe: Recipe
) -> tuple[tree.Tree, dict[str, Layer], dict[str, dict[str, Any]]]:
    """Quantises a float model.

    Args:
        params: Parameters in float, adapters merged.
        seen: Inputs of the layers.
        settings: Bits, and which layers.
        recipe: The stages.

    Returns:
        The parameters in float after smoothing; each quantised layer; and, for each, the `alpha` of smoothing (None
        for none) and the signal-to-noise ratio `snr_db` of its output on the sampled inputs.
    """
    alphas: dict[str, float | None] = {}
    if recipe.smooth:
        params, seen, alphas = smooth.search(params, seen, settings.bits, bool(recipe.static))
    leaves, layers, told = tree.flatten(params), {}, {}
    for path in sorted(path for path in seen if settings.converts(path)):
        kernel, bias, rows = leaves[f"{path}/kernel"], leaves[f"{path}/bias"], seen[path].rows
        clip = kernels.clip_search(kernel, settings.bits) if recipe.clip else 1.0
        integers = quantizer.quantise_kernel(kernel, settings.bits, clip)
        bound = ranges.bound_of(seen[path], recipe.static) if recipe.static else None
        error = kernels.mean_error(rows, kernel, integers, bound, settings.weight_only)
        layers[path] = Layer(integers, bias + error if recipe.correct else bias, bound)
        snr = kernels.signal_to_noise(rows, kernel, bias, *layers[path], settings.weight_only)
        told[path] = {"alpha": alphas.get(path), "snr_db": float(snr)}
    return params, layers, told
