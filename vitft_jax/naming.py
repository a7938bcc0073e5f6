"""The namings of published Vision Transformers: tables from their tensors and config keys to ours.

A rule is `(regex on the name in the file, our names, conversion)`; a tensor with several names is cut into as many
equal parts along its first axis. Torch keeps a linear weight as `(out, in)`, we as `(in, out)`.
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitft_jax.errors import InputError
from vitft_jax.weightfiles import Weights

Convert = Callable[[np.ndarray], np.ndarray]
Rule = tuple[str, tuple[str, ...], Convert]
_QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Naming:
    """How one library names the tensors and settings of a Vision Transformer.

    Attributes:
        library: 'hugging_face', 'timm' or 'augreg'.
        marker: Regex on the name of a tensor that every file in this naming has, and none in another.
        prefix: Regex that is cut off the front of each name.
        rules: From its tensors to ours; the first full match counts.
        dropped: Regex on tensors that a classifier has no use for.
        refused: Regexes on tensors that stand for something `vit.ViT` does not have, each with what that is.
        bare_grid: Position embeddings may come without those of the prefix tokens.
        antialias: How the library resizes position embeddings.
        facts: Reads off config or tensors what the shapes of our leaves do not tell: arguments of `vit.ViT`, and
            `image_size` and `qkv_bias` where stated.
        labels: Reads the names of the classes off the config.
    """

    library: str
    marker: str
    prefix: str
    rules: tuple[Rule, ...]
    dropped: str
    refused: tuple[tuple[str, str], ...]
    bare_grid: bool
    antialias: bool
    facts: Callable[[Weights], dict[str, Any]]
    labels: Callable[[Weights], tuple[str, ...]]


@dataclass(frozen=True)
class Renamed:
    """Tensors under our names.

    Attributes:
        params: Our name to array, float32.
        origin: Our name to name in the file.
        problems: What was wrong, a sentence each.
    """

    params: dict[str, np.ndarray]
    origin: dict[str, str]
    problems: list[str]


def find(weights: Weights) -> Naming:
    """Returns the naming of the tensors.

    Raises:
        InputError: None of `NAMINGS`, or the model has parts that `vit.ViT` lacks.
    """
    for naming in NAMINGS:
        if any(re.search(naming.marker, name) for name in weights.tensors):
            break
    else:
        raise InputError(
            f"{weights.source}: not a Vision Transformer in the naming of Hugging Face, timm or AugReg; "
            f"its tensors are {', '.join(sorted(weights.tensors)[:5]) or 'none'}"
        )
    refused = {reason: name for name in weights.tensors for regex, reason in naming.refused if re.search(regex, name)}
    if refused:
        raise InputError(
            f"{weights.source}: not supported: " + "; ".join(f"{reason} ({name})" for reason, name in refused.items())
        )
    return naming


def rename(weights: Weights, naming: Naming) -> Renamed:
    """Renames and converts the tensors; what has no place becomes a problem, not an error."""
    renamed = Renamed({}, {}, [])
    for name, tensor in weights.tensors.items():
        short = re.sub(rf"^(?:{naming.prefix})", "", name)
        if re.fullmatch(naming.dropped, short):
            continue
        found = (
            (match, ours, convert) for regex, ours, convert in naming.rules if (match := re.fullmatch(regex, short))
        )
        match, templates, convert = next(found, (None, (), None))
        if match is None:
            renamed.problems.append(f"unexpected tensor {name} {tensor.shape}")
            continue
        try:
            parts = [convert(part) for part in np.split(tensor, len(templates))]
        except (ValueError, IndexError):
            renamed.problems.append(f"{name} has the impossible shape {tensor.shape}")
            continue
        for template, part in zip(templates, parts, strict=True):
            ours = match.expand(template)
            if ours in renamed.params:
                renamed.problems.append(f"{name} and {renamed.origin[ours]} are the same leaf {ours}")
            renamed.params[ours], renamed.origin[ours] = part, name
    if naming.bare_grid:
        _pad_positions(renamed.params)
    return renamed


def _pad_positions(params: dict[str, np.ndarray]) -> None:
    """Gives prefix tokens without a position (timm's `no_embed_class`) the position zero."""
    position = params.get("embed/position")
    if position is not None and position.ndim == 3 and math.isqrt(position.shape[1]) ** 2 == position.shape[1]:
        prefix = np.zeros((1, 1 + ("embed/dist_token" in params), position.shape[2]), position.dtype)
        params["embed/position"] = np.concatenate([prefix, position], axis=1)


def read_shapes(params: dict[str, np.ndarray]) -> dict[str, Any]:
    """Reads arguments of `vit.ViT`, `image_size` and `qkv_bias` off the shapes of our leaves, as far as they tell."""
    facts: dict[str, Any] = {
        "distilled": "embed/dist_token" in params,
        "dist_head": True,
        "layer_scale": "blocks_0/scale1/scale" in params,
        "features": "cls",
        "depth": len({name.split("/")[0] for name in params if name.startswith("blocks_")}),
        "qkv_bias": any(re.search("attn/(query|key|value)/bias", name) for name in params),
    }
    # The commonest size, so that one spoilt tensor is reported as such and does not stand for the whole.
    for fact, leaves in (("width", "norm[12]?/scale"), ("hidden", "mlp/fc1/bias")):
        if sizes := [array.size for name, array in params.items() if re.search(leaves, name)]:
            facts[fact] = statistics.mode(sizes)
    if "embed/patch/kernel" in params:
        facts["patch"] = max(math.isqrt(params["embed/patch/kernel"].shape[0] // 3), 1)
        if "embed/position" in params and params["embed/position"].ndim == 3:
            cells = params["embed/position"].shape[1] - 1 - facts["distilled"]
            facts["image_size"] = facts["patch"] * math.isqrt(max(cells, 1))
    # ViT-T to ViT-L have heads of 64; the larger published models have other widths, which shapes cannot tell.
    if facts.get("width", 1) % 64 == 0 and facts["width"] <= 1024:
        facts["heads"] = facts["width"] // 64
    return facts


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    # Contiguous, because safetensors writes a transposed view in the wrong order.
    return np.ascontiguousarray(x.T)


def _convolution(x: np.ndarray) -> np.ndarray:
    """From `(D, 3, p, p)` to `(p * p * 3, D)`."""
    return np.ascontiguousarray(x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]))


def _join_first(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _join_last(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)


def _linear(module: str, *ours: str, kernel: Convert = _transpose) -> list[Rule]:
    return [
        (rf"{module}\.weight", tuple(f"{name}/kernel" for name in ours), kernel),
        (rf"{module}\.bias", tuple(f"{name}/bias" for name in ours), _same),
    ]


def _norm(module: str, ours: str) -> list[Rule]:
    return [(rf"{module}\.weight", (f"{ours}/scale",), _same), (rf"{module}\.bias", (f"{ours}/bias",), _same)]


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_HF_BLOCK = r"encoder\.layer\.(\d+)\."
_HF_RULES: tuple[Rule, ...] = (
    (r"embeddings\.cls_token", ("embed/cls_token",), _same),
    (r"embeddings\.distillation_token", ("embed/dist_token",), _same),
    (r"embeddings\.position_embeddings", ("embed/position",), _same),
    *_linear(r"embeddings\.patch_embeddings\.projection", "embed/patch", kernel=_convolution),
    *_norm(_HF_BLOCK + "(?:layernorm_before|norm1)", r"blocks_\1/norm1"),
    *_linear(_HF_BLOCK + r"attention\.attention\.(query|key|value)", r"blocks_\1/attn/\2"),
    *_linear(_HF_BLOCK + r"attention\.output\.dense", r"blocks_\1/attn/out"),
    *_norm(_HF_BLOCK + "(?:layernorm_after|norm2)", r"blocks_\1/norm2"),
    *_linear(_HF_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)", r"blocks_\1/mlp/fc1"),
    *_linear(_HF_BLOCK + r"(?:output\.dense|mlp\.fc2)", r"blocks_\1/mlp/fc2"),
    (_HF_BLOCK + r"layer_scale([12])\.lambda1", (r"blocks_\1/scale\2/scale",), _same),
    *_norm("layernorm", "norm"),
    *_linear("(?:cls_)?classifier", "head"),
    *_linear("distillation_classifier", "head_dist"),
)
_HF_FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"distilled": False, "layer_scale": False, "eps": 1e-12},
    "deit": {"distilled": True, "layer_scale": False, "eps": 1e-12},
    "dinov2": {"distilled": False, "layer_scale": True, "eps": 1e-6, "features": "cls+mean"},
}
_HF_CONFIG = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "patch_size": "patch",
    "image_size": "image_size",
}
_HF_MUST_BE = {"hidden_act": "gelu", "num_channels": 3, "use_swiglu_ffn": False}


