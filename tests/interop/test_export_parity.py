"""Exports in the programs they are for, and PEFT's adapters here: the same logits and probabilities."""

import json
import os
import re
import subprocess
import sys
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
from vitft_jax.build import build as build_run  # noqa: E402
from vitft_jax.export import Options, export, hugging_face  # noqa: E402
from vitft_jax.folder import Folder  # noqa: E402

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


PATTERN = (("blocks_1/attn/query", 2), ("blocks_0/mlp", 0))
OURS = {
    "lora": {**ENCODER, "lora.rank_pattern": PATTERN},
    "dora": ENCODER,
    "pissa": {**ENCODER, "lora.rank_pattern": PATTERN[:1]},
    "adalora": {"adalora.targets": "encoder"},
}


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        *((family, method, changes) for family in exports.FAMILIES for method, changes in OURS.items()),
        ("vit", "dora", {"lora.rank": 2, "lora.targets": "mlp/fc2"}),
        ("deit", "lora", {"lora.targets": "qkv"}),
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
    """The program and variables of a run before its first step, and why its head is fresh."""
    config, base = run.resolve(config)
    config, adapter = peft.resolve(config, base)
    dataset = Folder(Path("nowhere")).dataset(config)
    return peft.insert(build_run(config, dataset, base), adapter, dataset.classes)


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.uniform_(0.5, 1.5) if "magnitude" in name else parameter.normal_(0, 0.2)
    return model


def settings_of(family, method):
    """Of an adapter that PEFT makes."""
    blocks = "layer" if family == "dinov2" else "layers"
    if method == "adalora":
        return {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9, "tinit": 1, "tfinal": 1}
    if method == "dora":
        some = {"layers_to_transform": [1]} if family == "dinov2" else {}
        return {"r": 2, "lora_alpha": 5, "use_dora": True, **some}
    return {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": family == "vit",
        "rank_pattern": {f"{blocks}.0.mlp.fc1": 5},
        "alpha_pattern": {"q_proj": 3, rf"{blocks}\.1\.mlp\.fc2": 9},
    }


def logits_here(base, adapter, method, image_folder, images):
    """What our run says that starts from an adapter."""
    config = exports.config_for(image_folder, base, method, init_adapter=str(adapter))
    config.adalora.init_r = configs.default().adalora.init_r
    built, fresh_head = build(config)
    assert not fresh_head
    return step.eval_step(built.trainable, built.frozen, images, program=built.program)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("family", exports.FAMILIES)
def test_adapters_of_peft_here(family, method, bases, image_folder, tmp_path):
    kind = hf_peft.AdaLoraConfig if method == "adalora" else hf_peft.LoraConfig
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = getattr(transformers, hf_names.architecture(pretrained.load(str(bases[family])).model)).from_pretrained(
        bases[family]
    )
    heads = ["cls_classifier", "distillation_classifier"] if family == "deit" else ["classifier"]
    torch.manual_seed(0)
    settings = kind(target_modules=modules, modules_to_save=heads, **settings_of(family, method))
    model = randomise(hf_peft.get_peft_model(model, settings))
    if method == "adalora":
        names = [n.removeprefix("base_model.model.") for n, _ in model.named_parameters() if "lora_E" in n]
        model.peft_config["default"].rank_pattern = {
            name: [(i + j) % 3 != 0 and "1.attention.k_proj" not in name for j in range(4)]
            for i, name in enumerate(names)
        }
    model.save_pretrained(tmp_path / "adapter")
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    ours = logits_here(bases[family], tmp_path / "adapter", method, image_folder, images)
    said = logits_of(theirs(bases[family], tmp_path / "adapter"), images, exports.about())
    np.testing.assert_allclose(ours, said, atol=1e-5)
    if (family, method) == ("vit", "lora"):
        as_transformers_4(tmp_path / "adapter")
        again = logits_here(bases[family], tmp_path / "adapter", method, image_folder, images)
        np.testing.assert_allclose(again, said, atol=1e-5)


