"""Graphs of tiny models in ONNX Runtime against the models themselves."""

import json
import sys
from functools import partial

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import init, tiny

import vitft_jax
from vitft_jax import quantizer, tree
from vitft_jax.data import images
from vitft_jax.errors import InputError
from vitft_jax.export import Options as ExportOptions
from vitft_jax.export import export, onnx_graph
from vitft_jax.export import onnx as onnx_export
from vitft_jax.methods import quant
from vitft_jax.methods.skip import Skip, Split
from vitft_jax.ptq.options import Options
from vitft_jax.ptq.recipe import Recipe
from vitft_jax.quantize import quantize

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SKIPS = {
    "pruned": (Split(0, 0.4), Split(1, 0.5)),
    "rejoins": (Split(0, 0.4, rejoin=3),),
    "nested": (Split(0, 0.3, rejoin=3), Split(1, 0.5, rejoin=2)),
    "rejoins after the last": (Split(1, 0.4, rejoin=4),),
    "one is kept": (Split(0, 0.0, keep=1),),
    "none leaves": (Split(0, 0.0),),
}


def pixels(n=5):
    return np.random.default_rng(1).integers(0, 256, (n, 16, 16, 3), np.uint8)


def said(model, variables, images):
    normalised = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.asarray(jax.jit(model.apply)(variables, normalised))


def session(model, variables, **options):
    proto = onnx_graph.build(model, variables, 16, MEAN, STD, **options)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]), proto


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distilled": True},
        {"distilled": True, "dist_head": False},
        {"layer_scale": True, "features": "cls+mean"},
        {"features": "mean", "eps": 1e-12},
        *({"depth": 4, "features": "cls+mean", "select": Skip(splits)} for splits in SKIPS.values()),
        {"depth": 4, "distilled": True, "select": Skip(SKIPS["nested"])},
        {"depth": 4, "select": Skip((Split(0, 0.4), Split(1, 0.5)), fuse=True)},
    ],
    ids=str,
)
def test_float_logits_are_ours_for_any_number_of_images(changes):
    model = tiny(**changes)
    variables = init(model)
    run, _ = session(model, variables)
    for n in (1, 5):
        logits, probabilities = run.run(None, {"images": pixels(n)})
        wanted = said(model, variables, pixels(n))
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        np.testing.assert_allclose(probabilities, jax.nn.softmax(wanted), atol=1e-5)


def test_temperature_labels_and_what_the_file_says_of_itself():
    model = tiny()
    variables = init(model)
    run, _ = session(model, variables, temperature=2.0, multilabel=True, metadata={"classes": ["a", "ä"], "n": 1})
    _, probabilities = run.run(None, {"images": pixels()})
    np.testing.assert_allclose(probabilities, jax.nn.sigmoid(said(model, variables, pixels()) / 2), atol=1e-5)
    assert run.get_modelmeta().custom_metadata_map == {"classes": '["a", "\\u00e4"]', "n": "1"}
    assert [(i.name, i.shape, i.type) for i in run.get_inputs()] == [("images", ["batch", 16, 16, 3], "tensor(uint8)")]


def quantised(settings, **changes):
    """A tiny int8 model and its variables."""
    float_model = tiny(**changes)
    variables = init(float_model)
    params = tree.flatten(variables["params"])
    model = float_model.clone(dot_general_cls=quant_cls(settings))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    filled = {"params": variables["params"], quant.COLLECTION: shapes[quant.COLLECTION]}
    paths = quant.layers(filled)
    kernels = {path: quantizer.quantise_kernel(params[f"{path}/kernel"], settings.bits) for path in paths}
    # Those of one input share a range, as `vitft_jax.quantize` finds it.
    bounds = {path: jnp.float32(2.0 + ("out" in path) + 0.5 * ("fc2" in path)) for path in paths}
    return model, quant.insert(filled, kernels, bounds if settings.static else None)


def quant_cls(settings):
    return partial(quant.QuantDot, settings, lambda: jax.lax.dot_general, name="quant")