def _hf_facts(weights: Weights) -> dict[str, Any]:
    config = weights.config

    def has(regex: str) -> bool:
        return any(re.search(regex, name) for name in weights.tensors)

    if config:
        family = config.get("model_type")
        if family not in list(_HF_FAMILIES):
            raise InputError(
                f"{weights.source}: model_type {family!r} is not supported, only {', '.join(_HF_FAMILIES)} are"
            )
        for key, value in _HF_MUST_BE.items():
            if config.get(key, value) != value:
                raise InputError(
                    f"{weights.source}: config.json has {key}={config[key]!r}, only {value!r} is supported"
                )
        if "num_attention_heads" not in config:
            raise InputError(f"{weights.source}: config.json lacks num_attention_heads")
    else:
        family = "deit" if has("distillation_token") else "dinov2" if has("layer_scale1") else "vit"
    facts = dict(_HF_FAMILIES[family])
    # Without a teacher's head, Hugging Face's DeiT classifies from the class token alone.
    facts["dist_head"] = not (facts["distilled"] and has(r"^classifier\.weight"))
    facts |= {ours: _integer(weights, config, key) for key, ours in _HF_CONFIG.items() if key in config}
    if "layer_norm_eps" in config:
        facts["eps"] = config["layer_norm_eps"]
        if not isinstance(facts["eps"], int | float):
            raise InputError(f"{weights.source}: config.json has layer_norm_eps={facts['eps']!r}, expected a number")
    if "qkv_bias" in config:
        facts["qkv_bias"] = bool(config["qkv_bias"])
    return facts


