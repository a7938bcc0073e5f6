"""Writes `tests/golden/*.npz`: what transformers, timm, PEFT and a small EViT in torch compute with tiny random models.

    PYTHONPATH=. python scripts/make_golden.py

Needs the extra `interop`. The file of a model of transformers or timm holds `config` (the library's config.json, as text),
`tensor/<name>` as the library writes them, and `image/<size>` (NCHW) with `logits/<size>`. Size 16 is native; 24 and 12
resample the positions. `adalora.npz` is described at `peft_adalora`, `skip.npz` at `skipping`, `rollout.npz` at `rollouts`.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import evit
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

ADALORA = {  # of adalora.npz; tests/peft_names.py states the same settings in our terms
    "init_r": 4,
    "target_r": 2,
    "lora_alpha": 8,
    "tinit": 2,
    "tfinal": 6,
    "deltaT": 3,
    "total_step": 20,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}

ROLLED_OUT = {  # families in rollout.npz
    "vit": transformers.ViTForImageClassification,
    "deit": transformers.DeiTForImageClassification,
    "deit_teacher": transformers.DeiTForImageClassificationWithTeacher,
    "dinov2": transformers.Dinov2ForImageClassification,
}

SKIP = {"patch": 4, "width": 16, "depth": 4, "heads": 2, "hidden": 16, "classes": CLASSES}  # model of skip.npz


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


def peft_adalora() -> dict[str, np.ndarray]:
    """Records a run of PEFT's AdaLoRA, so that an allocator can be replayed on it.

    Holds, by name of an adapter's parameter without its prefix and suffix: `initial/<name>`, and for every step
    `gradient/<name>` (clipped), `update/<name>` (what AdamW adds, before the mask), and of the parameters `lora_E` their
    values after the step, `value/<name>`, and PEFT's pattern by then, `mask/<name>`.
    """
    import peft

    base = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    )
    config = peft.AdaLoraConfig(**ADALORA)
    model = peft.get_peft_model(randomise(base), config).train()
    adapters = {
        name.removeprefix("base_model.model.").removesuffix(".default"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    optimizer = torch.optim.AdamW(adapters.values(), lr=0.02, weight_decay=0.0)
    arrays = {f"initial/{name}": parameter.detach().numpy().copy() for name, parameter in adapters.items()}
    steps: dict[str, list[np.ndarray]] = {}
    for step in range(1, config.total_step + 1):
        optimizer.zero_grad()
        # Not `model(...)`: that goes past the tuner, which is what adds the penalty.
        model.base_model(pixel_values=torch.randn(8, 3, 8, 8), labels=torch.randint(CLASSES, (8,))).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        before = {name: parameter.detach().clone() for name, parameter in adapters.items()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in adapters.items():
                update = parameter - before[name]
                parameter.copy_(before[name] + update)  # the sum of two floats, so that a replay gets the same
                steps.setdefault(f"update/{name}", []).append(update.numpy().copy())
                steps.setdefault(f"gradient/{name}", []).append(parameter.grad.numpy().copy())
        model.base_model.update_and_allocate(step)
        patterns = model.peft_config["default"].rank_pattern  # None before the first allocation
        for name, parameter in adapters.items():
            if name.endswith("lora_E"):
                kept = patterns[f"{name}.default"] if patterns else [True] * config.init_r
                steps.setdefault(f"value/{name}", []).append(parameter.detach().numpy().copy())
                steps.setdefault(f"mask/{name}", []).append(np.array(kept))
    return arrays | {name: np.stack(values) for name, values in steps.items()}


def skipping() -> dict[str, np.ndarray]:
    """Records token skipping by `evit`, for a model without and one with a distillation token.

    Holds `model` and `cases` (settings of `config.skip`) as JSON text, `images` (NHWC), and for each kind `plain` and
    `distilled`: `parameters/<kind>`, all of them in one vector, in the order of their names; `logits/<kind>/<case>`; and
    `gradient/<kind>/<case>`, that of the sum of the logits' sines with respect to the position embeddings. Parameters and
    images are float16, so that the file is small.
    """
    import jax

    from vitft_jax import tree, vit

    images = torch.randn(2, SIZES[0], SIZES[0], 3).half()
    arrays = {name: np.array(json.dumps(value)) for name, value in (("model", SKIP), ("cases", evit.CASES))}
    arrays["images"] = images.numpy()
    for kind in ("plain", "distilled"):
        model = vit.ViT(**SKIP, distilled=kind == "distilled")
        shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), images.float().numpy())["params"])
        drawn = {
            name: (float(name.endswith("scale")) + 0.3 * torch.randn(shapes[name].shape)).half()
            for name in sorted(shapes)
        }
        arrays[f"parameters/{kind}"] = np.concatenate([leaf.numpy().ravel() for leaf in drawn.values()])
        for case, settings in evit.CASES.items():
            p = {name: leaf.float() for name, leaf in drawn.items()}
            position = p["embed/position"].requires_grad_()
            logits = evit.logits(p, images.float(), SKIP["heads"], SKIP["patch"], settings)
            (gradient,) = torch.autograd.grad(logits.sin().sum(), position)
            arrays |= {f"logits/{kind}/{case}": logits.detach().numpy(), f"gradient/{kind}/{case}": gradient.numpy()}
    return arrays


def rolled_out(family: str, tensors: dict, text: str, images: np.ndarray) -> np.ndarray:
    """Attention roll-out of NCHW images, `(B, tokens)`, from the attention that transformers gives out."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = ROLLED_OUT[family].from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        layers = model(torch.from_numpy(images), output_attentions=True).attentions
    rolled = torch.eye(layers[0].shape[-1])
    for layer in layers:
        mixed = layer.mean(dim=1) + torch.eye(layer.shape[-1])
        rolled = mixed / mixed.sum(dim=-1, keepdim=True) @ rolled
    read = {
        "vit": lambda: rolled[:, 0],
        "deit": lambda: rolled[:, 0],
        "deit_teacher": lambda: (rolled[:, 0] + rolled[:, 1]) / 2,
        "dinov2": lambda: (rolled[:, 0] + rolled[:, 1:].mean(dim=1)) / 2,
    }
    return read[family]().numpy()


