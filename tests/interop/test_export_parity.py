"""Exports in the programs they are for, and PEFT's adapters here: the same logits and probabilities."""

import json
import re
from pathlib import Path

import exports
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
hf_peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
from safetensors.numpy import load_file, save_file  # noqa: E402

import vitft_jax  # noqa: E402
from vitft_jax import config as configs  # noqa: E402
from vitft_jax import exported, hf_names, peft, pretrained, run, step  # noqa: E402
from vitft_jax.export import export, hugging_face  # noqa: E402

pytestmark = pytest.mark.interop
ENCODER = {"lora.targets": "encoder", "lora.rank": 3, "lora.alpha": 5.0, "lora.rs": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: exports.write_base(root / family, family) for family in exports.FAMILIES}


def prune(name, leaf):
    """Of AdaLoRA: other ranks in each layer, none at all in one."""
    if not name.endswith("/lam"):
        return leaf
    kept = [0, 1, 2, 4][sum(map(ord, name)) % 4] if "blocks_0/attn/key" not in name else 0
    return leaf * (np.arange(leaf.size) % 4 < kept)


def theirs(base, folder):
    """PEFT's model of an adapter, and the class that its base has."""
    name = hf_names.architecture(pretrained.load(str(base)).model)
    model = getattr(transformers, name).from_pretrained(base)
    return hf_peft.PeftModel.from_pretrained(model, folder).eval()


def logits_of(model, images, told):
    """Logits of a model of torch in float64, so that ours alone are rounded."""
    with torch.no_grad():
        return model.double()(torch.from_numpy(exports.normalised(images, told.mean, told.std))).logits.numpy()


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("vit", "lora", {**ENCODER, "lora.rank_pattern": (("blocks_1/attn/query", 2), ("blocks_0/mlp", 0))}),
        ("vit", "dora", {"lora.rank": 2, "lora.targets": "mlp/fc2"}),
        ("vit", "pissa", {**ENCODER, "lora.rank_pattern": (("blocks_1/attn/query", 2),)}),
        ("vit", "adalora", {"adalora.targets": "encoder"}),
        ("deit", "lora", {"lora.targets": "qkv"}),
        ("deit", "adalora", {}),
        ("dinov2", "lora", ENCODER),
        ("dinov2", "dora", ENCODER),
    ],
)
def test_our_adapters_in_peft(family, method, changes, bases, image_folder, tmp_path):
    config = exports.config_for(image_folder, bases[family], method, **changes)
    workdir = exports.hand_made(tmp_path / "run", config, change=prune)
    export(workdir, tmp_path / "adapter", "peft")
    model = theirs(bases[family], tmp_path / "adapter")
    images, logits = exports.images_and_logits(workdir)
    said = logits_of(model, images, exported.read(tmp_path / "adapter"))
    np.testing.assert_allclose(said, logits, atol=1e-5)
    with model.disable_adapter():
        assert np.abs(logits_of(model, images, exported.read(tmp_path / "adapter")) - logits).max() > 0.1


def build(config):
    """The program and variables of a run before its first step."""
    config, base = run.resolve(config)
    config, adapter = peft.resolve(config, base)
    dataset = run.Folder(Path("nowhere")).dataset(config)
    return peft.insert(run.build(config, dataset, base), adapter, dataset.classes), config


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.uniform_(0.5, 1.5) if "magnitude" in name else parameter.normal_(0, 0.2)
    return model


