import gc
import json
import re
import weakref
from dataclasses import replace

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, init, integer_dots, randomised, tiny

import vitft_jax
from vitft_jax import config as configs
from vitft_jax import data, evaluate, methods, optim, quantizer, run, step, train, tree, vit
from vitft_jax.build import build, trains
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.methods import quant
from vitft_jax.ptq import calibration

IMAGES = jax.random.normal(jax.random.key(7), (2, 16, 16, 3))
BATCH = {"image": np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8), "label": np.array([0, 1, 2, 1])}
LINEAR = [f"attn/{name}" for name in ("key", "out", "query", "value")] + ["mlp/fc1", "mlp/fc2"]
LAYERS = [f"blocks_{i}/{name}" for i in range(TINY["depth"]) for name in LINEAR]


def quant_config(names=("quant",), trainable="^head", **changes):
    config = configs.default()
    config.methods, config.train.trainable = names, trainable
    config.quant.update(changes)
    return config


def quantised(names=("quant",), trainable="^head", model=None, **changes):
    """A tiny model: (method, model, variables, params in float); adapters are random."""
    method = methods.load(quant_config(names, trainable, **changes))
    model = (model or tiny()).clone(dot_general_cls=method.dot_general_cls, attend=method.attend)
    variables = init(model, random=False)
    params = randomised(variables["params"])
    adapters = {name: randomised(variables[name]) for name in method.collections}
    return method, model, dict(method.prepare({**variables, **adapters, "params": params})), params


def program_of(names=("quant",), trainable="^head", model=None, **changes):
    config = quant_config(names, trainable, **changes)
    method, model, variables, _ = quantised(names, trainable, model, **changes)
    program = step.Program(model, method, optim.optimizer(config, method, 20), (0.5,) * 3, (0.25,) * 3)
    return program, *tree.split(variables, trains(config, method))


def test_defaults_quantise_the_linear_layers_of_the_blocks_and_nothing_else():
    _, _, variables, params = quantised(base="int8")
    kernels = {name: leaf for name, leaf in tree.flatten(variables["params"]).items() if name.endswith("/kernel")}
    assert {name.removesuffix("/kernel") for name, leaf in kernels.items() if leaf.dtype == jnp.int8} == set(LAYERS)
    for name, leaf in tree.flatten(variables["params"]).items():
        if leaf.dtype != jnp.int8:
            np.testing.assert_array_equal(leaf, tree.flatten(params)[name])


@pytest.mark.parametrize(("base", "attention"), [("float", False), ("float", True), ("int8", False), ("int8", True)])
def test_every_converted_layer_is_an_int8_dot_in_the_compiled_program(base, attention):
    model = tiny(features="cls+mean")  # else the last block has one query, and its products become sums
    program, trainable, frozen = program_of(base=base, attention=attention, model=model)
    compiled = step.eval_step.lower(trainable, frozen, BATCH["image"], program=program).compile()
    assert len(integer_dots(compiled)) == len(LAYERS) + 2 * TINY["depth"] * attention


def test_int8_attention_works_beside_token_skipping():
    """'mask' leaves tokens out as keys, 'gather' takes them away: both are the same int8 model, and drop the same tokens."""
    config = quant_config(("quant", "skip"), attention=True)
    config.skip.update(layers=(0,), drop_ratio=(0.5,))
    params, logits = randomised(init(tiny(depth=3), random=False)["params"]), {}
    for mode in ("gather", "mask", "float"):
        config.skip.mode = mode.replace("float", "gather")
        config.quant.attention = mode != "float"
        method = methods.load(config)
        model = tiny(depth=3, dot_general_cls=method.dot_general_cls, select=method.select, attend=method.attend)
        logits[mode] = jax.jit(model.apply)({"params": params}, IMAGES)
    np.testing.assert_allclose(logits["gather"], logits["mask"], rtol=0, atol=1e-4)
    assert jnp.abs(logits["gather"] - logits["float"]).max() > 1e-3


def test_with_all_layers_skipped_it_is_the_float_model_to_the_bit():
    _, _, variables, params = quantised()
    skipping = tiny().clone(dot_general_cls=methods.load(quant_config(skip_layers=".")).dot_general_cls)
    np.testing.assert_array_equal(skipping.apply(variables, IMAGES), tiny().apply({"params": params}, IMAGES))


