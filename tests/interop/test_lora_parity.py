"""LoRA, DoRA and PiSSA against PEFT on the same random weights: logits, gradients and the merged kernels."""

import jax
import numpy as np
import optax
import peft_names
import pytest
from peft_names import LAYERS
from support import lora_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors.numpy import load_file  # noqa: E402

from vitft_jax import methods, tree  # noqa: E402

pytestmark = pytest.mark.interop
CASES = {  # our method and settings, PEFT's settings
    "qv": (
        "lora",
        {"targets": "qv", "rank": 4, "alpha": 8.0},
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    ),
    "qkv, rsLoRA": (
        "lora",
        {"targets": "qkv", "rank": 3, "alpha": 5.0, "rs": True},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    ),
    "encoder, rank pattern": (
        "lora",
        {"targets": "encoder", "rank": 2, "alpha": 7.0, "rank_pattern": (("blocks_0/mlp/fc1", 6),)},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
            "r": 2,
            "lora_alpha": 7,
            "rank_pattern": {"layers.0.mlp.fc1": 6},
        },
    ),
    "DoRA": (
        "dora",
        {"targets": "encoder", "rank": 3, "alpha": 5.0},
        {"target_modules": [*LAYERS, "fc1", "fc2"], "r": 3, "lora_alpha": 5, "use_dora": True},
    ),
    "PiSSA": (
        "pissa",
        {"targets": "encoder", "rank": 3, "alpha": 5.0, "rs": True},
        {
            "target_modules": [*LAYERS, "fc1", "fc2"],
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "init_lora_weights": "pissa",
        },
    ),
}


def load_base(tmp_path, name):
    """Our reading of the weights that were saved under this name."""
    tensors = load_file(tmp_path / name / "model.safetensors")
    return peft_names.load_base(tensors, (tmp_path / "base" / "config.json").read_text())


def both(case, tmp_path, random=True):
    """(method, our model, our variables, PEFT's model) with the same weights; adapters as PEFT starts them or random."""
    which, ours, theirs = CASES[case]
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    base = transformers.ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(**theirs)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if random and "lora_" in name:
                parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    source = load_base(tmp_path, "base")
    adapter = peft_names.adapter_tree(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    method = methods.load(lora_config(which, **ours))
    return method, *peft_names.build(method, source, adapter, 16), adapted


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, tmp_path):
    _, model, variables, theirs = both(case, tmp_path)
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 1])
    logits = theirs(images).logits
    torch.nn.functional.cross_entropy(logits, labels).backward()
    expected = peft_names.adapter_tree({n: p.grad.numpy() for n, p in theirs.named_parameters() if "lora_" in n})

    def loss(adapter):
        out = model.apply({**variables, "lora": adapter}, images.numpy().transpose(0, 2, 3, 1))
        return optax.softmax_cross_entropy_with_integer_labels(out, labels.numpy()).mean(), out

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(variables["lora"])
    np.testing.assert_allclose(ours, logits.detach().numpy(), atol=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)


@pytest.mark.parametrize("case", CASES)
def test_merged_kernels(case, tmp_path):
    method, _, variables, theirs = both(case, tmp_path)
    merged = tree.flatten(method.merge(variables)["params"])
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = load_base(tmp_path, "merged")
    for name, leaf in tree.flatten(expected.params).items():
        np.testing.assert_allclose(merged[name], leaf, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", ["DoRA", "PiSSA"])
def test_what_prepare_makes_is_what_peft_starts_from(case, tmp_path):
    method, _, variables, _ = both(case, tmp_path, random=False)
    original = {**variables, "params": load_base(tmp_path, "base").params}
    ours, theirs = tree.flatten(method.prepare(original)["lora"]), tree.flatten(variables["lora"])
    for name, leaf in theirs.items():
        if name.endswith("/m"):
            np.testing.assert_allclose(ours[name], leaf, rtol=1e-6)
        elif case == "PiSSA" and name.endswith("/a"):
            b = name.removesuffix("a") + "b"
            signs = np.sign((ours[name] * leaf).sum(axis=0))  # of singular vectors: arbitrary, but the same in A and B
            np.testing.assert_allclose(ours[name] * signs, leaf, atol=1e-5)
            np.testing.assert_allclose(ours[b] * signs[:, None], theirs[b], atol=1e-5)
