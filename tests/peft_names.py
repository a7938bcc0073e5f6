"""A PEFT adapter on a Hugging Face ViT as our variables; a test's own short reading of the names."""

import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from vitft_jax import pretrained, tree, vit
from vitft_jax.methods import adalora

GOLDEN = Path(__file__).parent / "golden"
PREFIX = "base_model.model."
SETTINGS = {"rank": 4, "alpha": 6.0, "rs": True, "targets": "encoder", "rank_pattern": (("blocks_1/attn/query", 2),)}
ADALORA = adalora.Settings(4, 2, 8.0, "", t_init=0.1, t_final=0.3, delta_t=3, penalty=0.5)  # make_golden.ADALORA
PARTS = {"A": "a", "B": "b", "magnitude_vector": "m"}
LAYERS = {"q_proj": "attn/query", "k_proj": "attn/key", "v_proj": "attn/value", "o_proj": "attn/out"}


def adapter_tree(tensors):
    """PEFT's lora_A (r, in), lora_B (out, r) and DoRA's magnitudes (out,) as our a (in, r), b (r, out) and m (out,)."""
    leaves = {}
    for name, tensor in tensors.items():
        if match := re.search(r"layers\.(\d+)\.(?:attention|mlp)\.(\w+)\.lora_(A|B|magnitude_vector)", name):
            block, layer, part = match.groups()
            leaves[f"blocks_{block}/{LAYERS.get(layer, f'mlp/{layer}')}/dot/{PARTS[part]}"] = jnp.asarray(tensor.T)
    return tree.unflatten(leaves)


def adalora_tree(tensors):
    """PEFT's lora_A (..., r, in), lora_B (..., out, r), lora_E (..., r, 1) as our q, p and lam; others are left out."""
    parts = {"A": ("q", lambda x: x.swapaxes(-1, -2)), "B": ("p", lambda x: x.swapaxes(-1, -2))}
    parts["E"] = ("lam", lambda x: x[..., 0])
    leaves = {}
    for name, tensor in tensors.items():
        if match := re.search(r"layers\.(\d+)\.attention\.(\w+)\.lora_([ABE])(\.default)?$", name):
            block, layer, matrix, _ = match.groups()
            part, turn = parts[matrix]
            leaves[f"blocks_{block}/{LAYERS[layer]}/dot/{part}"] = jnp.asarray(turn(tensor))
    return tree.unflatten(leaves)


def replay(recording):
    """Runs our allocator on a recording of `make_golden.peft_adalora`.

    Returns our and PEFT's singular values after each step, and our and PEFT's masks, all `(steps, layers, r)`.
    """

    def of(kind):
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): recording[name] for name in recording if name.startswith(prefix)}

    updates = {"adalora": adalora_tree(of("update"))}
    steps = jax.tree.leaves(updates)[0].shape[0]
    recorded = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32), lambda grads, i, params: (jax.tree.map(lambda u: u[i], updates), i + 1)
    )
    tx = adalora.allocate_rank(recorded, ADALORA, steps)
    params = {"adalora": adalora_tree(of("initial"))}

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        lam = jnp.stack([adapter["lam"] for adapter in adalora.layers(params["adalora"]).values()])
        return (params, state), (lam, state.mask)

    gradients = {"adalora": adalora_tree(of("gradient"))}
    _, (lam, mask) = jax.jit(lambda carry: jax.lax.scan(step, carry, gradients))((params, tx.init(params)))
    values = tree.flatten(adalora_tree(of("value")))
    masks = tree.flatten(adalora_tree({name: kept[..., None] for name, kept in of("mask").items()}))
    names = [f"{path}/dot/lam" for path in adalora.layers(params["adalora"])]
    return lam, jnp.stack([values[n] for n in names], 1), mask, jnp.stack([masks[n] for n in names], 1)


def load_base(tensors, config):
    """Our reading of a Hugging Face directory with these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config)
        save_file(tensors, Path(folder) / "model.safetensors")
        return pretrained.load(folder)


def separate(golden):
    """The base model and the adapter of a golden file."""
    tensors = {name.removeprefix("tensor/"): golden[name] for name in golden.files if name.startswith("tensor/")}
    base = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    adapter = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return load_base(base, str(golden["config"])), adapter_tree(adapter)


def build(method, source, adapter, size):
    """The model with the method's products, and its variables: prepared, with the adapter given."""
    model = vit.ViT(**source.model, classes=source.params["head"]["bias"].size, dot_general_cls=method.dot_general_cls)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, shapes["lora"])
    variables = method.prepare({"params": pretrained.fit(source, shapes["params"]), "lora": adapter})
    return model, {**variables, "lora": adapter}


def largest_difference(method, source, adapter, images, logits):
    """Between our logits for NCHW images and those given."""
    model, variables = build(method, source, adapter, images.shape[-1])
    return float(np.abs(jax.jit(model.apply)(variables, images.transpose(0, 2, 3, 1)) - logits).max())