def section(weights: Weights, key: str) -> dict[str, Any]:
    """Returns a JSON object inside the config; empty where there is none.

    Raises:
        InputError: There is something else.
    """
    value = weights.config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{weights.source}: config.json has {key}={value!r}, expected an object")
    return value


def _integer(weights: Weights, table: dict[str, Any], key: str) -> int:
    value = table[key]
    # Sizes may be written as [side, side].
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or value < 1:
        raise InputError(
            f"{weights.source}: config.json has {key}={value!r}, expected a positive integer (and a square)"
        )
    return value


def _hf_labels(weights: Weights) -> tuple[str, ...]:
    table = section(weights, "id2label")
    try:
        labels = tuple(str(table[key]) for key in sorted(table, key=int))
    except (TypeError, ValueError):
        raise InputError(f"{weights.source}: id2label of config.json must map numbers to names") from None
    # What the library writes where nobody named the classes.
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


# --- timm ------------------------------------------------------------------------------------------------------------

_TIMM_BLOCK = r"blocks\.(\d+)\."
_TIMM_RULES: tuple[Rule, ...] = (
    ("cls_token", ("embed/cls_token",), _same),
    ("dist_token", ("embed/dist_token",), _same),
    ("pos_embed", ("embed/position",), _same),
    *_linear(r"patch_embed\.proj", "embed/patch", kernel=_convolution),
    *_norm(_TIMM_BLOCK + "norm([12])", r"blocks_\1/norm\2"),
    *_linear(_TIMM_BLOCK + r"attn\.qkv", *(rf"blocks_\1/attn/{role}" for role in _QKV)),
    *_linear(_TIMM_BLOCK + r"attn\.proj", r"blocks_\1/attn/out"),
    *_linear(_TIMM_BLOCK + r"mlp\.(fc[12])", r"blocks_\1/mlp/\2"),
    (_TIMM_BLOCK + r"ls([12])\.gamma", (r"blocks_\1/scale\2/scale",), _same),
    *_norm("norm", "norm"),
    *_linear("(head|head_dist)", r"\1"),
)
_TIMM_FEATURES = {"token": "cls", "avg": "mean"}


def _timm_facts(weights: Weights) -> dict[str, Any]:
    config = weights.config
    facts: dict[str, Any] = {"eps": 1e-6}
    if not config:
        return facts
    if "architecture" not in config:
        raise InputError(f"{weights.source}: the tensors are timm's, but config.json has no 'architecture'")
    pool = config.get("global_pool", "token")
    if pool not in list(_TIMM_FEATURES):
        raise InputError(
            f"{weights.source}: global_pool {pool!r} is not supported, only {', '.join(_TIMM_FEATURES)} are"
        )
    facts["features"] = _TIMM_FEATURES[pool]
    arguments = section(weights, "model_args")
    if "quickgelu" in str(config["architecture"]) or {"act_layer", "norm_layer"} & arguments.keys():
        raise InputError(f"{weights.source}: another activation or normalisation than timm's default is not supported")
    if "num_heads" in arguments:
        facts["heads"] = _integer(weights, arguments, "num_heads")
    return facts


def _timm_labels(weights: Weights) -> tuple[str, ...]:
    labels = weights.config.get("label_names") or section(weights, "pretrained_cfg").get("label_names") or []
    if not isinstance(labels, list):
        raise InputError(f"{weights.source}: label_names of config.json must be a list")
    return tuple(map(str, labels))


