"""What transformers calls the parts of our models: the files of a model, and the modules that PEFT's adapters name.

A file of weights has the names of transformers 4 in versions 4 and 5, which renames as it reads. The files of an adapter have
those of the modules, which differ: scheme 'hf4' and scheme 'hf5'.
"""

from typing import Any

from vitft_jax.errors import InputError

SCHEMES = ("hf5", "hf4")
FAMILIES = ("vit", "deit", "dinov2")

_ATTENTION = {
    "hf4": {
        "attn/query": "attention.attention.query",
        "attn/key": "attention.attention.key",
        "attn/value": "attention.attention.value",
        "attn/out": "attention.output.dense",
    },
    "hf5": {
        "attn/query": "attention.q_proj",
        "attn/key": "attention.k_proj",
        "attn/value": "attention.v_proj",
        "attn/out": "attention.o_proj",
    },
}
_MLP = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_MLP_OF_VIT_4 = {"mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense"}
_OTHERS = {
    "embed/cls_token": "embeddings.cls_token",
    "embed/dist_token": "embeddings.distillation_token",
    "embed/position": "embeddings.position_embeddings",
    "embed/patch": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCKS = {
    "vit": {"norm1": "layernorm_before", "norm2": "layernorm_after"},
    "dinov2": {
        "norm1": "norm1",
        "norm2": "norm2",
        "scale1/scale": "layer_scale1.lambda1",
        "scale2/scale": "layer_scale2.lambda1",
    },
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def family_of(model: dict[str, Any]) -> str:
    """The family of transformers that expresses a model, given as arguments of `vit.ViT`.

    DINOv2's classifier reads the class token and the mean of the patches, and its blocks scale their branches, so it can stand
    for every model without a distillation token: with zeros in the head, and with scales of one.

    Raises:
        InputError: There is none.
    """
    if model["distilled"]:
        if model["layer_scale"]:
            raise InputError("transformers has no model with both a distillation token and LayerScale")
        return "deit"
    return "dinov2" if model["layer_scale"] or model["features"] != "cls" else "vit"


def layers(family: str, scheme: str, depth: int) -> dict[str, str]:
    """Our paths of the linear layers in `depth` blocks, such as 'blocks_0/attn/query', to the names of their modules."""
    blocks = f"{family}.layers" if scheme == "hf5" and family != "dinov2" else f"{family}.encoder.layer"
    mlp = _MLP_OF_VIT_4 if scheme == "hf4" and family != "dinov2" else _MLP
    return {
        f"blocks_{i}/{ours}": f"{blocks}.{i}.{theirs}"
        for i in range(depth)
        for ours, theirs in (_ATTENTION[scheme] | mlp).items()
    }


def heads(model: dict[str, Any]) -> dict[str, str]:
    """Our heads to the names of their modules."""
    if model["distilled"] and model["dist_head"]:
        return {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    return {"head": "classifier"}


def architecture(model: dict[str, Any]) -> str:
    """The class of transformers that expresses a model.

    Raises:
        InputError: There is none.
    """
    name = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}[family_of(model)] + "ForImageClassification"
    return name + "WithTeacher" if "head_dist" in heads(model) else name


def tensors(family: str, model: dict[str, Any]) -> dict[str, str]:
    """Modules or leaves of ours to what a file of weights calls them; see `tensor` for whole names."""
    in_blocks = _IN_BLOCKS["dinov2" if family == "dinov2" else "vit"]
    names = {ours: f"{family}.{theirs}" for ours, theirs in _OTHERS.items()}
    for i in range(model["depth"]):
        block = f"{family}.encoder.layer.{i}"
        names |= {f"blocks_{i}/{ours}": f"{block}.{theirs}" for ours, theirs in in_blocks.items()}
    return names | layers(family, "hf4", model["depth"]) | heads(model)


def tensor(names: dict[str, str], leaf: str) -> str:
    """The name in a file of one of our leaves, such as 'blocks_0/attn/query/kernel'."""
    if leaf in names:
        return names[leaf]
    module, last = leaf.rsplit("/", 1)
    return f"{names[module]}.{_LEAVES[last]}"