def rollouts() -> dict[str, np.ndarray]:
    """`<family>`: `rolled_out` of the models and images (of size 16) that stand in the golden files of these families."""
    arrays = {}
    for family in ROLLED_OUT:
        with np.load(GOLDEN / f"{family}.npz", allow_pickle=False) as file:
            tensors = {name.removeprefix("tensor/"): file[name] for name in file.files if name.startswith("tensor/")}
            arrays[family] = rolled_out(family, tensors, str(file["config"]), file[f"image/{SIZES[0]}"])
    return arrays


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


def with_logits(tensors: dict, config: str, logits: Callable) -> dict[str, np.ndarray]:
    """Arrays of the file of a model."""
    arrays = {f"tensor/{name}": tensor for name, tensor in tensors.items()}
    for size in SIZES:
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            arrays |= {f"image/{size}": images.numpy(), f"logits/{size}": logits(images).numpy()}
    return arrays | {"config": np.array(config)}


def main() -> None:
    """Writes all files, or those named on the command line."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    families, others = make(), {"adalora": peft_adalora, "skip": skipping, "rollout": rollouts}
    for name in sys.argv[1:] or [*families, *others]:
        torch.manual_seed(zlib.crc32(name.encode()))
        arrays = others[name]() if name in others else with_logits(*families[name]())
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
        spread = float(np.std(arrays["logits/16"])) if "logits/16" in arrays else None
        print(json.dumps({"name": name, "logits_std": spread, "bytes": (GOLDEN / f"{name}.npz").stat().st_size}))


if __name__ == "__main__":
    main()
