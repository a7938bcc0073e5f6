"""The whole model for transformers: `config.json`, `model.safetensors`, and where possible `preprocessor_config.json`.

Names are those that transformers 4 and 5 read (`hf_names`). The temperature of the run is in the head, so a softmax over the
logits (sigmoids, for several labels) gives the probabilities that `vitft_jax.predict` gives.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vitft_jax import exported, hf_names, report
from vitft_jax.errors import InputError
from vitft_jax.export.source import Options, Source
from vitft_jax.exported import About

BICUBIC = 3  # of PIL
READS = (
    "other programs read images as 8-bit RGB: bring 16-bit, float and transparent images to that by vitft_jax.data.decode, "
    "DICOM files by vitft_jax.data.dicom.read. Images of at least four times the model's side each way are reduced in two "
    "steps by vitft_jax, in one elsewhere"
)


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Writes the model.

    Raises:
        InputError: transformers has no such model, or the run computes with a method.
    """
    source.refuse_methods("hf")
    about = source.about("hf")
    model = source.architecture
    family = hf_names.family_of(model)
    save_file(tensors(source.params(), model, family), folder / "model.safetensors", metadata={"format": "pt"})
    report.write_json(folder / "config.json", config(model, family, about))
    exported.write(folder, about)
    return [*source.notes(), *write_processor(folder, about)]


def config(model: dict[str, Any], family: str, about: About) -> dict[str, Any]:
    """Contents of `config.json`.

    Raises:
        InputError: The family cannot have an MLP of this width.
    """
    if family != "dinov2":
        mlp = {"intermediate_size": model["hidden"]}
    elif model["hidden"] % model["width"]:
        raise InputError(
            f"transformers' DINOv2 has MLPs of whole multiples of its width {model['width']}, not {model['hidden']}; use "
            "--format timm or stablehlo"
        )
    else:
        mlp = {"mlp_ratio": model["hidden"] // model["width"], "use_swiglu_ffn": False, "drop_path_rate": 0.0}
    return {
        "architectures": [hf_names.architecture(model)],
        "model_type": family,
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["heads"],
        **mlp,
        "hidden_act": "gelu",
        "layer_norm_eps": model["eps"],
        "image_size": about.image_size,
        "patch_size": model["patch"],
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): name for i, name in enumerate(about.classes)},
        "label2id": {name: i for i, name in enumerate(about.classes)},
        "problem_type": "multi_label_classification" if about.multilabel else "single_label_classification",
    }


def tensors(params: dict[str, np.ndarray], model: dict[str, Any], family: str) -> dict[str, np.ndarray]:
    """Tensors as transformers names and shapes them, of our leaves."""
    params = dict(params)
    if family == "dinov2":
        ones = np.ones(model["width"], np.float32)
        if not model["layer_scale"]:
            params |= {f"blocks_{i}/scale{j}/scale": ones for i in range(model["depth"]) for j in (1, 2)}
        params["head/kernel"] = head_of_dinov2(params["head/kernel"], model["features"])
    names = hf_names.tensors(family, model)
    renamed = {hf_names.tensor(names, leaf): convert(leaf, array) for leaf, array in params.items()}
    if family == "dinov2":
        renamed["dinov2.embeddings.mask_token"] = np.zeros((1, model["width"]), np.float32)  # of pretraining
    return renamed


def head_of_dinov2(kernel: np.ndarray, features: str) -> np.ndarray:
    """The kernel of a head that reads the class token and the mean, `(2 D, C)`: zero at what this one does not read."""
    parts = {"cls": (kernel, 0 * kernel), "mean": (0 * kernel, kernel), "cls+mean": (kernel,)}
    return np.concatenate(parts[features])


def convert(leaf: str, array: np.ndarray) -> np.ndarray:
    """One of our leaves as torch has it."""
    if leaf == "embed/patch/kernel":  # (p p 3, D) to (D, 3, p, p)
        side = round((array.shape[0] / 3) ** 0.5)
        return np.ascontiguousarray(array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1))
    # Contiguous, because safetensors writes a transposed view in the wrong order.
    return np.ascontiguousarray(array.T) if leaf.endswith("/kernel") else np.ascontiguousarray(array)


def write_processor(folder: Path, about: About) -> list[str]:
    """Writes `preprocessor_config.json`; returns where it differs from the run's own preprocessing."""
    notes = [READS]
    if about.fit == "pad":
        return [
            "no preprocessor_config.json: image processors of transformers cannot pad to a centred square (data.fit='pad'). "
            "Prepare images by vitft_jax.load(DIR).prepare(image), then x / 255, mean and std as in vitft_jax.json",
            *notes,
        ]
    side = {"height": about.image_size, "width": about.image_size}
    common = {
        "do_resize": True,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(about.mean),
        "image_std": list(about.std),
        "do_convert_rgb": True,
    }
    if about.fit == "squash":
        processor = {"image_processor_type": "ViTImageProcessor", "size": side, **common}
    else:
        processor = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": about.image_size},
            "do_center_crop": True,
            "crop_size": side,
            **common,
        }
        notes.insert(
            0,
            "the image processor resizes first and crops by whole pixels, vitft_jax in one step (data.fit='crop'): images "
            "that are not square come out shifted by a fraction of a pixel, and answers differ",
        )
    report.write_json(folder / "preprocessor_config.json", processor)
    return notes