def as_transformers_4(folder):
    """Gives the modules of an adapter on a ViT the names that they have in transformers 4."""
    names = {new: hf_names.layers("vit", "hf4", 2)[ours] for ours, new in hf_names.layers("vit", "hf5", 2).items()}
    path = folder / peft.TENSORS
    tensors = {re.sub(r"vit\.layers.*(?=\.lora)", lambda m: names[m[0]], n): t for n, t in load_file(path).items()}
    assert any("encoder.layer.0.attention.attention.query.lora_A" in name for name in tensors)
    save_file(tensors, path)
    config = json.loads((folder / peft.CONFIG).read_text())
    config["rank_pattern"] = {"layer.0.intermediate.dense": config["rank_pattern"]["layers.0.mlp.fc1"]}
    # Not that of the attention in the same block, whose name ends alike.
    alphas = config["alpha_pattern"]
    config["alpha_pattern"] = {"query": alphas["q_proj"], r"layer\.1\.output\.dense": alphas[r"layers\.1\.mlp\.fc2"]}
    (folder / peft.CONFIG).write_text(json.dumps(config))


def scores_of(said, classes):
    """Probabilities `(n, C)` of what a pipeline said of n images."""
    scores = [{line["label"]: line["score"] for line in lines} for lines in said]
    return np.array([[score[name] for name in classes] for score in scores])


ROUNDED = 5e-3
"""Of a tiny model with large weights: what its probabilities move where single pixels are rounded to the next level."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("vit", {}),
        ("deit", {}),
        ("dinov2", {}),
        ("vit", {"model.features": "mean"}),
        ("dinov2", {"model.features": "cls"}),
        ("vit", {"data.fit": "crop"}),  # the images are square
        ("deit", "several labels"),
    ],
)
def test_whole_models_in_transformers(family, changes, bases, image_folder, tmp_path):
    changes = exports.several_labels(tmp_path / "images", image_folder) if changes == "several labels" else changes
    config = exports.config_for(image_folder, bases[family], "lora", **changes)
    workdir = exports.hand_made(tmp_path / "run", config)
    export(workdir, tmp_path / "hf", "hf")
    files = sorted(map(str, image_folder.rglob("[0-3].png")))
    run_says = vitft_jax.load(workdir)
    expected = run_says.predict([Image.open(file) for file in files]).probabilities
    assert expected.std() > 0.05
    assert run_says.multilabel == (np.abs(expected.sum(axis=1) - 1).max() > 1e-2)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "hf"), image_processor=processor)
    np.testing.assert_allclose(scores_of(classify(files), run_says.classes), expected, atol=1e-4)
    # The default processor rounds a few pixels to the next level.
    plain = transformers.pipeline("image-classification", model=str(tmp_path / "hf"))
    np.testing.assert_allclose(scores_of(plain(files), run_says.classes), expected, atol=ROUNDED)
    pixels = [
        p([Image.open(f).convert("RGB") for f in files], return_tensors="np")["pixel_values"]
        for p in (plain.image_processor, processor)
    ]
    levels = np.abs(pixels[0] - pixels[1]) * np.array(exported.read(tmp_path / "hf").std)[:, None, None] * 255
    assert levels.max() < 1.01
    assert (levels > 0.5).mean() < 0.02


def test_images_that_are_not_square_are_cropped_alike_to_less_than_a_pixel(bases, image_folder, tmp_path):
    config = exports.config_for(image_folder, bases["vit"], "lora", **{"data.fit": "crop"})
    workdir = exports.hand_made(tmp_path / "run", config)
    ramp = np.linspace(0, 255, 41)  # 41 by 20 pixels become 32 by 16, not 32.8, of which 16 stay
    image = Image.fromarray(np.tile(ramp.astype(np.uint8), (20, 1))).convert("RGB")
    ours = vitft_jax.load(workdir).prepare(image)[:, :, 0].astype(float)
    export(workdir, tmp_path / "hf", "hf")
    export(workdir, tmp_path / "timm", "timm")
    told = exported.read(tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    for pixels in (processor(image, return_tensors="np")["pixel_values"][0], transform(image).numpy()):
        shift = (pixels[0] * told.std[0] + told.mean[0]) * 255 - ours
        assert np.abs(shift).max() < 255 / 33
        assert np.abs(shift).max() > 0.5  # else the notes of these formats say too much


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("family", "format"),
    [("vit", "hf"), ("vit", "peft"), ("deit", "peft"), ("vit", "timm"), ("vit", "onnx"), ("vit", "stablehlo")],
)
def test_what_a_card_says_to_run_gives_the_probabilities(family, format, several, fit, image_folder, tmp_path):
    """The code of `README.md`, as it is; the classes of the base are x, y and z."""
    if fit == "pad" and format != "hf":
        pytest.skip("one way to open it")
    base = exports.write_base(tmp_path / "base", family, eps=1e-6)
    changes = exports.several_labels(tmp_path / "images", image_folder) if several else {}
    config = exports.config_for(image_folder, base, "lora", **changes, **{"data.fit": fit})
    workdir = exports.hand_made(tmp_path / "run", config)
    export(workdir, tmp_path / "out", format)
    file = image_folder / "light" / "1.png"
    model = vitft_jax.load(workdir)
    expected = model.predict([Image.open(file)]).probabilities[0]
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("\n```")[0].replace("DIR", str(tmp_path / "out"))
    said = {"image": Image.open(file).convert("RGB"), "images": model.prepare(Image.open(file))[None]}
    exec(code.replace("image.png", str(file)), said)
    if format == "hf" and fit == "squash":
        found = scores_of([said["classify"](str(file))], model.classes)[0]
    elif format == "peft":
        about = exported.read(tmp_path / "out")
        assert tuple(said["model"].config.id2label.values()) == model.classes
        assert said["model"].config.label2id == {name: i for i, name in enumerate(model.classes)}
        assert said["model"].config.problem_type == f"{'multi' if several else 'single'}_label_classification"
        found = about.decision.probabilities(logits_of(said["model"], said["images"], about), several)[0]
    else:
        found = np.asarray(said["probabilities"].detach() if format in ("hf", "timm") else said["probabilities"])[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


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


OF_TRANSFORMERS_4 = """
import json, sys
import numpy as np
import torch, transformers
from peft import PeftModel

