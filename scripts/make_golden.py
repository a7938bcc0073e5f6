"""Writes `tests/golden/*.npz`: tiny random models of transformers and timm with their logits at three image sizes.

    PYTHONPATH=. python scripts/make_golden.py

Needs the extra `interop`. Each file holds `config` (the library's config.json, as text), `tensor/<name>` as the library
writes them, and `image/<size>` (NCHW) with `logits/<size>`. Size 16 is native; 24 and 12 resample the positions.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
SIZES = (16, 24, 12)
CLASSES = 5
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZES[0],
    "patch_size": 4,
    "num_labels": CLASSES,
}
TIMM = {"img_size": SIZES[0], "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}

PEFT = {  # of lora.npz, dora.npz and pissa.npz; `peft_names.SETTINGS` in the tests states the same in our terms
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    "rank_pattern": {"layers.1.attention.q_proj": 2},
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter a value that matters: gains in 0.5..1.5, all else N(0, 0.2)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and not name.endswith("bias")
            parameter.uniform_(0.5, 1.5) if gain else parameter.normal_(0, 0.2)
    return model.eval()


def hugging_face(model_class: type, config: transformers.PreTrainedConfig) -> tuple[dict, str, Callable]:
    """Returns tensors and config as `save_pretrained` writes them, and a function from images to logits."""
    model = randomise(model_class(config))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        text = (Path(folder) / "config.json").read_text()
    # DINOv2 always interpolates its positions; the others must be told to.
    how = {} if config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    return tensors, text, lambda images: model(images, **how).logits


def of_timm(architecture: str, **overrides: object) -> tuple[dict, str, Callable]:
    """Returns tensors and config as timm writes them for the Hub, and a function from images to logits."""
    model = randomise(timm.create_model(architecture, dynamic_img_size=True, **{**TIMM, **overrides}))
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        tensors = load_file(Path(folder) / "model.safetensors")
        text = (Path(folder) / "config.json").read_text()
    return tensors, text, model


def augreg() -> tuple[dict, str, Callable]:
    """Returns random tensors as AugReg's .npz files name and shape them, and timm's model after importing them."""
    width, heads, hidden, patch = 32, 2, 64, 4
    shapes = {
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, 1 + (SIZES[0] // patch) ** 2, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, CLASSES),
        "head/bias": (CLASSES,),
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for role in ("query", "key", "value"):
            shapes[f"{attention}/{role}/kernel"] = (width, heads, width // heads)
            shapes[f"{attention}/{role}/bias"] = (heads, width // heads)
        shapes |= {f"{attention}/out/kernel": (heads, width // heads, width), f"{attention}/out/bias": (width,)}
        for j, (rows, columns) in enumerate([(width, hidden), (hidden, width)]):
            dense = f"{block}/MlpBlock_3/Dense_{j}"
            shapes |= {f"{dense}/kernel": (rows, columns), f"{dense}/bias": (columns,)}
    rng = np.random.default_rng(7)
    tensors = {
        name: (rng.uniform(0.5, 1.5, shape) if name.endswith("scale") else rng.normal(0, 0.2, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    model = timm.create_model("vit_small_patch16_224", dynamic_img_size=True, num_classes=CLASSES, **TIMM).eval()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "weights.npz", **tensors)
        model.load_pretrained(str(Path(folder) / "weights.npz"))
    return tensors, "", model


def peft_lora(**changes: object) -> tuple[dict, str, Callable]:
    """Returns a ViT's tensors with those of a random PEFT adapter (prefix `base_model.model.`), and the adapted model."""
    import peft

    tensors, text, _ = hugging_face(
        transformers.ViTForImageClassification, transformers.ViTConfig(**HF, intermediate_size=64)
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        base = transformers.ViTForImageClassification.from_pretrained(folder)
        model = peft.get_peft_model(base, peft.LoraConfig(**PEFT, **changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, 0.2)
        model.eval().save_pretrained(folder)
        tensors |= load_file(Path(folder) / "adapter_model.safetensors")
    return tensors, text, lambda images: model(images, interpolate_pos_encoding=True).logits


def make() -> dict[str, Callable[[], tuple[dict, str, Callable]]]:
    """The families: name of the golden file to what makes it."""
    t = transformers
    return {
        "vit": lambda: hugging_face(t.ViTForImageClassification, t.ViTConfig(**HF, intermediate_size=64)),
        "deit": lambda: hugging_face(t.DeiTForImageClassification, t.DeiTConfig(**HF, intermediate_size=64)),
        "deit_teacher": lambda: hugging_face(
            t.DeiTForImageClassificationWithTeacher, t.DeiTConfig(**HF, intermediate_size=64)
        ),
        "dinov2": lambda: hugging_face(t.Dinov2ForImageClassification, t.Dinov2Config(**HF, mlp_ratio=2)),
        "timm_vit": lambda: of_timm("vit_small_patch16_224", num_classes=CLASSES),
        "timm_deit": lambda: of_timm("deit_small_distilled_patch16_224", num_classes=CLASSES),
        "timm_deit3": lambda: of_timm("deit3_small_patch16_224", num_classes=CLASSES),
        "timm_dinov2": lambda: of_timm("vit_small_patch14_dinov2", num_classes=CLASSES),
        "augreg": augreg,
        "lora": peft_lora,
        "dora": lambda: peft_lora(use_dora=True),
        "pissa": lambda: peft_lora(init_lora_weights="pissa"),
    }


def main() -> None:
    """Writes all files, or those named on the command line."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    families = make()
    for family in sys.argv[1:] or families:
        torch.manual_seed(zlib.crc32(family.encode()))
        tensors, config, logits = families[family]()
        arrays = {f"tensor/{name}": tensor for name, tensor in tensors.items()}
        for size in SIZES:
            images = torch.randn(2, 3, size, size)
            with torch.no_grad():
                arrays |= {f"image/{size}": images.numpy(), f"logits/{size}": logits(images).numpy()}
        np.savez_compressed(GOLDEN / f"{family}.npz", config=np.array(config), **arrays)
        spread = float(np.std(arrays["logits/16"]))
        print(json.dumps({"family": family, "logits_std": spread, "bytes": (GOLDEN / f"{family}.npz").stat().st_size}))


if __name__ == "__main__":
    main()
