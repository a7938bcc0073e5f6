"""AdaLoRA against PEFT: the allocator on a recorded run, and a whole training from the same start."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import peft_names
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors.numpy import load_file  # noqa: E402

from vitft_jax import config as configs  # noqa: E402
from vitft_jax import methods, optim, pretrained, step, tree, vit  # noqa: E402
from vitft_jax.methods import adalora  # noqa: E402

pytestmark = pytest.mark.interop
STEPS = 20


def test_singular_values_and_masks_of_a_recorded_run():
    path = peft_names.GOLDEN.parents[1] / "scripts" / "make_golden.py"
    spec = importlib.util.spec_from_file_location("make_golden", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    torch.manual_seed(1)
    lam, their_lam, mask, their_mask = peft_names.replay(script.peft_adalora())
    assert lam.shape == (20, 9, 4)
    np.testing.assert_array_equal(mask, their_mask)
    np.testing.assert_array_equal(lam, their_lam)


def test_training_from_the_same_start(tmp_path):
    """AdamW with clipping, warm-up and cosine, penalty on, head trained: parameters and losses of all steps."""
    config = configs.default()
    config.methods = ("adalora",)
    config.adalora.update(init_r=4, target_r=2, alpha=8.0, targets="qkv", t_init=0.1, t_final=0.3, delta_t=3)
    config.train.lr = 5e-3
    ours, theirs = [], []

    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16,
            patch_size=4, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path)
    model = peft.get_peft_model(
        base,
        peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], tinit=2, tfinal=6,
            deltaT=3, total_step=STEPS, orth_reg_weight=0.5, modules_to_save=["classifier"],
        ),
    )  # fmt: skip
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters() if "lora_" in name}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (STEPS, 8, 16, 16, 3), np.uint8)
    labels = rng.integers(0, 5, (STEPS, 8))

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if "classifier" in name and name.endswith("weight")]
    rest = [p for p in trained.values() if not any(p is d for d in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=1.0
    )
    rate = optim.schedule(config, STEPS)
    for t in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(t))
        x = torch.from_numpy(((images[t].astype(np.float32) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2).copy())
        optimizer.zero_grad()
        # Not `model(...)`: that goes past the tuner, which is what adds the penalty.
        out = model.base_model(pixel_values=x, labels=torch.from_numpy(labels[t]))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.train.clip)
        optimizer.step()
        model.base_model.update_and_allocate(t + 1)
        adapters = {name: p.detach().numpy().copy() for name, p in model.named_parameters() if "lora_" in name}
        theirs.append((out.loss.item(), peft_names.adalora_tree(adapters)))

    source = peft_names.load_base(load_file(tmp_path / "model.safetensors"), (tmp_path / "config.json").read_text())
    method = methods.load(config)
    network = vit.ViT(**source.model, classes=5, dot_general_cls=method.dot_general_cls)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    variables = {"params": pretrained.fit(source, shapes["params"]), "adalora": peft_names.adalora_tree(start)}
    trainable, frozen = tree.split(variables, lambda n: n.startswith(("adalora/", "params/head")))
    program = step.Program(network, method, optim.optimizer(config, method, STEPS), (0.5,) * 3, (0.25,) * 3)
    state = step.init_state(program, trainable)
    for t in range(STEPS):
        state, values = step.train_step(state, frozen, {"image": images[t], "label": labels[t]}, program=program)
        ours.append((float(values["loss"] + values["penalty"]), jax.device_get(state.trainable["adalora"])))

    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=1e-4)
    for t, ((_, a), (_, b)) in enumerate(zip(ours, theirs, strict=True), 1):
        for name, leaf in tree.flatten(b).items():
            np.testing.assert_allclose(tree.flatten(a)[name], leaf, atol=1e-4, err_msg=f"step {t}, {name}")
    lam = np.stack([adapter["lam"] for adapter in adalora.layers(ours[-1][1]).values()])
    their_lam = np.stack([adapter["lam"] for adapter in adalora.layers(theirs[-1][1]).values()])
    np.testing.assert_array_equal(lam != 0, their_lam != 0)
    assert np.count_nonzero(lam) == 2 * 9
    assert np.abs(lam).max() > 0.02