def test_a_skipped_layer_stays_float_and_the_head_can_be_quantised_too():
    _, _, variables, _ = quantised(base="int8", trainable="^norm", skip_layers="^embed|fc2$")
    kernels = {n: a.dtype for n, a in tree.flatten(variables["params"]).items() if n.endswith("/kernel")}
    chosen = {name.removesuffix("/kernel") for name, dtype in kernels.items() if dtype == jnp.int8}
    assert chosen == {layer for layer in LAYERS if not layer.endswith("fc2")} | {"head"}
    assert set(quant.layers(variables)) == chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_bases_give_the_same_logits(dtype):
    """In bfloat16 too it is the float32 kernel that is quantised: rounded to bfloat16 first it would be other integers."""
    whole = tiny(dtype=jnp.dtype(dtype))
    _, model, variables, params = quantised(base="int8", model=whole)
    _, trained, float_variables, _ = quantised(base="float", model=whole)
    logits = jax.jit(model.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, jax.jit(trained.apply)(float_variables, IMAGES), rtol=1e-5, atol=1e-5)
    exact = tiny().apply({"params": params}, IMAGES)
    assert 1e-4 < jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()


@pytest.mark.parametrize("changes", [{}, {"bits": 4}, {"weight_only": True}])
def test_logits_are_those_of_the_oracle_in_every_layer(changes):
    """The plain model with each product written out by `quantizer`, layer by layer."""
    _, model, variables, params = quantised(base="int8", **changes)

    def dot(x, kernel, dimensions, **_):
        if kernel.shape in ((48, 32), (32, 3)):  # patch embedding, head
            return x @ kernel
        values, scale = quantizer.quantise_kernel(kernel, changes.get("bits", 8))
        if changes.get("weight_only"):
            return x @ (values * scale)
        x_scale = jnp.abs(x).max(-1, keepdims=True) * (
            1 / 127.5
        )  # in the order of `quantizer`: a rounding turns an integer
        return jnp.round(x * (1 / x_scale)).clip(-127, 127) @ values.astype(jnp.float32) * (x_scale * scale)

    expected = tiny(dot_general_cls=lambda: dot).apply({"params": params}, IMAGES)
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, rtol=0, atol=1e-5)


def test_gradients_of_a_layer_are_those_of_the_quantised_product():
    """Fails if the backward pass ignores quantisation: with 4 bits the two differ by far."""
    _, model, _, params = quantised(trainable=".", bits=4)

    def grad(model):
        loss = lambda p: jnp.sum(model.apply({"params": p}, IMAGES))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)["blocks_1"]["mlp"]["fc2"]["kernel"]

    def straight(x, kernel, dimensions, **_):
        if kernel.shape in ((48, 32), (32, 3)):
            return x @ kernel
        ste = lambda a, seen: a + jax.lax.stop_gradient(seen - a)  # noqa: E731
        return ste(x, quantizer.fake(x)) @ ste(kernel, quantizer.dequantise(quantizer.quantise_kernel(kernel, 4)))

    ours, expected, ignoring = grad(model), grad(tiny(dot_general_cls=lambda: straight)), grad(tiny())
    distance = lambda a: float(jnp.linalg.norm(a - expected) / jnp.linalg.norm(expected))  # noqa: E731
    assert distance(ours) < 0.01 < 0.1 < distance(ignoring)


def test_the_patch_embedding_gets_its_gradient():
    program, trainable, frozen = program_of(trainable=".")
    grads = jax.jit(jax.grad(lambda t: step.loss(t, frozen, BATCH, jax.random.key(0), program)[0]))(trainable)
    for name, leaf in tree.flatten(grads).items():
        assert np.isfinite(leaf).all(), name
        assert leaf.any() or name.endswith("key/bias"), name  # softmax does not see the bias of keys


@pytest.mark.parametrize("names", [("quant", "lora"), ("quant", "adalora")])
@pytest.mark.parametrize("base", ["float", "int8"])
def test_adapters_train_over_a_quantised_base(names, base):
    program, trainable, frozen = program_of(names, base=base)
    before, losses = jax.tree.map(np.array, frozen), []
    state = step.init_state(program, trainable)
    for _ in range(8):
        state, values = step.train_step(state, frozen, BATCH, program=program)
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.trainable, trainable)), strict=True))