@pytest.mark.parametrize("options", [{}, {"static": True}, {"weight_only": True}, {"bits": 4}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"layer_scale": True, "depth": 3, "select": Skip((Split(0, 0.4),))}], ids=str)
def test_int8_logits_are_ours(options, changes):
    settings = quant.Settings(base="int8", **options)
    model, variables = quantised(settings, **changes)
    run, proto = session(model, variables, settings=settings)
    logits, _ = run.run(None, {"images": pixels(8)})
    np.testing.assert_allclose(logits, said(model, variables, pixels(8)), atol=1e-4)
    kernels = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith("/kernel")}
    assert {name.split("/")[0] for name, kernel in kernels.items() if kernel.dtype != np.int8} == {"embed", "head"}


@pytest.fixture(scope="module")
def root(image_folder, tmp_path_factory):
    """Runs that were never trained, and one of them in int8."""
    root = tmp_path_factory.mktemp("runs")
    base = exports.write_base(root / "base", "dinov2", depth=3)
    skipping = {"skip.layers": (0,), "skip.drop_ratio": (0.5,)}
    for name, methods, more in (
        ("lora", ("lora",), {}),
        ("skip", ("lora", "skip"), skipping),
        ("qat", ("quant", "lora"), {}),
    ):
        exports.hand_made(root / name, exports.config_for(image_folder, base, methods, **more))
    for name, options in INT8.items():
        quantize(root / "skip", root / name, Options(sensitivity_images=0, **options))
    return root


INT8 = {
    "int8": {},
    "int8 static": {"recipe": Recipe(static="mse")},
    "int8 mixed": {"skip_layers": "^(embed|head)|blocks_1|blocks_0/attn/key"},
    "int4": {"bits": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left_out"),
    [("lora", ()), ("skip", ()), ("skip", ("skip",)), *((name, ()) for name in INT8)],
    ids=str,
)
def test_what_the_command_writes_says_what_the_run_says(root, image_folder, tmp_path, name, left_out):
    notes = export(root / name, tmp_path / "out", "onnx", ExportOptions(left_out))
    assert bool(notes) == bool(left_out)
    model = vitft_jax.load(root / name)
    inputs = np.stack([model.prepare(Image.open(file)) for file in sorted(image_folder.rglob("*.png"))])
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    integers = [
        t.name for t in proto.graph.initializer if t.name.endswith("/kernel") and t.data_type == onnx.TensorProto.INT8
    ]
    wanted = {"lora": 0, "skip": 0, "int8 mixed": 9}.get(name, 12)
    assert len(integers) == wanted, integers
    run = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    _, p = run.run(None, {"images": inputs})
    apart = np.abs(p - model.probabilities(inputs)).max()
    assert apart < (1e-3 if name in INT8 else 1e-5) or left_out  # an integer may turn over
    assert apart > 1e-3 or not left_out
    about = run.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["dark", "grey", "light"]
    assert json.loads(about["left_out"]) == list(left_out)
    said = json.loads(about["preprocessing"])
    assert said.startswith("8-bit RGB resized to 16 by 16 pixels, bicubic and antialiased as PIL does it, fit 'squash'")
    assert json.loads((tmp_path / "out" / "vitft_jax.json").read_text())["preprocessing"] == said
    assert "InferenceSession" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_that_only_trains_in_int8_is_to_be_quantised_first(root, tmp_path):
    with pytest.raises(InputError, match=r"vitft_jax.quantize --workdir .*qat --output .*qat_int8"):
        export(root / "qat", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_every_way_to_fit_an_image_is_explained():
    assert set(onnx_export._RESIZE) == set(images.FITS)


@pytest.mark.slow
def test_what_an_onnx_file_cannot_hold_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MOST", 40_000)
    with pytest.raises(InputError, match="more than the 2 GB that an ONNX file can hold; quantise it first"):
        export(root / "lora", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_package_onnx_may_be_missing(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'vitft_jax\[onnx\]'"):
        export(root / "lora", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_int8_attention_is_refused():
    with pytest.raises(InputError, match="without --attention"):
        onnx_graph.build(tiny(), init(tiny()), 16, MEAN, STD, settings=quant.Settings(base="int8", attention=True))
