"""The stages in order: smoothing, clipping, static ranges, bias correction; each can be left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax import Array

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
        static: How static ranges are found, see `ranges.bound_of`, or `ranges.TRAINED`; '' for dynamic ones.
    """

    smooth: bool = True
    clip: bool = True
    correct: bool = True
    static: str = ""


def run(
    params: tree.Tree,
    seen: Mapping[str, Seen],
    settings: quant.Settings,
    recipe: Recipe,
    trained: Mapping[str, Array] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[tree.Tree, dict[str, Layer], dict[str, dict[str, Any]]]:
    """Quantises a float model.

    Args:
        params: Parameters in float, adapters merged.
        seen: Inputs of the layers.
        settings: Bits, and which layers.
        recipe: The stages.
        trained: Static ranges by layer, where the recipe takes those of training.
        say: Is told of every stage as it begins.

    Returns:
        The parameters in float after smoothing; each quantised layer; and, for each, the `alpha` of smoothing (None
        for none) and the signal-to-noise ratio `snr_db` of its output on the sampled inputs.
    """
    alphas: dict[str, float | None] = {}
    if recipe.smooth:
        say("smoothing: searching for alpha")
        params, seen, alphas = smooth.search(params, seen, settings, recipe.static)
    leaves, paths = tree.flatten(params), sorted(path for path in seen if settings.converts(path))
    exact = {path: leaves[f"{path}/kernel"] for path in paths}

    clips: dict[str, Array | float] = dict.fromkeys(paths, 1.0)
    if recipe.clip:
        say(f"clipping: searching {len(paths)} kernels")
        clips = {path: kernels.clip_search(exact[path], settings.bits) for path in paths}
    integers = {path: quantizer.quantise_kernel(exact[path], settings.bits, clips[path]) for path in paths}

    bounds: dict[str, Array | None] = dict.fromkeys(paths)
    if recipe.static == ranges.TRAINED:
        bounds = {path: trained[path] for path in paths}
    elif recipe.static:
        say(f"static ranges: {recipe.static}")
        bounds = {path: ranges.bound_of(seen[path], recipe.static) for path in paths}

    biases = {path: leaves[f"{path}/bias"] for path in paths}
    if recipe.correct:
        say("bias correction")
        for path in paths:
            error = (seen[path].rows, exact[path], integers[path], bounds[path], settings.weight_only)
            biases[path] = biases[path] + kernels.mean_error(*error)

    layers = {path: Layer(integers[path], biases[path], bounds[path]) for path in paths}
    told = {}
    for path, layer in layers.items():
        bias = leaves[f"{path}/bias"]
        snr = kernels.signal_to_noise(seen[path].rows, exact[path], bias, *layer, settings.weight_only)
        told[path] = {"alpha": alphas.get(path), "snr_db": float(snr)}
    return params, layers, told