assert transformers.__version__.startswith("4.")
images, said = torch.from_numpy(np.load("images.npy")), {}
for name, architecture in json.loads(sys.argv[1]).items():
    kind = getattr(transformers, architecture)
    models = {
        "hf": kind.from_pretrained(f"{name}/hf"),
        "peft": PeftModel.from_pretrained(
            kind.from_pretrained(f"{name}/base", num_labels=3, ignore_mismatched_sizes=True), f"{name}/peft"
        ),
    }
    for form, model in models.items():
        with torch.no_grad():
            said[f"{name}/{form}"] = model.eval().double()(images).logits.numpy()
        processor = transformers.AutoImageProcessor.from_pretrained(f"{name}/hf", backend="pil")
        transformers.pipeline("image-classification", model=f"{name}/hf", image_processor=processor)
np.savez("said.npz", **said)
"""


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="needs a folder with transformers 4, see docs/export.md")
def test_adapters_and_models_in_transformers_4(image_folder, tmp_path):
    """The folder was made by: pip install --target FOLDER --no-deps 'transformers<5' 'huggingface-hub<1' 'tokenizers<0.23'."""
    expected, architectures = {}, {}
    for family in exports.FAMILIES:
        base = exports.write_base(tmp_path / family / "base", family)
        workdir = exports.hand_made(
            tmp_path / family / "run", exports.config_for(image_folder, base, "lora", **ENCODER)
        )
        export(workdir, tmp_path / family / "hf", "hf")
        export(workdir, tmp_path / family / "peft", "peft", Options(naming="hf4"))
        images, expected[family] = exports.images_and_logits(workdir)
        architectures[family] = hf_names.architecture(pretrained.load(str(base)).model)
    about = exports.about()
    np.save(tmp_path / "images.npy", exports.normalised(images, about.mean, about.std))
    environment = {**os.environ, "PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    command = [sys.executable, "-c", OF_TRANSFORMERS_4, json.dumps(architectures)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    said = np.load(tmp_path / "said.npz")
    for family, logits in expected.items():
        temperature = vitft_jax.load(tmp_path / family / "run").decision.temperature
        np.testing.assert_allclose(said[f"{family}/peft"], logits, atol=1e-5)
        np.testing.assert_allclose(said[f"{family}/hf"], logits / temperature, atol=1e-5)