PATTERNS = {"rank_pattern": {"layers.0.mlp.fc1": 5}, "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.fc2": 9}}
THEIRS = {
    "lora": ("vit", "lora", {"r": 3, "lora_alpha": 6, "use_rslora": True, **PATTERNS}),
    "dora": ("dinov2", "dora", {"r": 2, "lora_alpha": 5, "use_dora": True, "layers_to_transform": [1]}),
    "adalora": (
        "deit",
        "adalora",
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9, "tinit": 1, "tfinal": 1},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_adapters_of_peft_here(case, bases, image_folder, tmp_path):
    family, method, settings = THEIRS[case]
    kind = hf_peft.AdaLoraConfig if method == "adalora" else hf_peft.LoraConfig
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = getattr(transformers, hf_names.architecture(pretrained.load(str(bases[family])).model)).from_pretrained(
        bases[family]
    )
    heads = ["cls_classifier", "distillation_classifier"] if family == "deit" else ["classifier"]
    torch.manual_seed(0)
    model = randomise(hf_peft.get_peft_model(model, kind(target_modules=modules, modules_to_save=heads, **settings)))
    if method == "adalora":
        names = [n.removeprefix("base_model.model.") for n, _ in model.named_parameters() if "lora_E" in n]
        model.peft_config["default"].rank_pattern = {
            name: [(i + j) % 3 != 0 and "layers.1.attention.k_proj" not in name for j in range(4)]
            for i, name in enumerate(names)
        }
    model.save_pretrained(tmp_path / "adapter")
    model = theirs(bases[family], tmp_path / "adapter")
    config = exports.config_for(image_folder, bases[family], method, init_adapter=str(tmp_path / "adapter"))
    config.adalora.init_r = configs.default().adalora.init_r
    (built, with_head), config = build(config)
    assert with_head
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    ours = step.eval_step(built.trainable, built.frozen, images, program=built.program)
    said = logits_of(model, images, exports.about())
    np.testing.assert_allclose(ours, said, atol=1e-5)
    if case == "lora":  # as transformers 4 names the modules
        names = {new: hf_names.layers("vit", "hf4", 2)[ours] for ours, new in hf_names.layers("vit", "hf5", 2).items()}
        path = tmp_path / "adapter" / peft.TENSORS
        text = (tmp_path / "adapter" / peft.CONFIG).read_text()
        tensors = {re.sub(r"vit\.layers.*(?=\.lora)", lambda m: names[m[0]], n): t for n, t in load_file(path).items()}
        assert any("encoder.layer.0.attention.attention.query.lora_A" in name for name in tensors)
        save_file(tensors, path)
        (tmp_path / "adapter" / peft.CONFIG).write_text(
            text.replace("layers.0.mlp.fc1", "layer.0.intermediate.dense")
            .replace("q_proj", "query")
            .replace(r"layers\\.1\\.mlp\\.fc2", r"[0-9].output.dense")
        )
        again = peft.read(tmp_path / "adapter")
        then = peft.resolve(config, pretrained.load(str(bases[family])))[1]
        assert again.layers.keys() == then.layers.keys()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("vit", {}),
        ("deit", {}),
        ("dinov2", {}),
        ("vit", {"model.features": "mean"}),
        ("dinov2", {"model.features": "cls"}),
    ],
)
def test_whole_models_in_transformers(family, changes, bases, image_folder, tmp_path):
    workdir = exports.hand_made(tmp_path / "run", exports.config_for(image_folder, bases[family], "lora", **changes))
    export(workdir, tmp_path / "hf", "hf")
    files = sorted(map(str, image_folder.rglob("[0-3].png")))
    run_says = vitft_jax.load(workdir)
    expected = run_says.predict([Image.open(file) for file in files]).probabilities
    assert expected.std() > 0.05
    np.testing.assert_allclose(
        vitft_jax.load(tmp_path / "hf").predict([Image.open(file) for file in files]).probabilities, expected, atol=1e-5
    )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "hf"), image_processor=processor)
    said = [{row["label"]: row["score"] for row in rows} for rows in classify(files)]
    found = np.array([[row[name] for name in run_says.classes] for row in said])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # The default processor rounds a few pixels to the next level.
    default = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = [
        p([Image.open(f).convert("RGB") for f in files], return_tensors="np")["pixel_values"]
        for p in (default, processor)
    ]
    levels = np.abs(pixels[0] - pixels[1]) * np.array(exported.read(tmp_path / "hf").std)[:, None, None] * 255
    assert levels.max() < 1.01
    assert (levels > 0.5).mean() < 0.02


@pytest.mark.parametrize(
    ("family", "of_model", "changes"),
    [
        ("vit", {}, {}),
        ("deit", {}, {}),
        ("deit", {"dist_head": False}, {}),
        ("vit", {}, {"model.features": "mean"}),
        ("dinov2", {}, {"model.features": "cls"}),
    ],
)
def test_whole_models_in_timm(family, of_model, changes, image_folder, tmp_path):
    base = exports.write_base(tmp_path / "base", family, **{"eps": 1e-6, **of_model})
    workdir = exports.hand_made(tmp_path / "run", exports.config_for(image_folder, base, "lora", **changes))
    assert export(workdir, tmp_path / "timm", "timm") == [hugging_face.READS]  # nothing else to know
    files = sorted(image_folder.rglob("[0-3].png"))
    expected = vitft_jax.load(workdir).predict([Image.open(file) for file in files]).probabilities
    np.testing.assert_allclose(
        vitft_jax.load(tmp_path / "timm").predict([Image.open(f) for f in files]).probabilities, expected, atol=1e-5
    )
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    other = timm.create_model(
        config["architecture"], num_classes=3,
        checkpoint_path=tmp_path / "timm" / "model.safetensors", **config["model_args"],
    ).eval()  # fmt: skip
    for m in (model, other):
        with torch.no_grad():
            found = m(pixels).softmax(-1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
