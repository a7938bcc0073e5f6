"""The adapter alone, as Hugging Face's PEFT loads it on the base model: `adapter_config.json`, `adapter_model.safetensors`.

LoRA and DoRA are written as they are, AdaLoRA with the triplets that it kept, PiSSA as LoRA of twice the rank on the original
base. The head is saved too. Logits are those of the run before its temperature, so an adapter can go on training.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from vitft_jax import exported, hf_names, report, tree
from vitft_jax.errors import InputError, nearest
from vitft_jax.export import hugging_face
from vitft_jax.export.source import Options, Source
from vitft_jax.methods import adalora, lora, pissa
from vitft_jax.peft import CONFIG, PREFIX, TENSORS
from vitft_jax.pretrained import BUNDLED

Layers = Mapping[str, Mapping[str, np.ndarray]]


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Writes the adapter.

    Raises:
        InputError: The run has no adapter, trains more than that and the head, or computes with another method; or its base
            is no model of transformers.
    """
    naming = options.naming or hf_names.SCHEMES[0]
    if naming not in hf_names.SCHEMES:
        raise InputError(f"--naming {naming}: {nearest(naming, hf_names.SCHEMES)}")
    source.refuse_methods("peft")
    write_adapter = _writer(source)
    model = source.architecture
    family = _family(source, model)
    modules = hf_names.layers(family, naming, model["depth"])
    config, tensors = write_adapter(source, modules)
    _check_only_heads(source)
    heads = hf_names.heads(model)
    params = source.params(calibrated=False)
    if family == "dinov2":
        params["head/kernel"] = hugging_face.head_of_dinov2(params["head/kernel"], model["features"])
    for head, module in heads.items():
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            tensors[f"{module}.{name}"] = hugging_face.convert(f"{head}/{leaf}", params[f"{head}/{leaf}"])
    weights = source.best.built.weights
    report.write_json(
        folder / CONFIG,
        {
            "task_type": None,
            "base_model_name_or_path": str(BUNDLED) if weights.source == "bundled" else weights.source,
            "revision": weights.revision or None,
            "inference_mode": True,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": list(heads.values()),
            "target_modules": targets([modules[path] for path in _paths(source)], list(modules.values())),
            **config,
        },
    )
    prefixed = {PREFIX + name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    save_file(prefixed, folder / TENSORS, metadata={"format": "pt"})
    about = source.about("peft", calibrated=False)
    exported.write(folder, about, naming=naming)
    notes = [*source.notes(), f"module names are those of transformers {naming[-1]}"]
    if about.temperature != 1:
        notes.append(
            f"logits are those before the run's temperature: divide them by {about.temperature:.4f} for its probabilities"
        )
    base = source.best.source
    if base.image_size != about.image_size and family != "dinov2":
        notes.append(
            f"the base is for {base.image_size} pixels and the run for {about.image_size}: call the model with "
            "interpolate_pos_encoding=True"
        )
    return [*notes, *hugging_face.write_processor(folder, about)]


def targets(adapted: list[str], modules: list[str]) -> list[str]:
    """`target_modules` that select the modules `adapted` out of `modules`: the ends of their names where these are enough."""
    for parts in (1, 2, 3):
        ends = sorted({".".join(name.split(".")[-parts:]) for name in adapted})
        if {name for name in modules if any(name.endswith(f".{end}") for end in ends)} == set(adapted):
            return ends
    return sorted(adapted)


def _writer(source: Source) -> Callable[[Source, Mapping[str, str]], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    writers = {"lora": _lora, "dora": _lora, "pissa": _lora, "adalora": _adalora}
    methods = source.best.config.methods
    for name in methods:
        if name in writers:
            return writers[name]
    raise InputError(
        f"--workdir {source.workdir}: has no adapter (config.methods={tuple(methods)}); --format hf writes the whole model"
    )


def _family(source: Source, model: dict[str, Any]) -> str:
    """The family of the base, which must be a model of transformers with the head that the run has."""
    base, weights = source.best.source, source.best.built.weights
    family = hf_names.family_of(model)
    of_base = hf_names.family_of({**base.model, "features": _features(base.model)}) if base else ""
    if base is None or base.library != "hugging_face" or family != of_base:
        raise InputError(
            f"--workdir {source.workdir}: PEFT puts an adapter on a model of transformers, and the base of this run, "
            f"{weights.source}, is none with a head like the run's; --format hf writes the whole model"
        )
    return family


def _features(model: dict[str, Any]) -> str:
    return "cls+mean" if model["layer_scale"] else "cls"


def _check_only_heads(source: Source) -> None:
    others = [name for name in tree.flatten(source.best.trainable.get("params", {})) if not name.startswith("head")]
    if others:
        raise InputError(
            f"--workdir {source.workdir}: trains {others[0]} too (train.trainable={source.best.config.train.trainable!r}), "
            "which an adapter file with a head does not hold; --format hf writes the whole model"
        )


def _paths(source: Source) -> list[str]:
    """Paths of the layers with an adapter that holds anything."""
    leaves = tree.flatten(
        {k: v for k, v in source.best.trainable.items() if k in (lora.COLLECTION, adalora.COLLECTION)}
    )
    return sorted({name.split("/", 1)[1].split("/dot/")[0] for name in leaves})


def _modules_of(layers: Layers, modules: Mapping[str, str], source: Source) -> dict[str, Mapping[str, np.ndarray]]:
    """Adapters by the names of their modules."""
    if outside := [path for path in layers if path not in modules]:
        raise InputError(
            f"--workdir {source.workdir}: has an adapter on {outside[0]}, which is no linear layer of a block; --format hf "
            "writes the whole model"
        )
    return {modules[path]: parts for path, parts in layers.items()}


def _lora(source: Source, modules: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of LoRA, DoRA, and PiSSA as LoRA."""
    settings = lora.settings_of(source.best.config)
    collection = source.best.trainable[lora.COLLECTION]
    if "pissa" in source.best.config.methods:
        collection, settings = pissa.to_lora(collection, source.best.built.trainable[lora.COLLECTION], settings)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, leaf in tree.flatten(jax.device_get(collection)).items():
        path, part = name.split("/dot/")
        layers.setdefault(path, {})[part] = leaf
    tensors, ranks = {}, {}
    for module, parts in _modules_of(layers, modules, source).items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = parts["a"].T, parts["b"].T
        if "m" in parts:
            tensors[f"{module}.lora_magnitude_vector"] = parts["m"]
        if parts["a"].shape[1] != settings.rank:
            ranks[module] = parts["a"].shape[1]
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rs,
        "use_dora": "dora" in source.best.config.methods,
        "rank_pattern": ranks,
        "alpha_pattern": {},
    }, tensors


def _adalora(source: Source, modules: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of AdaLoRA, without the triplets whose singular value is zero."""
    c, steps = source.best.config.adalora, source.best.task.total_steps
    layers = adalora.layers(jax.device_get(source.best.trainable[adalora.COLLECTION]))
    tensors, pattern = {}, {}
    for module, parts in _modules_of(layers, modules, source).items():
        kept = parts["lam"] != 0
        pattern[f"{module}.lora_E"] = kept.tolist()
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = parts["q"].T[kept], parts["p"].T[:, kept]
        tensors[f"{module}.lora_E"] = parts["lam"][kept, None]
    start, end = round(c.t_init * steps), steps - round(c.t_final * steps)
    return {
        "peft_type": "ADALORA",
        "init_r": c.init_r,
        "target_r": c.target_r,
        "lora_alpha": c.alpha,
        "lora_dropout": 0.0,
        "tinit": start,
        "tfinal": steps - end,
        "deltaT": c.delta_t,
        "total_step": steps,
        "beta1": adalora.BETA_SENSITIVITY,
        "beta2": adalora.BETA_UNCERTAINTY,
        "orth_reg_weight": c.penalty,
        "rank_pattern": pattern,
    }, tensors