def test_gradients_of_adapters_over_int8_are_those_over_the_float_base_that_it_stands_for():
    """Weight-only, so that the two models are the same function up to rounding."""
    program, trainable, frozen = program_of(("quant", "lora"), base="int8", weight_only=True)
    plain_config = quant_config(("lora",))
    plain_method = methods.load(plain_config)
    plain_model = tiny(dot_general_cls=plain_method.dot_general_cls)
    plain = step.Program(plain_model, plain_method, program.tx, program.mean, program.std)
    float_frozen = methods.load(quant_config(base="int8")).merge(frozen)
    assert set(float_frozen) == {"params"}

    def grads(program, frozen):
        return jax.jit(jax.grad(lambda t: step.loss(t, frozen, BATCH, jax.random.key(0), program)[0]))(trainable)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads(program, frozen),
        grads(plain, float_frozen),
    )


def test_adapters_see_the_input_in_float():
    """With an int8 base of zeros all that is left of a layer is its adapter, and that is exact."""
    _, model, variables, _ = quantised(("quant", "lora"), base="int8")
    zeros = tree.map_named(lambda n, a: jnp.zeros_like(a) if a.dtype == jnp.int8 else a, variables)
    float_zeros = tree.map_named(lambda n, a: a.astype(jnp.float32) if a.dtype == jnp.int8 else a, zeros)
    plain = tiny(dot_general_cls=methods.load(quant_config(("lora",))).dot_general_cls)
    np.testing.assert_array_equal(model.apply(zeros, IMAGES), plain.apply(float_zeros, IMAGES))


