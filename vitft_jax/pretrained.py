"""Published Vision Transformers as parameters of `vit.ViT`.

Three namings are read: Hugging Face (`vit`, `deit`, `dinov2`), timm (ViT, DeiT, DeiT-III, DINOv2) and the .npz files of
AugReg. The tensors are renamed by the tables of `naming`, the architecture is read off their shapes, `config.json`
overrides what it states, and every leaf is then held against the model that results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitft_jax import naming, position, tree, weightfiles
from vitft_jax.errors import InputError, nearest
from vitft_jax.vit import VARIANTS, ViT

BUNDLED = Path(__file__).parent / "weights" / "phantom_micro"

_DEEPEST = 1000  # blocks; to build many more from a damaged config.json would take hours
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model.

    Attributes:
        model: Arguments of `vit.ViT`: patch, width, depth, heads, hidden, distilled, dist_head, layer_scale, features
            and eps.
        params: Nested, our names, float32 numpy, positions on the native grid; with `head` (and `head_dist`) where the
            file has them.
        classes: Names of the head's outputs; empty where they are not known.
        image_size: Side of the images it was trained on, pixels.
        mean: Input normalisation on a scale of 0 to 1: `(x - mean) / std`.
        std: See `mean`.
        antialias: How its library resizes position embeddings, see `position.resize_matrix`.
        source: Absolute path or Hub id.
        revision: Commit on the Hub; empty for a path.
        sha256: Over the bytes of the weights files, in the order of their names.
        library: Whose naming the files have, see `naming.Naming`; '' where they are no files.
    """

    model: dict[str, Any]
    params: dict[str, Any]
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    antialias: bool
    source: str
    revision: str
    sha256: str
    library: str = ""


def load(source: str, revision: str = "", name: str = "") -> Pretrained:
    """Loads a pretrained model.

    Args:
        source: One of
            - a directory with `config.json` and `model.safetensors` (or its shards), as Hugging Face and timm write it;
            - a `.safetensors` file, read without any `config.json` beside it: the architecture comes from the shapes,
              with heads 64 wide, and the normalisation from the family (ImageNet's for DeiT, DeiT-III and DINOv2,
              else 0.5); a DeiT without distillation token counts as a ViT here;
            - an `.npz` file of AugReg;
            - the id 'owner/name' of such a directory on the Hugging Face Hub;
            - 'bundled': the small ViT that comes with this package, see `weights/`.
        revision: Branch, tag or commit on the Hub; '' is its main branch.
        name: Key of `vit.VARIANTS` that the architecture must agree with; '' for no such check.

    Raises:
        InputError: The source cannot be read, or does not hold a model that `vit.ViT` can express.
    """
    if name and name not in VARIANTS:
        raise InputError(f"no architecture {name!r}; {nearest(name, VARIANTS)}")
    weights = weightfiles.read(str(BUNDLED) if source == "bundled" else source, revision)
    if source == "bundled":
        weights = replace(weights, source=source)  # the same run wherever the package is installed
    scheme = naming.find(weights)
    renamed = naming.rename(weights, scheme)
    params, problems = renamed.params, renamed.problems
    model = {**naming.read_shapes(params), **scheme.facts(weights)}
    image_size, qkv_bias = model.pop("image_size", None), model.pop("qkv_bias")
    _check_whole(model, weights.source, problems)
    image_size = image_size or model["patch"]
    if image_size % model["patch"]:
        raise InputError(f"{weights.source}: image size {image_size} is not a multiple of the patch {model['patch']}")
    if not qkv_bias:
        zeros = np.zeros(model["width"], np.float32)
        biases = {f"blocks_{i}/attn/{r}/bias": zeros for i in range(model["depth"]) for r in ("query", "key", "value")}
        problems += [f"unexpected {renamed.origin[n]}: qkv_bias is false" for n in params if n in biases]
        params |= biases

    outputs = params["head/kernel"].shape[-1] if "head/kernel" in params else 0
    expected = jax.eval_shape(
        ViT(**model, classes=outputs).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, image_size, image_size, 3), "float32"),
    )
    problems += _differences(params, expected["params"], renamed.origin)
    problems += [f"{name} is not finite" for name, tensor in weights.tensors.items() if not np.isfinite(tensor).all()]
    classes = scheme.labels(weights) if outputs else ()
    if classes and len(classes) != outputs:
        problems.append(f"config.json names {len(classes)} classes, the head has {outputs}")
    _raise_any(problems, f"{weights.source}: does not hold a whole ViT of {model} for {image_size} pixels")
    if name:
        confirm(name, model, weights.source)

    mean, std = _normalisation(weights, IMAGENET if model["distilled"] or model["layer_scale"] else HALF)
    return Pretrained(
        model=model,
        params=tree.unflatten(params),
        classes=classes,
        image_size=image_size,
        mean=mean,
        std=std,
        antialias=scheme.antialias,
        source=weights.source,
        revision=weights.revision,
        sha256=weights.sha256,
        library=scheme.library,
    )


