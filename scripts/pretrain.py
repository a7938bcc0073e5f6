"""Trains the weights that come with the package: a micro ViT on generated ultrasound of the source domain.

    python scripts/pretrain.py --output vitft_jax/weights/phantom_micro

The generator knows where each lesion is, so beside the class of the image (read from the class token) every patch learns its
share of benign and malignant lesion: from classes alone a ViT learns next to nothing on so few images. The images are
of other patients than those of the set 'source', on which the accuracy is measured; nothing of the target domain is seen.
Written as a Hugging Face ViT: `config.json`, `model.safetensors` (float16) and `preprocessor_config.json`; what made it, and
how good it is on that set, is in `pretraining.json` beside.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from vitft_jax import config as configs
from vitft_jax import data, metrics, report, runtime, tree
from vitft_jax.data import cases
from vitft_jax.data.anatomy import CLASSES, View, breast
from vitft_jax.data.ultrasound import SIDE, display, scan, scan_lines
from vitft_jax.vit import VARIANTS, ViT

VARIANT = "vit_micro_patch16"
STREAM = 77  # of random numbers; the generated sets use others
EPS = 1e-12  # LayerNorm epsilon of Hugging Face's ViT
# All patch tokens are needed here, so the last block must not be cut down to the class token.
MODEL = ViT(**VARIANTS[VARIANT], classes=0, features="mean", eps=EPS)
PATCH, WIDTH = MODEL.patch, MODEL.width
GRID = SIDE // PATCH


def example(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `number`, uint8 (SIDE, SIDE), and the share of lesion in each of its patches, float32 (GRID, GRID)."""
    rng = np.random.default_rng((cases.SEED, STREAM, number))
    domain = cases.DOMAINS["source"]
    domain = replace(domain, gain_db=domain.gain_db + rng.normal(0, 3))
    view = View(0.0, (rng.uniform(-4, 4), rng.uniform(0, 2)), (cases.SEED, STREAM, number, 1))
    patient = (cases.SEED, STREAM, number, 2)
    section = breast(patient, CLASSES[number % len(CLASSES)], view, *cases.extent(domain))
    lines = scan_lines(domain)
    lesion = display(section.lesion(lines.x, lines.z), domain) / np.float32(255)
    return scan(section, domain, rng), lesion.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))


def initial(seed: int) -> dict[str, Any]:
    """Parameters of the ViT, of its head, and of the head that every patch token has while pretraining."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = dict(jax.jit(MODEL.init)(keys[0], jnp.zeros((1, SIDE, SIDE, 3)))["params"])
    for name, key in zip(("head", "patch_head"), keys[1:], strict=True):
        kernel = 0.02 * jax.random.normal(key, (WIDTH, len(CLASSES)))
        params[name] = {"kernel": kernel, "bias": jnp.zeros(len(CLASSES))}
    return params


def outputs(params: dict[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of the image `(B, 3)` and of its patches `(B, GRID^2, 3)`; images float `(B, SIDE, SIDE)` in 0..1."""
    backbone = {name: value for name, value in params.items() if not name.endswith("head")}
    x = jnp.repeat((images[..., None] - 0.5) / 0.5, 3, axis=-1)
    _, seen = MODEL.apply({"params": backbone}, x, capture_intermediates=lambda module, _: module.name == "norm")
    tokens = seen["intermediates"]["norm"]["__call__"][0]
    heads = (params["head"], params["patch_head"])
    parts = (tokens[:, 0], tokens[:, MODEL.prefix :])
    image, patches = (x @ head["kernel"] + head["bias"] for x, head in zip(parts, heads, strict=True))
    return image, patches


def loss(
    params: dict[str, Any], images: jax.Array, labels: jax.Array, lesion: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Cross-entropy of the image's class plus that of the patches, whose targets are shares of tissue; and both parts."""
    image, patches = outputs(params, images)
    lesion = lesion.reshape(len(labels), -1, 1)
    targets = lesion * jax.nn.one_hot(labels, len(CLASSES))[:, None] + (1 - lesion) * jnp.eye(len(CLASSES))[0]
    whole = optax.softmax_cross_entropy_with_integer_labels(image, labels).mean()
    # Lesions cover few patches: without more weight on those, all patches would say 'normal' for long.
    weight = 1 + 9 * lesion[..., 0]
    part = (weight * optax.softmax_cross_entropy(patches, targets)).mean()
    return whole + part, (whole, part)


def augment(key: jax.Array, images: jax.Array, lesion: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirrors half of the images, and changes their gain and contrast by up to a quarter."""
    flip, gain, contrast = jax.random.split(key, 3)
    count = (len(images), 1, 1)
    mirrored = jax.random.bernoulli(flip, 0.5, count)
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    lesion = jnp.where(mirrored, lesion[:, :, ::-1], lesion)
    images = images * jax.random.uniform(contrast, count, minval=0.75, maxval=1.25)
    return jnp.clip(images + jax.random.uniform(gain, count, minval=-0.12, maxval=0.12), 0, 1), lesion


@partial(jax.jit, static_argnames="tx", donate_argnums=(0, 1))
def step(
    params: Any, state: Any, batch: tuple[Any, Any, Any], key: jax.Array, *, tx: optax.GradientTransformation
) -> tuple[Any, Any, jax.Array]:
    """One optimiser step."""
    images, labels, lesion = batch
    images, lesion = augment(key, images.astype(jnp.float32) / 255, lesion)
    (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params, images, labels, lesion)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, jnp.stack(parts)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Generates the images and trains; returns the parameters."""
    started = time.perf_counter()
    with ProcessPoolExecutor() as pool:
        made = list(pool.map(example, range(options.images), chunksize=64))
    images, lesion = (np.stack(parts) for parts in zip(*made, strict=True))
    labels = np.arange(options.images) % len(CLASSES)
    print(f"{len(images)} images made in {time.perf_counter() - started:.0f} s", flush=True)
    per_epoch = len(images) // options.batch
    total = options.epochs * per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.lr, total // 10, total)
    decay = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05, mask=decay))
    params = initial(options.seed)
    state, key = tx.init(params), jax.random.key(options.seed + 1)
    for epoch in range(options.epochs):
        order = np.random.default_rng((options.seed, epoch)).permutation(len(images))
        losses = []
        for i in range(per_epoch):
            rows = order[i * options.batch : (i + 1) * options.batch]
            key, now = jax.random.split(key)
            params, state, parts = step(params, state, (images[rows], labels[rows], lesion[rows]), now, tx=tx)
            losses.append(parts)
        print(
            "epoch {}/{}  loss of images {:.4f}, of patches {:.4f}  {:.0f} s".format(
                epoch + 1, options.epochs, *np.mean(jax.device_get(losses), axis=0), time.perf_counter() - started
            ),
            flush=True,
        )
    return jax.device_get(params)


