"""Adapters in the files of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Read are LoRA (with rsLoRA and patterns of ranks and alphas), DoRA and AdaLoRA on the linear layers of the blocks of a ViT, DeiT
or DINOv2, and a saved head, under the names of transformers 4 or 5. Which layers have an adapter is told by the tensors; a
setting that would change the result and is not known here is refused by name. `vitft_jax.export` writes such files.

A run starts from one by ``config.init_adapter``, with `resolve` and `insert`.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitft_jax import config as configs
from vitft_jax import exported, hf_names, pretrained, tree, weightfiles
from vitft_jax.build import Built, Weights
from vitft_jax.errors import InputError
from vitft_jax.methods import adalora, lora

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
COLLECTIONS = {"lora": lora.COLLECTION, "dora": lora.COLLECTION, "adalora": adalora.COLLECTION}
"""Methods that can start from an adapter, to the collections of their variables."""

_KNOWN = {
    "peft_type", "r", "init_r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights",
}  # fmt: skip
_WITHOUT_EFFECT = {
    # Where the adapter belongs and which layers it is on, which the tensors tell.
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save",
    # How it was trained or started, or is to be kept in memory.
    "inference_mode", "lora_dropout", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step", "loftq_config", "eva_config", "corda_config", "runtime_config", "ensure_weight_tying",
    # Read by PEFT beside another setting alone, or (fan_in_fan_out) on other layers than nn.Linear.
    "megatron_core", "qalora_group_size", "fan_in_fan_out",
}  # fmt: skip
_ORDINARY_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")
"""Starts that change the kernels, and of which PEFT can write an adapter of the original base."""
_HEADS = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
_BLOCK_0 = {
    name: ours
    for family in hf_names.FAMILIES
    for scheme in hf_names.SCHEMES
    for ours, theirs in hf_names.layers(family, scheme, 1).items()
    for name in (theirs, theirs.removeprefix(f"{family}."))  # the latter on a model without its head
}
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|E|magnitude_vector)(\.weight)?")
_HEAD = re.compile(rf"(?P<module>{'|'.join(_HEADS)})\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class Adapter:
    """An adapter under our names.

    Attributes:
        method: 'lora', 'dora' or 'adalora'.
        layers: Path of a linear layer to its arrays as the method has them: `a`, `b` and for DoRA `m`, or `q`, `lam`, `p`.
        rank: That holds where no pattern does; of AdaLoRA the initial one.
        alpha: Numerator of the scale, of all layers: where PEFT's differ, the ratio is in B.
        rs: Whether the scale is alpha / sqrt(rank).
        kept: Of AdaLoRA: which of the `rank` triplets each layer still has, bool, by path.
        head: Leaves 'head/kernel', 'head/bias', and those of 'head_dist'; empty where none is saved.
        classes: Names of the head's outputs, which `vitft_jax.export` writes beside an adapter; () where not known.
        base: Path or Hub id of the model that it says to be trained on; '' where it says none.
        source: The folder.
        sha256: Over the bytes of its tensors.
    """

    method: str
    layers: Mapping[str, Mapping[str, np.ndarray]]
    rank: int
    alpha: float
    rs: bool
    kept: Mapping[str, np.ndarray]
    head: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    base: str
    source: str
    sha256: str


def read(folder: Path) -> Adapter:
    """Reads an adapter.

    Raises:
        InputError: There is none, it is a pickle or damaged, or has a part or a setting that is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: no PEFT adapter here ({CONFIG} and {TENSORS})")
    if not (folder / TENSORS).is_file():
        reason = weightfiles.CONVERT if (folder / PICKLE).is_file() else f"restore {TENSORS}"
        raise InputError(f"{folder / (PICKLE if (folder / PICKLE).is_file() else TENSORS)}: {reason}")
    where, config = str(folder / CONFIG), weightfiles.read_json(folder / CONFIG)
    method = _method(config, where)
    tensors, data = weightfiles.read_safetensors(folder / TENSORS)
    modules, head = _sort(tensors, str(folder / TENSORS))
    rank = _number(config, "init_r" if method == "adalora" else "r", where, int)
    alpha = _number(config, "lora_alpha", where, float)
    alphas, patterns = _pattern(config, "alpha_pattern", where), _pattern(config, "rank_pattern", where)
    layers, kept = {}, {}
    for module, parts in modules.items():
        path = _path(module, str(folder / TENSORS))
        needed = {"lora": "AB", "dora": ("A", "B", "magnitude_vector"), "adalora": "ABE"}[method]
        if set(parts) != set(needed):
            raise InputError(
                f"{folder / TENSORS}: {module} has lora_{', lora_'.join(parts)}, not lora_{', lora_'.join(needed)}"
            )
        _check_shapes(parts, f"{folder / TENSORS}: {module}")
        if method == "adalora":
            layers[path] = {"q": _turned(parts["A"]), "lam": parts["E"].ravel(), "p": _turned(parts["B"])}
            kept[path] = _kept(patterns, module, rank, parts["E"].size, where)
        else:
            expected = _for_module(patterns, "rank_pattern", module, where, int) or rank
            if parts["A"].shape[0] != expected:
                raise InputError(
                    f"{where}: rank {expected} for {module} (r, or rank_pattern), and its tensors have rank "
                    f"{parts['A'].shape[0]}; the scale is lora_alpha over the rank, so one of them is wrong"
                )
            ratio = (_for_module(alphas, "alpha_pattern", module, where, float) or alpha) / alpha
            layers[path] = {"a": _turned(parts["A"]), "b": _turned(parts["B"]) * np.float32(ratio)}
            if method == "dora":
                layers[path]["m"] = parts["magnitude_vector"].ravel()
    if not layers:
        raise InputError(f"{folder / TENSORS}: no adapter on any layer in it")
    return Adapter(
        method=method,
        layers=layers,
        rank=rank,
        alpha=alpha,
        rs=bool(config.get("use_rslora")),
        kept=kept,
        head=head,
        classes=exported.read(folder).classes if (folder / exported.FILE).is_file() else (),
        base=str(config.get("base_model_name_or_path") or ""),
        source=str(folder.resolve()),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _method(config: dict[str, Any], where: str) -> str:
    """The method of an adapter; refuses what is not supported."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise InputError(
            f"{where}: peft_type {kind!r} is not supported, only LORA (with DoRA and rsLoRA) and ADALORA are"
        )
    unknown = {key: value for key, value in config.items() if value and key not in _KNOWN | _WITHOUT_EFFECT}
    if unknown:
        raise InputError(f"{where}: not supported: {', '.join(f'{key}={value!r}' for key, value in unknown.items())}")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias={config['bias']!r} is not supported, only 'none' is: biases of the base stay")
    start = config.get("init_lora_weights")
    if start not in _ORDINARY_STARTS:
        if not str(start).lower().startswith(_CONVERTED):
            raise InputError(f"{where}: init_lora_weights={start!r} is not supported")
        raise InputError(
            f"{where}: init_lora_weights={start!r}: such an adapter belongs to kernels that its start has changed. Save it "
            "with PEFT's path_initial_model_for_weight_conversion, which makes it a LoRA adapter of the original base"
        )
    if kind == "ADALORA":
        if config.get("use_dora") or config.get("use_rslora"):
            raise InputError(f"{where}: use_dora and use_rslora are not supported with ADALORA")
        return "adalora"
    return "dora" if config.get("use_dora") else "lora"


def _sort(
    tensors: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The parts of adapters by module, and the leaves of heads."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    head = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX)
        if match := _PART.fullmatch(short):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        elif match := _HEAD.fullmatch(short):
            kernel = match["leaf"] == "weight"
            head[f"{_HEADS[match['module']]}/{'kernel' if kernel else 'bias'}"] = _turned(tensor) if kernel else tensor
        else:
            raise InputError(f"{where}: {name} is not supported: only adapters and a saved classifier are")
    return modules, head


def _path(module: str, where: str) -> str:
    """Our path of a linear layer."""
    match = re.search(r"\.(\d+)\.", module)
    ours = _BLOCK_0.get(f"{module[: match.start()]}.0.{module[match.end() :]}") if match else None
    if ours is None:
        raise InputError(
            f"{where}: an adapter on {module}, which is no linear layer in a block of a ViT, DeiT or DINOv2 as transformers 4 "
            "or 5 name them"
        )
    return ours.replace("blocks_0", f"blocks_{int(match[1])}")


def _check_shapes(parts: Mapping[str, np.ndarray], where: str) -> None:
    a, b = parts["A"], parts["B"]
    right = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    right = right and ("E" not in parts or parts["E"].shape == (a.shape[0], 1))
    right = right and ("magnitude_vector" not in parts or parts["magnitude_vector"].size == b.shape[0])
    if not right or ("E" not in parts and not a.shape[0]):
        shapes = ", ".join(f"lora_{part} {tensor.shape}" for part, tensor in parts.items())
        raise InputError(f"{where}: {shapes} do not belong together")


def _turned(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)


def _number(table: Mapping[str, Any], key: str, where: str, kind: type, called: str = "") -> Any:
    """A number above 0; `called` is its name in messages, where that is not its key."""
    value = table.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int if kind is int else int | float)
        or not 0 < value < math.inf
    ):
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{where}: {called or key}={value!r}, expected {what} above 0")
    return kind(value)


def _pattern(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key}={value!r}, expected an object")
    return value


def _for_module(pattern: Mapping[str, Any], name: str, module: str, where: str, kind: type) -> Any:
    """What a pattern called `name` says of a module, None for nothing.

    The first key counts that PEFT would find: a regex on the end of the module's name.
    """
    for key in pattern:
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise InputError(f"{where}: {name} has {key!r}, which is no regex: {error}") from None
        if found:
            return _number(pattern, key, where, kind, f"{name}[{key!r}]")
    return None


def _kept(pattern: Mapping[str, Any], module: str, rank: int, left: int, where: str) -> np.ndarray:
    """Which triplets of AdaLoRA a module still has."""
    kept = next((value for key, value in pattern.items() if key.split(".lora_E")[0] == module), [True] * rank)
    if not isinstance(kept, list) or any(type(k) is not bool for k in kept) or (len(kept), sum(kept)) != (rank, left):
        raise InputError(
            f"{where}: rank_pattern of {module} must have {rank} (init_r) of true and false, with {left} of them true, as many "
            "as there are tensors' rows"
        )
    return np.array(kept)


# --- A run that starts from an adapter -------------------------------------------------------------------------------


def resolve(config: configs.Config, base: pretrained.Pretrained | None) -> tuple[configs.Config, Adapter | None]:
    """Reads the adapter of ``config.init_adapter``; returns the config with what it determines filled in, and the adapter.

    Keys of the method (rank, alpha, targets, rank_pattern, rs; of AdaLoRA init_r, alpha, targets) that are at their defaults
    are taken from the adapter; one that is not must agree with it.

    Args:
        config: Of the run.
        base: Its base weights; None for random ones.

    Raises:
        InputError: The adapter cannot be read, or the config does not agree with it; or there is no base.
    """
    if not config.init_adapter:
        return config, None
    if base is None:
        raise InputError(
            f"config key init_adapter={config.init_adapter}: an adapter changes a base, and the weights are random; give the "
            "base as model.pretrained"
        )
    adapter = read(Path(config.init_adapter).expanduser())
    if [name for name in config.methods if name in ("lora", "dora", "adalora", "pissa")] != [adapter.method]:
        raise InputError(
            f"config key init_adapter={config.init_adapter}: is a {adapter.method} adapter, and config.methods is "
            f"{tuple(config.methods)}; set --config.methods={adapter.method}"
        )
    depth = base.model["depth"]
    found = _keys(adapter, depth)
    config = config.copy_and_resolve_references()
    group = "adalora" if adapter.method == "adalora" else "lora"
    mine, default = config[group], configs.default()[group]
    for key, value in found.items():
        if mine[key] not in (default[key], value) and not (
            key == "targets" and _same_layers(mine[key], adapter, depth)
        ):
            raise InputError(
                f"config key {group}.{key}={mine[key]!r}: the adapter in init_adapter={config.init_adapter} has {value!r}. "
                "Leave the key at its default to take the adapter's"
            )
    mine.update(found)
    return config, adapter


def _keys(adapter: Adapter, depth: int) -> dict[str, Any]:
    """What an adapter determines in the config group of its method."""
    paths = set(adapter.layers)
    all_paths = hf_names.layers("vit", "hf5", depth)
    whole = (name for name, regex in lora.TARGETS.items() if {p for p in all_paths if re.search(regex, p)} == paths)
    targets = next(whole, None) or _exactly(paths)
    if adapter.method == "adalora":
        return {"init_r": adapter.rank, "alpha": adapter.alpha, "targets": targets}
    by_rank: dict[int, list[str]] = {}
    for path, parts in adapter.layers.items():
        by_rank.setdefault(parts["a"].shape[1], []).append(path)
    rules = tuple((_exactly(by_rank[rank]), rank) for rank in sorted(by_rank) if rank != adapter.rank)
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": targets, "rank_pattern": rules, "rs": adapter.rs}


def _exactly(paths: Any) -> str:
    return f"^({'|'.join(sorted(paths))})$"


def _same_layers(targets: str, adapter: Adapter, depth: int) -> bool:
    regex = lora.TARGETS.get(targets, targets)
    try:
        return {p for p in hf_names.layers("vit", "hf5", depth) if re.search(regex, p)} == set(adapter.layers)
    except re.error:  # the method says so
        return False


def insert(built: Built, adapter: Adapter, classes: tuple[str, ...]) -> tuple[Built, str]:
    """Puts an adapter in the place of a fresh one, and its head where it is one for `classes`.

    Where the names of the head's classes are not known, their number decides. Triplets that AdaLoRA has pruned get a singular
    value of zero, beside fresh vectors.

    Returns:
        The program with it, and why the head is a fresh one; '' where it came along.

    Raises:
        InputError: The adapter belongs to a model of another size.
    """
    leaves = tree.flatten(built.trainable)
    new = {}
    for path, parts in adapter.layers.items():
        for part, array in parts.items():
            name = f"{COLLECTIONS[adapter.method]}/{path}/dot/{part}"
            if name not in leaves:
                raise InputError(f"{adapter.source}: has an adapter on {path}, which is no layer of the model")
            if adapter.method == "adalora" and not adapter.kept[path].all():
                array = _spread(array, adapter.kept[path], part, built.program.layout.gathered(leaves[name]))
            if array.shape != leaves[name].shape:
                raise InputError(
                    f"{adapter.source}: {part} at {path} has shape {array.shape}, and the model needs {leaves[name].shape}; "
                    "give the base that the adapter was trained on as model.pretrained"
                )
            new[name] = array
    head = head_for(adapter, classes)
    heads = {name: leaf.shape for name, leaf in leaves.items() if name.startswith("params/head")}
    shapes = {name: array.shape for name, array in head.items()}
    why = ""
    if not adapter.head:
        why = "none is saved with it"
    elif not head:
        size = adapter.head.get("head/bias", np.zeros(0)).size
        why = f"its own is for {', '.join(adapter.classes) or f'{size} classes'}, this one for {', '.join(classes)}"
    elif shapes != heads:
        head, why = {}, f"its own has shapes {shapes}, this one {heads}"
    placed = tree.flatten(built.program.layout.put(tree.unflatten({**new, **head})))
    return replace(built, trainable=tree.unflatten({**leaves, **placed})), why


def other_base(adapter: Adapter, weights: Weights) -> str:
    """What to know where an adapter names another base than that of a run; '' where it names that, or none."""
    named = Path(adapter.base).expanduser()
    mine = pretrained.BUNDLED if weights.source == "bundled" else Path(weights.source)
    if not adapter.base or adapter.base == weights.source or named.resolve() == mine.resolve():
        return ""
    return f"the adapter says that its base is {adapter.base}, and that of this run is {weights.source}"


def head_for(adapter: Adapter, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Leaves of the saved head, its outputs in the order of `classes`; none where it is for others."""
    known = adapter.classes or classes
    if set(known) != set(classes):
        return {}
    order = [known.index(name) for name in classes]
    if adapter.head.get("head/bias", np.zeros(0)).size != len(order):
        return {}
    return {f"params/{leaf}": array[..., order] for leaf, array in adapter.head.items()}


def _spread(array: np.ndarray, kept: np.ndarray, part: str, fresh: jax.Array) -> np.ndarray:
    """An array of AdaLoRA's triplets that are kept, among those that are not."""
    whole = np.array(fresh)
    if part == "q":
        whole[:, kept] = array
    elif part == "p":
        whole[kept] = array
    else:
        whole[:] = 0
        whole[kept] = array
    return whole