def fit(pretrained: Pretrained, initial: tree.Tree, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the pretrained parameters for a model of another image size, number of classes or features.

    Position embeddings are resampled to the model's grid. A head for the same classes is kept, in the order of the model, so
    that it goes on where it was; instead of a head for other classes, or none, comes the one in `initial`. Where the
    names of the classes are not known on both sides, their number decides.

    Args:
        pretrained: What `load` returned.
        initial: `params` of the model, freshly initialised, or their shapes as `jax.eval_shape` gives them.
        classes: Names of the model's outputs, where they are known.

    Returns:
        Nested dict with the leaves of `initial`; numpy arrays, but for heads taken from `initial`.

    Raises:
        InputError: Anything but the positions and the heads differs.
    """
    wanted, params = tree.flatten(initial), tree.flatten(pretrained.params)
    named = bool(classes and pretrained.classes)
    other = named and set(classes) != set(pretrained.classes)
    for head in ("head", "head_dist"):
        leaves = (f"{head}/kernel", f"{head}/bias")
        if other or any(
            leaf not in params or leaf not in wanted or params[leaf].shape != wanted[leaf].shape for leaf in leaves
        ):
            params = {leaf: value for leaf, value in params.items() if leaf not in leaves}
            params |= {leaf: wanted[leaf] for leaf in leaves if leaf in wanted}
        elif named:
            order = [pretrained.classes.index(name) for name in classes]
            params |= {leaf: params[leaf][..., order] for leaf in leaves}
    prefix = 2 if pretrained.model["distilled"] else 1
    problems = []
    try:
        side = position.grid_side(wanted["embed/position"].shape[1] - prefix)
        params["embed/position"] = position.resize(params["embed/position"], prefix, side, pretrained.antialias)
    except ValueError as error:
        problems.append(f"embed/position of the model: {error} after {prefix} prefix positions")
    problems += _differences(params, initial, {})
    _raise_any(problems, f"{pretrained.source}: does not fit the model")
    return tree.unflatten({leaf: params[leaf] for leaf in wanted})


def _check_whole(model: dict[str, Any], source: str, problems: list[str]) -> None:
    unknown = sorted({"patch", "width", "hidden", "heads"} - model.keys())
    if unknown == ["heads"]:
        raise InputError(
            f"{source}: the number of heads cannot be told from width {model['width']}; "
            "give a directory with a config.json that states it (timm: model_args.num_heads)"
        )
    if unknown or not model["depth"]:
        _raise_any([f"no tensor tells {', '.join(unknown) or 'depth'}", *problems], f"{source}: not a whole ViT")
    if model["depth"] > _DEEPEST:
        raise InputError(f"{source}: {model['depth']} blocks are more than any ViT has (at most {_DEEPEST} are read)")
    if model["width"] % model["heads"]:
        raise InputError(f"{source}: width {model['width']} does not divide into {model['heads']} heads")


def _differences(params: dict[str, Any], expected: tree.Tree, origin: dict[str, str]) -> list[str]:
    """Missing, misshapen and unexpected leaves, a sentence each; `origin` names them as the file does."""
    shapes = {name: tuple(leaf.shape) for name, leaf in tree.flatten(expected).items()}
    called = {name: f"{name} (in the file: {origin[name]})" if name in origin else name for name in params}
    return [
        *(f"missing {name} {shape}" for name, shape in shapes.items() if name not in params),
        *(
            f"{called[name]} has shape {params[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in params and params[name].shape != shape
        ),
        *(f"unexpected {called[name]} {leaf.shape}" for name, leaf in params.items() if name not in shapes),
    ]


def _raise_any(problems: list[str], headline: str) -> None:
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:10])
        raise InputError(f"{headline}; {len(problems)} problem{'s' * (len(problems) > 1)}:{listed}{more}")


def confirm(name: str, model: dict[str, Any], source: str) -> None:
    """Holds a model against the architecture that the config names, a key of `vit.VARIANTS`.

    Raises:
        InputError: They differ.
    """
    # What the head reads is the user's choice, so it is no part of the architecture here.
    wanted = {"distilled": False, "layer_scale": False, **VARIANTS[name]}
    wanted.pop("features", None)
    if differ := [f"{key} {model[key]}, not {value}" for key, value in wanted.items() if model[key] != value]:
        raise InputError(f"{source}: is no {name}: it has {'; '.join(differ)}")


def _normalisation(weights: weightfiles.Weights, default: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation as the file states them, else as the family had them."""
    stated = naming.section(weights, "pretrained_cfg")
    mean = weights.preprocessor.get("image_mean") or stated.get("mean") or default[0]
    std = weights.preprocessor.get("image_std") or stated.get("std") or default[1]
    if weights.preprocessor.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or not np.isfinite(mean + std).all() or min(std) <= 0:
        raise InputError(f"{weights.source}: mean and std of the input must be three numbers each, std above 0")
    return mean, std