def measure(params: dict[str, Any], name: str) -> dict[str, Any]:
    """Metrics with intervals on all images of a generated set, whose patients were not trained on."""
    config = configs.default()
    config.data.name = name
    config.data.image_size = SIDE
    dataset = data.load(config.data, seed=0)
    logits = jax.jit(lambda x: outputs(params, x)[0])
    images = np.stack([np.asarray(dataset.images[i]) for i in range(len(dataset))]) / np.float32(255)
    parts = [np.asarray(jax.nn.softmax(logits(part))) for part in np.array_split(images, max(1, len(images) // 128))]
    order = [CLASSES.index(label) for label in dataset.classes]
    probabilities = np.concatenate(parts)[:, order]
    return metrics.intervals(probabilities, dataset.labels, list(dataset.groups), False, metrics.RESAMPLES)


def hugging_face(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of `ViTForImageClassification`, float16."""
    leaves = tree.flatten({name: value for name, value in params.items() if name != "patch_head"})
    names = {
        "attn/query": "attention.attention.query",
        "attn/key": "attention.attention.key",
        "attn/value": "attention.attention.value",
        "attn/out": "attention.output.dense",
        "mlp/fc1": "intermediate.dense",
        "mlp/fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    tensors = {
        "vit.embeddings.cls_token": leaves["embed/cls_token"],
        "vit.embeddings.position_embeddings": leaves["embed/position"],
        "vit.embeddings.patch_embeddings.projection.weight": leaves["embed/patch/kernel"]
        .reshape(PATCH, PATCH, 3, WIDTH)
        .transpose(3, 2, 0, 1),
        "vit.embeddings.patch_embeddings.projection.bias": leaves["embed/patch/bias"],
    }
    layers = {"norm": "vit.layernorm", "head": "classifier"}
    layers |= {
        f"blocks_{i}/{ours}": f"vit.encoder.layer.{i}.{theirs}"
        for i in range(MODEL.depth)
        for ours, theirs in names.items()
    }
    for ours, theirs in layers.items():
        weight = leaves.get(f"{ours}/scale")
        tensors[f"{theirs}.weight"] = leaves[f"{ours}/kernel"].T if weight is None else weight
        tensors[f"{theirs}.bias"] = leaves[f"{ours}/bias"]
    return {name: np.ascontiguousarray(value, dtype=np.float16) for name, value in tensors.items()}


def write(params: dict[str, Any], folder: Path, facts: dict[str, Any]) -> None:
    """Writes the model in the layout of Hugging Face, with what made it in `README.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hugging_face(params), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": WIDTH,
        "num_hidden_layers": MODEL.depth,
        "num_attention_heads": MODEL.heads,
        "intermediate_size": MODEL.hidden,
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: i for i, name in enumerate(CLASSES)},
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    report.write_json(folder / "config.json", config)
    report.write_json(folder / "preprocessor_config.json", preprocessor)
    report.write_text(folder / "pretraining.json", json.dumps(facts, indent=2) + "\n")


def main() -> None:
    """Command line."""
    runtime.start()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--images", type=int, default=12_000)
    arguments.add_argument("--epochs", type=int, default=30)
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    started = time.perf_counter()
    params = train(options)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    flags = " ".join(f"--{key}={value}" for key, value in settings.items())
    facts: dict[str, Any] = {"command": f"python scripts/pretrain.py --output vitft_jax/weights/phantom_micro {flags}"}
    facts |= {"variant": VARIANT, "seconds": round(time.perf_counter() - started), "environment": report.environment()}
    facts["metrics"] = {"source": measure(params, "source")}
    for name, found in facts["metrics"].items():
        print(name, {metric: round(value["value"], 3) for metric, value in found.items()})
    write(params, options.output, report.finite(facts))


if __name__ == "__main__":
    main()