@pytest.mark.parametrize("names", [("quant", "lora"), ("quant", "adalora"), ("quant",)])
def test_merging_gives_the_float_model_that_the_integers_stand_for(names):
    method, model, variables, _ = quantised(names, base="int8", weight_only=True)
    merged = method.merge(variables)
    assert set(merged) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    expected = model.apply(variables, IMAGES)
    np.testing.assert_allclose(tiny().apply(merged, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_what_is_frozen_of_a_converted_layer_is_integers_and_vectors():
    _, _, frozen = program_of(("quant", "lora"), base="int8")
    matrices = [leaf for name, leaf in tree.flatten(frozen).items() if leaf.ndim > 1 and "/blocks_" in name]
    assert len(matrices) == len(LAYERS)
    assert {leaf.dtype for leaf in matrices} == {jnp.dtype("int8")}
    assert tree.nbytes(frozen["quant"]) == 4 * TINY["depth"] * (5 * 32 + 64)


def over_int8(image_folder, folder):
    """A config of LoRA over an int8 base that lies in files."""
    base = exports.write_base(folder / "base", "vit")
    return exports.config_for(image_folder, base, ("quant", "lora"), **{"quant.base": "int8", "train.epochs": 1.0})


def test_the_float_base_is_let_go_before_training_and_before_evaluation(image_folder, tmp_path, monkeypatch):
    """No array that held a float kernel is left when steps begin; a command that kept the weights it read would keep it."""
    kernels, moments, resolve = [], [], run.resolve

    def watched(*arguments):
        config, source = resolve(*arguments)
        for layer in LAYERS:
            kernel = tree.flatten(source.params)[f"{layer}/kernel"]
            while isinstance(kernel.base, np.ndarray):
                kernel = kernel.base
            kernels.append(weakref.ref(kernel))
        return config, source

    def check(moment):
        gc.collect()
        assert len(kernels) == len(LAYERS)
        assert [layer for layer, kernel in zip(LAYERS, kernels, strict=True) if kernel() is not None] == [], moment
        kernels.clear()
        moments.append(moment)

    def before(module, name, moment):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: [check(moment), function(*a, **k)][1])

    monkeypatch.setattr(run, "resolve", watched)
    monkeypatch.setattr(evaluate, "resolve", watched)
    before(calibration, "calibrated", "training")
    before(evaluate, "outputs", "evaluation")
    train.train(over_int8(image_folder, tmp_path), tmp_path / "run")
    evaluate.evaluate(tmp_path / "run")
    evaluate.evaluate(tmp_path / "run", overrides=["figures.count=0"])
    predictor = vitft_jax.load(tmp_path / "run")
    check("prediction")
    assert predictor.classes
    assert moments == ["training", "evaluation", "evaluation", "prediction"]
    assert run.best(tmp_path / "run").source.params == {}


def test_zeroed_float_kernels_change_nothing(image_folder, tmp_path):
    """Nothing that multiplies is float: neither what a run was built from, nor what may be left in its variables."""
    config, source = run.resolve(over_int8(image_folder, tmp_path))
    source = replace(source, params=jax.tree.map(np.array, source.params))  # which can be written to
    dataset = Folder(tmp_path / "run").dataset(config)

    def zeroed(variables):
        """Float kernels of converted layers as zeros, in place where that can be."""
        for name, leaf in tree.flatten(variables).items():
            if name.removeprefix("params/").removesuffix("/kernel") in LAYERS and leaf.dtype == np.float32:
                leaf[...] = 0

    def logits(built):
        return np.asarray(step.eval_step(built.trainable, built.frozen, BATCH["image"], program=built.program))

    built = build(config, dataset, source)
    before = logits(built)
    zeroed(source.params)
    for part in (built.trainable, built.frozen):
        zeroed(part)  # raises on a float kernel, since arrays of JAX cannot be written to
    np.testing.assert_array_equal(logits(built), before)
    assert np.abs(logits(build(config, dataset, source)) - before).max() > 1e-2  # there was something to zero


def test_int8_base_of_a_large_model_has_the_bytes_that_the_formula_says():
    """ViT-B/16 of 1000 classes: 84,934,656 bytes of kernels, 331,776 of scales, 4 for each of 1,633,000 other parameters."""
    method = methods.load(quant_config(base="int8"))
    model = vit.ViT(**vit.VARIANTS["vit_base_patch16"], classes=1000, dot_general_cls=method.dot_general_cls)
    shapes = jax.eval_shape(lambda key: method.prepare(model.init(key, jnp.zeros((1, 224, 224, 3)))), jax.random.key(0))
    assert tree.nbytes(shapes) == 84_934_656 + 331_776 + 4 * 1_633_000
    assert tree.nbytes(shapes) < 0.27 * 346.3e6


def test_in_bfloat16_the_output_of_a_layer_is_bfloat16_and_the_logits_are_close():
    _, model, variables, params = quantised(model=tiny(dtype=jnp.bfloat16), base="int8")
    logits, seen = model.apply(variables, IMAGES, capture_intermediates=True)
    exact = tiny().apply({"params": params}, IMAGES)
    assert jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()
    assert seen["intermediates"]["blocks_0"]["mlp"]["fc1"]["__call__"][0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "quant.bits=7: 8 or 4"),
        ({"base": "int4"}, "quant.base='int4': one of 'float', 'int8'"),
        ({"skip_layers": "("}, "no regex"),
        ({"static": True, "weight_only": True}, "quant.static=True"),
        ({"attention": True, "weight_only": True}, "quant.attention=True"),
        ({"static": True, "base": "int8"}, "no ranges were calibrated"),
        ({"base": "int8", "skip_layers": "."}, "skips every linear layer"),
        ({"base": "float", "skip_layers": "."}, "skips every linear layer"),
        ({"base": "float", "static": True, "attention": True, "skip_layers": "."}, "skips every linear layer"),
        ({"base": "int8", "trainable": "."}, "stores in integers"),
        ({"names": ("lora", "quant")}, "'quant' comes first"),
        ({"names": ("quant", "dora"), "base": "int8"}, "use lora or adalora"),
        ({"names": ("quant", "pissa"), "base": "int8"}, "use lora or adalora"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        quantised(**changes)


def test_attention_alone_may_be_in_int8():
    _, model, variables, params = quantised(attention=True, skip_layers=".")
    assert jnp.abs(model.apply(variables, IMAGES) - tiny().apply({"params": params}, IMAGES)).max() > 1e-4


def test_scales_and_ranges_are_no_parameters(tiny_config):
    """Of an int8 base or of static ranges: the numbers of parameters are those of the same run in float."""

    def counted(names, trainable="^head", **changes):
        config = tiny_config.copy_and_resolve_references()
        config.methods, config.train.trainable = names, trainable
        config.quant.update(changes)
        config, source = run.resolve(config)
        return build(config, data.load(config.data, config.seed), source).parameters

    assert counted(("quant", "lora"), base="int8") == counted(("lora",))
    whole = counted(("quant",), ".", static=True)
    assert whole == counted((), ".")
    assert whole["trainable_percent"] == 100


@pytest.mark.parametrize("extra", ["", "methods=quant train.trainable=.", "quant.base=int8"])
def test_the_command_trains(tiny_config, tmp_path, pytestconfig, extra):
    train.main([
        f"--config={pytestconfig.rootpath / 'configs' / 'qat.py'}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tiny_config.data.path}", "--config.data.image_size=16", "--config.data.val_fraction=0.2",
        "--config.model.name=tiny_test", "--config.model.pretrained=", "--config.train.batch_size=6", "--config.train.epochs=6",
        "--config.train.lr=0.01", *(f"--config.{key}" for key in extra.split()),
    ])  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["test"]["accuracy"]["value"] >= 0.8  # brightness alone tells the classes apart