# --- AugReg .npz -----------------------------------------------------------------------------------------------------

_NPZ_BLOCK = r"Transformer/encoderblock_(\d+)/"
_NPZ_ATTENTION = _NPZ_BLOCK + "MultiHeadDotProductAttention_1/"
_NPZ_RULES: tuple[Rule, ...] = (
    ("cls", ("embed/cls_token",), _same),
    ("Transformer/posembed_input/pos_embedding", ("embed/position",), _same),
    ("embedding/kernel", ("embed/patch/kernel",), _join_first),
    ("embedding/bias", ("embed/patch/bias",), _same),
    (_NPZ_BLOCK + "LayerNorm_0/(scale|bias)", (r"blocks_\1/norm1/\2",), _same),
    (_NPZ_ATTENTION + "(query|key|value)/kernel", (r"blocks_\1/attn/\2/kernel",), _join_last),
    (_NPZ_ATTENTION + "(query|key|value)/bias", (r"blocks_\1/attn/\2/bias",), np.ravel),
    (_NPZ_ATTENTION + "out/kernel", (r"blocks_\1/attn/out/kernel",), _join_first),
    (_NPZ_ATTENTION + "out/bias", (r"blocks_\1/attn/out/bias",), _same),
    (_NPZ_BLOCK + "LayerNorm_2/(scale|bias)", (r"blocks_\1/norm2/\2",), _same),
    (_NPZ_BLOCK + "MlpBlock_3/Dense_0/(kernel|bias)", (r"blocks_\1/mlp/fc1/\2",), _same),
    (_NPZ_BLOCK + "MlpBlock_3/Dense_1/(kernel|bias)", (r"blocks_\1/mlp/fc2/\2",), _same),
    ("Transformer/encoder_norm/(scale|bias)", (r"norm/\1",), _same),
    ("head/(kernel|bias)", (r"head/\1",), _same),
)


def _npz_facts(weights: Weights) -> dict[str, Any]:
    # These kernels are (D, heads, head width), so the heads are known.
    kernels = (tensor for name, tensor in weights.tensors.items() if re.search("/(query|key|value)/kernel", name))
    heads = [kernel.shape[1] for kernel in kernels if kernel.ndim == 3]
    return {"eps": 1e-6, "qkv_bias": True} | ({"heads": statistics.mode(heads)} if heads else {})


NAMINGS = (
    Naming(
        library="hugging_face",
        marker=r"embeddings\.patch_embeddings\.projection\.weight$",
        prefix=r"(?:vit|deit|dinov2)\.",
        rules=_HF_RULES,
        # Hugging Face's classifiers do not read the pooler; the mask token serves pretraining.
        dropped=r"pooler\.dense\.(?:weight|bias)|embeddings\.mask_token",
        refused=(
            (r"register_tokens", "register tokens"),
            (r"mlp\.weights_(?:in|out)", "a SwiGLU MLP"),
        ),
        bare_grid=False,
        antialias=False,
        facts=_hf_facts,
        labels=_hf_labels,
    ),
    Naming(
        library="timm",
        marker=r"^patch_embed\.",
        prefix="",
        rules=_TIMM_RULES,
        dropped="mask_token",
        refused=(
            (r"^reg_token|^register_tokens", "register tokens"),
            (r"^fc_norm\.", "a LayerNorm after pooling (fc_norm)"),
            (r"^norm_pre\.", "a LayerNorm before the blocks (norm_pre)"),
            (r"^attn_pool\.", "attention pooling"),
            (r"^patch_embed\.backbone\.", "a convolutional stem"),
            (r"attn\.[qk]_norm\.", "normalised queries and keys"),
            (r"mlp\.(?:w12|w1|w2|w3|fc1_g|fc1_x)\.", "a SwiGLU MLP"),
            (r"rel_pos", "relative positions"),
        ),
        bare_grid=True,
        antialias=True,
        facts=_timm_facts,
        labels=_timm_labels,
    ),
    Naming(
        library="augreg",
        marker=r"(?:^|/)embedding/kernel$",
        prefix="params/",
        rules=_NPZ_RULES,
        dropped=r"(?!)",
        refused=(
            (r"pre_logits/", "a layer between encoder and head (pre_logits); take a file fine-tuned on ImageNet"),
            (r"MAPHead", "attention pooling"),
            (r"conv_root|gn_root", "a convolutional stem"),
        ),
        bare_grid=False,
        # The original resampled linearly; timm, where these weights live on, resizes them as its own.
        antialias=True,
        facts=_npz_facts,
        labels=lambda weights: (),
    ),
)
