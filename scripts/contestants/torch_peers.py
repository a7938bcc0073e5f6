"""The same work in torch: by transformers (with PEFT for adapters), timm, torch.compile, or a plain EViT."""

import argparse
import os
from typing import Any

import contest
import torch

from contestants import (
    ADALORA,
    ALPHA,
    CLASSES,
    FORWARD,
    LEARNING_RATE,
    RANK,
    STEPS,
    Built,
    Label,
    images_of,
)  # fmt: skip


def build(who: Label, options: argparse.Namespace) -> Built:
    """A forward pass or a train step."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    images = torch.randn(images_of(who.task, options.batch), 3, options.size, options.size)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=who.dtype == "bfloat16")
    if who.name == "evit":
        return evit(options, images, cast)
    model = network(who, options)
    if who.task == "int8":
        model = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear}, dtype=torch.qint8)
    if who.task in FORWARD:
        model.eval()
        if who.name == "compiled":
            model = torch.compile(model)

        def forward() -> None:
            with torch.inference_mode(), cast:
                logits_of(who, model, images)

        return Built(forward, {})
    return Built(train_step(who, model, images, cast), {})


def network(who: Label, options: argparse.Namespace) -> Any:
    """The model with its adapters."""
    if who.name == "timm":
        import timm

        contest.imported()
        return timm.create_model(f"{options.model}_224", num_classes=CLASSES, img_size=options.size)
    import transformers

    if who.task in ("lora", "adalora"):
        import peft
    contest.imported()
    shape = options.shape
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=shape["width"],
            num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"],
            intermediate_size=shape["hidden"],
            patch_size=shape["patch"],
            image_size=options.size,
            num_labels=CLASSES,
        )
    )
    if who.task == "lora":
        settings = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
        )
        return peft.get_peft_model(model, settings)
    if who.task == "adalora":
        settings = peft.AdaLoraConfig(
            **ADALORA,
            target_modules=["q_proj", "k_proj", "v_proj"],
            tinit=STEPS // 10,
            tfinal=STEPS // 5 * 2,
            total_step=STEPS,
            modules_to_save=["classifier"],
        )
        return peft.get_peft_model(model, settings)
    return model


def logits_of(who: Label, model: Any, images: Any) -> Any:
    """Logits of images."""
    out = model(images)
    return out if who.name == "timm" else out.logits


def train_step(who: Label, model: Any, images: Any, cast: Any) -> Any:
    """AdamW with clipping, as ours; AdaLoRA's penalty and allocation as PEFT asks for them."""
    labels = torch.arange(len(images)) % CLASSES
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Fused, as transformers' own trainer has it by default; torch's loop over tensors is slower.
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    done = 0

    def turn() -> None:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        with cast:
            if who.task == "adalora":  # called past the outer model, which has no penalty for images
                loss = model.base_model(images, labels=labels).loss
            else:
                loss = torch.nn.functional.cross_entropy(logits_of(who, model, images).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if who.task == "adalora":
            model.base_model.update_and_allocate(done)
            done += 1

    return turn


def evit(options: argparse.Namespace, images: Any, cast: Any) -> Built:
    """The plain EViT of scripts/evit.py, with the setting of our `prune`."""
    import evit as plain

    contest.imported()
    shape, patches = options.shape, (options.size // options.shape["patch"]) ** 2
    width, hidden = shape["width"], shape["hidden"]
    kernels = {"embed/patch": (3 * shape["patch"] ** 2, width), "head": (width, CLASSES)}
    norms = ["norm"]
    for i in range(shape["depth"]):
        kernels |= {f"blocks_{i}/attn/{name}": (width, width) for name in ("query", "key", "value", "out")}
        kernels |= {f"blocks_{i}/mlp/fc1": (width, hidden), f"blocks_{i}/mlp/fc2": (hidden, width)}
        norms += [f"blocks_{i}/norm1", f"blocks_{i}/norm2"]
    parameters = {f"{name}/kernel": 0.02 * torch.randn(shape) for name, shape in kernels.items()}
    parameters |= {f"{name}/bias": torch.zeros(shape[1]) for name, shape in kernels.items()}
    parameters |= {f"{name}/scale": torch.ones(width) for name in norms}
    parameters |= {f"{name}/bias": torch.zeros(width) for name in norms}
    parameters |= {"embed/cls_token": torch.zeros(1, 1, width), "embed/position": torch.zeros(1, 1 + patches, width)}
    images = images.permute(0, 2, 3, 1)
    skip = {"layers": (3, 6, 9), "drop_ratio": (0.3,) * 3}

    def forward() -> None:
        with torch.inference_mode(), cast:
            plain.logits(parameters, images, shape["heads"], shape["patch"], skip)

    return Built(forward, {})
