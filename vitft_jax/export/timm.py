"""The whole model for timm: `config.json` and `model.safetensors`, as timm itself writes them for the Hub.

The temperature of the run is in the head, as in `hugging_face`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vitft_jax import exported, report
from vitft_jax.errors import InputError
from vitft_jax.export.hugging_face import READS, convert
from vitft_jax.export.source import Options, Source
from vitft_jax.exported import About

EPSILON = 1e-6  # of timm's LayerNorm, which no setting changes
_POOLS = {"cls": "token", "mean": "avg"}
_CROPS = {"squash": "squash", "crop": "center", "pad": "border"}
_OTHERS = {
    "embed/cls_token": "cls_token",
    "embed/dist_token": "dist_token",
    "embed/position": "pos_embed",
}
_MODULES = {
    "embed/patch": "patch_embed.proj",
    "attn/out": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm": "norm",
    "head": "head",
    "head_dist": "head_dist",
}


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Writes the model.

    Raises:
        InputError: timm has no such model, or the run computes with a method.
    """
    source.refuse_methods("timm")
    about, model = source.about("timm"), source.architecture
    if model["features"] not in _POOLS:
        raise InputError(
            f"timm's ViT reads {' or '.join(_POOLS)}, not {model['features']!r}; use --format hf or stablehlo"
        )
    save_file(tensors(source.params(), model), folder / "model.safetensors", metadata={"format": "pt"})
    report.write_json(folder / "config.json", config(model, about))
    exported.write(folder, about)
    notes = source.notes()
    if model["eps"] != EPSILON:
        notes.append(
            f"timm's LayerNorm has epsilon {EPSILON:g}, this model has {model['eps']:g}: logits differ a little"
        )
    if about.fit == "crop":
        notes.append(
            "timm crops by whole pixels after it has resized, vitft_jax in one step: answers differ unless images are square"
        )
    if about.fit == "pad":
        notes.append("timm pads with the mean colour, vitft_jax with black: pad images yourself, or answers differ")
    return [*notes, READS]


def config(model: dict[str, Any], about: About) -> dict[str, Any]:
    """Contents of `config.json`."""
    ratio = model["hidden"] / model["width"]
    if int(model["width"] * ratio) != model["hidden"]:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    arguments = {
        "img_size": about.image_size,
        "patch_size": model["patch"],
        "embed_dim": model["width"],
        "depth": model["depth"],
        "num_heads": model["heads"],
        "mlp_ratio": ratio,
        "global_pool": _POOLS[model["features"]],
    }
    if model["layer_scale"]:
        arguments["init_values"] = 1.0  # that there are scales; their values are in the weights
    if model["features"] == "mean":
        arguments["fc_norm"] = False  # the last LayerNorm comes before the mean
    return {
        "architecture": "deit_base_distilled_patch16_224" if model["distilled"] else "vit_base_patch16_224",
        "num_classes": len(about.classes),
        "num_features": model["width"],
        "global_pool": _POOLS[model["features"]],
        "label_names": list(about.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, about.image_size, about.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": _CROPS[about.fit],
            "mean": list(about.mean),
            "std": list(about.std),
            "num_classes": len(about.classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if model["distilled"] else "head",
        },
    }


def tensors(params: dict[str, np.ndarray], model: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as timm names and shapes them, of our leaves."""
    params = dict(params)
    if model["distilled"] and not model["dist_head"]:
        # timm takes the mean of two heads, so one of them counts twice and the other is zero.
        params |= {f"head_dist/{part}": 0 * params[f"head/{part}"] for part in ("kernel", "bias")}
        params |= {f"head/{part}": 2 * params[f"head/{part}"] for part in ("kernel", "bias")}
    renamed: dict[str, np.ndarray] = {}
    for leaf, array in params.items():
        module, last = leaf.rsplit("/", 1)
        block, _, inner = module.partition("/")
        prefix, inner = (
            (f"blocks.{block.removeprefix('blocks_')}.", inner) if block.startswith("blocks_") else ("", module)
        )
        if leaf in _OTHERS:
            renamed[_OTHERS[leaf]] = convert(leaf, array)
        elif inner.startswith("scale"):
            renamed[f"{prefix}ls{inner[-1]}.gamma"] = array
        elif inner in _MODULES:
            renamed[f"{prefix}{_MODULES[inner]}.{'bias' if last == 'bias' else 'weight'}"] = convert(leaf, array)
    for i in range(model["depth"]):
        for part, theirs in (("kernel", "weight"), ("bias", "bias")):
            leaves = [f"blocks_{i}/attn/{role}/{part}" for role in ("query", "key", "value")]
            renamed[f"blocks.{i}.attn.qkv.{theirs}"] = np.concatenate([convert(leaf, params[leaf]) for leaf in leaves])
    return renamed
