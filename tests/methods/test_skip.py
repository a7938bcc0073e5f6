import functools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import init, integer_dots, randomised, skipping, tiny

from vitft_jax import attention, flops, methods, optim, step, tree, vit
from vitft_jax import config as configs
from vitft_jax.build import trains
from vitft_jax.errors import InputError
from vitft_jax.methods import skip
from vitft_jax.methods.skip import Skip, Split

IMAGES = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
DEPTH = 5
CASES = {
    "prune": Skip((Split(0, 0.35), Split(2, 0.5))),
    "counts, before the last block": Skip((Split(0, 0, 9), Split(3, 0, 5))),
    "fuse": Skip((Split(0, 0.35), Split(2, 0.5), Split(3, 0.3)), fuse=True),
    "rejoin": Skip((Split(0, 0.5, rejoin=3),)),
    "nested": Skip((Split(0, 0.35, rejoin=4), Split(1, 0.5, rejoin=3))),
    "both rejoin at once": Skip((Split(0, 0.35, rejoin=4), Split(1, 0.5, rejoin=4))),
    "rejoin, then prune": Skip((Split(0, 0.35, rejoin=2), Split(2, 0.5))),
    "prune, then rejoin": Skip((Split(0, 0.35), Split(1, 0.5, rejoin=4))),
    "warm-up": Skip((Split(0, 0.35), Split(2, 0.5)), slack=0.5),
}
MODELS = {"cls": {}, "cls+mean": {"features": "cls+mean"}, "distilled": {"distilled": True}}


def settings(**changes):
    config = configs.default()
    config.methods = ("skip",)
    config.skip.update({"layers": (0, 2), **changes})
    return config


def models(select, **changes):
    """A model with the selector, its reference in mask mode, and their variables."""
    dense = tiny(depth=DEPTH, **changes)
    gather, mask = (dense.clone(select=Skip(select.splits, select.fuse, mode, select.slack)) for mode in skip.MODES)
    return gather, mask, init(dense)


@functools.cache
def dense(**changes):
    model = tiny(depth=DEPTH, **changes)
    return jax.jit(model.apply)(init(model), IMAGES)


def value_and_grads(model, variables, images):
    return jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(model.apply(v, x))), argnums=(0, 1)))(
        variables, images
    )


@pytest.mark.parametrize(
    ("case", "features"),
    [*((case, "cls") for case in CASES), ("both rejoin at once", "cls+mean"), ("prune", "distilled")],
)
def test_gather_equals_mask(case, features):
    gather, mask, variables = models(CASES[case], **MODELS[features])
    a, b = (jax.jit(m.apply)(variables, IMAGES) for m in (gather, mask))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert abs(dense(**MODELS[features]) - a).max() > 1e-3  # the tokens that skip make a difference


@pytest.mark.parametrize(
    ("case", "features"), [("fuse", "cls+mean"), ("rejoin, then prune", "cls"), ("nested", "distilled")]
)
def test_gradients_of_gather_equal_those_of_mask(case, features):
    gather, mask, variables = models(CASES[case], **MODELS[features])
    (a, grads_a), (b, grads_b) = (value_and_grads(m, variables, IMAGES) for m in (gather, mask))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads_b))
    jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, atol=1e-5 * largest), grads_a, grads_b)


def test_rejoin_after_the_last_block_gives_the_mean_over_all_patches():
    select = Skip((Split(1, 0.5, rejoin=DEPTH),))
    gather, mask, variables = models(select, features="cls+mean")
    a, b = (jax.jit(m.apply)(variables, IMAGES) for m in (gather, mask))
    np.testing.assert_allclose(a, b, atol=1e-5)
    pruned = gather.clone(select=Skip((Split(1, 0.5),))).apply(variables, IMAGES)
    assert np.abs(a - pruned).max() > 1e-3


@pytest.mark.parametrize("mode", skip.MODES)
def test_ratio_zero_is_the_dense_model_to_the_bit(mode):
    dense = tiny(depth=DEPTH)
    variables = init(dense)
    select = Skip((Split(0, 0.0), Split(1, 0.0, rejoin=3)), mode=mode)
    np.testing.assert_array_equal(
        jax.jit(dense.clone(select=select).apply)(variables, IMAGES), jax.jit(dense.apply)(variables, IMAGES)
    )


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "skip.npz")  # described in scripts/make_golden.py


@pytest.mark.parametrize("kind", ["plain", "distilled"])
@pytest.mark.parametrize("case", json.loads(str(GOLDEN["cases"])))
def test_logits_and_gradients_are_those_of_torch(case, kind):
    settings = {
        name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(str(GOLDEN["cases"]))[case].items()
    }
    model = vit.ViT(**json.loads(str(GOLDEN["model"])), distilled=kind == "distilled", select=skipping(**settings))
    images = np.float32(GOLDEN["images"])
    shapes = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    ends = np.cumsum([shapes[name].size for name in sorted(shapes)])
    values = np.split(np.float32(GOLDEN[f"parameters/{kind}"]), ends)
    leaves = {name: value.reshape(shapes[name].shape) for name, value in zip(sorted(shapes), values, strict=False)}
    assert values[-1].size == 0  # nothing is left over

    def loss(position):
        logits = model.apply({"params": tree.unflatten({**leaves, "embed/position": position})}, images)
        return jnp.sin(logits).sum(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(leaves["embed/position"])
    np.testing.assert_allclose(logits, GOLDEN[f"logits/{kind}/{case}"], atol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN[f"gradient/{kind}/{case}"], atol=1e-5)


class Trace:
    """A selector that keeps what it was given and returned."""

    def __init__(self, select):
        self.select, self.wants_rows, self.calls = select, select.wants_rows, {}

    def __call__(self, block, x, rows, carry):
        out, keys, stream = self.select(block, x, rows, carry)
        self.calls[block] = {"x": x, "rows": rows, "out": out, "stream": stream}
        return out, keys, stream


@functools.cache
def traced(case, **changes):
    """Calls of the selector by block, and the variables of the model."""
    spy, variables = Trace(CASES[case]), init(tiny(depth=DEPTH, **changes))
    tiny(depth=DEPTH, select=spy, **changes).apply(variables, IMAGES)
    return spy.calls, variables


@pytest.mark.parametrize("distilled", [False, True])
def test_prefix_stays_first_and_the_rest_in_order(distilled):
    prefix = 1 + distilled
    calls, _ = traced("prune", distilled=distilled)
    for block, k in ((0, 11), (2, 6)):
        place = np.asarray(calls[block]["stream"].place)
        assert place.shape == (3, prefix + k)
        np.testing.assert_array_equal(place[:, :prefix], [list(range(prefix))] * 3)
        assert (np.diff(place, axis=1) > 0).all()  # so unique, too
        assert place.max() < 16 + prefix
        assert calls[block]["out"].shape == (3, prefix + k, 32)
    assert len({tuple(row) for row in place}) > 1  # images differ in what they keep


def test_those_of_highest_score_stay_with_the_values_they_had():
    calls, _ = traced("prune")
    call, place = calls[0], np.asarray(calls[0]["stream"].place)
    score = np.asarray(call["rows"]).mean(axis=(1, 2))
    for b in range(3):
        expected = sorted(np.argsort(-score[b, 1:], kind="stable")[:11] + 1)
        np.testing.assert_array_equal(place[b, 1:], expected)
        np.testing.assert_array_equal(call["out"][b], call["x"][b, place[b]])


@pytest.mark.parametrize("distilled", [False, True])
def test_the_score_is_the_class_tokens_row_of_the_full_attention(distilled):
    prefix = 1 + distilled
    calls, variables = traced("prune", distilled=distilled)
    leaves = variables["params"]
    x = vit.Embed(32, 4, distilled).apply({"params": leaves["embed"]}, IMAGES)
    x = nn.LayerNorm(1e-6).apply({"params": leaves["blocks_0"]["norm1"]}, x)
    q, k = (
        (x @ layer["kernel"] + layer["bias"]).reshape(3, -1, 4, 8).swapaxes(1, 2)
        for layer in (leaves["blocks_0"]["attn"][name] for name in ("query", "key"))
    )
    full = jax.nn.softmax(q @ k.swapaxes(2, 3) / np.sqrt(8), axis=-1)
    assert calls[0]["rows"].shape == (3, 4, prefix, 16 + prefix)
    np.testing.assert_allclose(calls[0]["rows"], full[:, :, :prefix], atol=1e-6)
    np.testing.assert_allclose(calls[0]["rows"].sum(axis=-1), 1, atol=1e-6)


def test_ties_go_to_the_first():
    score = jnp.array([[0.1, 0.2, 0.3, 0.2, 0.2, 0.0]])
    np.testing.assert_array_equal(skip.best(score, 1, 2), [[True, True, True, False, False, False]])
    live = jnp.array([[True, False, True, True, True, True]])
    np.testing.assert_array_equal(skip.best(score, 1, 2, live), [[True, False, True, True, False, False]])


def test_partition_is_a_permutation_with_its_inverse():
    kept = jnp.array([[True, False, True, False, True], [True, True, True, False, False]])
    order, inverse = skip.partition(kept, 3)
    np.testing.assert_array_equal(order, [[0, 2, 4, 1, 3], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(jnp.take_along_axis(order, inverse, axis=1), [range(5)] * 2)


@pytest.mark.parametrize("n", [1, 7, 100, 196, 256])
@pytest.mark.parametrize("percent", [0, 20, 30, 35, 45, 50, 70, 99])
def test_count_is_the_exact_formula(n, percent):
    exact = max(1, -(-(100 - percent) * n // 100))  # in integers
    assert Split(0, percent / 100).count(n) == exact
    assert Split(0, 0.5, keep=3).count(n) == 3


def test_the_settings_of_the_original_keep_128_and_then_84_of_196():
    config = configs.load("configs/skip.py")
    assert skip.selector(config.skip).counts(196) == [(196, 128), (128, 84)]


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_the_trace(case):
    calls, _ = traced(case)
    for split, (n, k) in zip(CASES[case].splits, CASES[case].counts(16), strict=True):
        stream = calls[split.after]["stream"]
        assert calls[split.after]["x"].shape[1] == 1 + n
        assert stream.n == k + CASES[case].fuse


def test_skipped_tokens_rejoin_as_they_left_and_the_others_updated():
    calls, _ = traced("rejoin")
    left, before, after = calls[0]["x"], calls[2]["x"], calls[2]["out"]
    place = np.asarray(calls[0]["stream"].place)
    assert before.shape[1] == 9
    assert after.shape == left.shape
    for b in range(3):
        skipped = np.setdiff1d(np.arange(17), place[b])
        np.testing.assert_array_equal(after[b, skipped], left[b, skipped])
        np.testing.assert_array_equal(after[b, place[b]], before[b])
        assert (np.abs(after[b, place[b]] - left[b, place[b]]).max(axis=1) > 1e-3).all()


def test_fused_token_is_the_unnormalised_sum_of_score_times_token():
    calls, _ = traced("fuse")
    call, place = calls[0], np.asarray(calls[0]["stream"].place)
    score = np.asarray(call["rows"]).mean(axis=(1, 2))
    for b in range(3):
        left = np.setdiff1d(np.arange(17), place[b])
        np.testing.assert_allclose(call["out"][b, -1], score[b, left] @ np.asarray(call["x"])[b, left], atol=1e-5)
    np.testing.assert_array_equal(place[:, -1], [17] * 3)


@pytest.mark.parametrize("case", ["prune", "rejoin", "fuse"])
def test_permuting_patches_with_their_positions_permutes_what_skips_and_not_the_logits(case):
    """The permutation acts on the image (in patches) and on the position embeddings."""
    model = tiny(depth=DEPTH, select=CASES[case])
    variables = init(tiny(depth=DEPTH))
    order = np.random.default_rng(0).permutation(16)
    patches = np.asarray(IMAGES).reshape(3, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(3, 16, 4, 4, 3)[:, order]
    images = patches.reshape(3, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(IMAGES.shape)
    leaves = tree.flatten(variables)
    position = leaves["params/embed/position"]
    leaves["params/embed/position"] = jnp.concatenate([position[:, :1], position[:, 1:][:, order]], axis=1)
    permuted = tree.unflatten(leaves)
    np.testing.assert_allclose(model.apply(permuted, images), model.apply(variables, IMAGES), atol=1e-5)
    before = skip.kept_patches(model, variables, IMAGES)
    for block, kept in skip.kept_patches(model, permuted, jnp.asarray(images)).items():
        np.testing.assert_array_equal(kept, before[block][:, order])


@pytest.mark.parametrize("case", ["nested", "fuse"])
def test_batch_elements_do_not_see_each_other(case):
    model = tiny(depth=DEPTH, select=CASES[case])
    variables = init(tiny(depth=DEPTH))
    forward = jax.jit(model.apply)
    alone = jnp.concatenate([forward(variables, IMAGES[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(forward(variables, IMAGES), alone, atol=1e-5)


@pytest.mark.parametrize("case", ["prune", "rejoin"])
def test_every_patch_of_the_image_gets_a_gradient(case):
    """Those that leave were keys before they left."""
    model = tiny(depth=DEPTH, select=CASES[case])
    variables = init(tiny(depth=DEPTH))
    grads = jax.jit(jax.grad(lambda x: jnp.sum(model.apply(variables, x) ** 2)))(IMAGES)
    patches = np.asarray(grads).reshape(3, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(3, 16, 48)
    assert (np.abs(patches).max(axis=-1) > 0).all()


def test_shapes_after_a_split_are_the_small_ones():
    model = tiny(depth=DEPTH, select=CASES["prune"])
    variables = init(tiny(depth=DEPTH))
    text = jax.jit(model.apply).lower(variables, IMAGES).as_text()
    products = re.findall(r"dot_general.*-> tensor<\d+x(\d+)x64x", text)  # of fc1
    assert [int(tokens) for tokens in products] == [17, 12, 12, 7, 1]


def test_no_attention_matrix_is_computed_for_the_score_alone():
    """The rows of the prefix come from their own small product, so any attention may stand beside it."""
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 4, 17, 8))
    jaxpr = jax.make_jaxpr(lambda q, k: attention.prefix_rows(q, k, 1))(q, k)
    shapes = {v.aval.shape for e in jaxpr.eqns for v in e.outvars}
    assert (2, 4, 1, 17) in shapes
    assert (2, 4, 17, 17) not in shapes


BATCH = {"image": np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8), "label": np.arange(6) % 3}


def program(names, *overrides, depth=4):
    config = settings()
    config.methods = names
    config.train.trainable = "." if names == ("skip",) else "head"
    configs.override(config, overrides)
    method = methods.load(config)
    model = tiny(depth=depth, dot_general_cls=method.dot_general_cls, select=method.select)
    tx = optim.optimizer(config, method, 20)
    variables = init(model, random=False)
    drawn = {name: randomised(variables[name]) for name in ("params", *method.collections)}
    variables = dict(method.prepare({**variables, **drawn}))
    program = step.Program(model, method, tx, (0.5,) * 3, (0.25,) * 3)
    return program, *tree.split(variables, trains(config, method))


def trained(built, trainable, frozen, steps):
    """The state after so many steps on one batch, and the loss before each."""
    state, losses = step.init_state(built, trainable), []
    for _ in range(steps):
        state, values = step.train_step(state, frozen, BATCH, program=built)
        losses.append(float(values["loss"]))
    return state, losses


@pytest.mark.parametrize("names", [("skip",), ("lora", "skip")])
def test_a_step_compiles_once_and_learns_beside_other_methods(names):
    before = step.train_step._cache_size()
    _, losses = trained(*program(names), 8)
    assert step.train_step._cache_size() == before + 1
    assert losses[-1] < losses[0]


def test_adalora_meets_its_budget_on_a_model_that_skips():
    overrides = ("adalora.init_r=4", "adalora.target_r=2", "adalora.t_init=0.1", "adalora.t_final=0.5")
    built, trainable, frozen = program(("adalora", "skip"), *overrides)
    assert [n for n, _ in flops.tokens(built.model, 16)] == [17, 12, 12, 9]
    state, losses = trained(built, trainable, frozen, 11)  # of 20; ranks are final from the tenth
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert (
        built.method.report(state.trainable, state.opt_state)["total_rank"] == 2 * 3 * 4
    )  # query, key, value of 4 blocks


@pytest.mark.parametrize("base", ["float", "int8"])
@pytest.mark.parametrize("names", [("quant", "skip"), ("quant", "lora", "skip")])
def test_int8_products_have_fewer_rows_after_a_split_and_train(names, base):
    built, trainable, frozen = program(names, f"quant.base={base}", "skip.layers=0,1", depth=3)
    state, losses = step.init_state(built, trainable), []
    compiled = step.train_step.lower(state, frozen, BATCH, program=built).compile()
    rows = [math.prod(map(int, shape.split(",")[:-1])) for shape in integer_dots(compiled)]
    # Six products in each block; in the last one only keys and values are of all tokens.
    assert Counter(rows) == {6 * 17: 6, 6 * 12: 6, 6 * 9: 2, 6: 4}
    for _ in range(8):
        state, values = compiled(state, frozen, BATCH)
        losses.append(float(values["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    mask = replace(built, model=built.model.clone(select=replace(built.model.select, mode="mask")))
    reference = jax.jit(lambda t: step.loss(t, frozen, BATCH, jax.random.key(0), mask)[0])(trainable)
    # Sums in another order may round to another integer, which is off by one in 127.
    np.testing.assert_allclose(losses[0], reference, rtol=1e-2)


def test_kept_patches_are_the_same_in_both_modes_and_shrink():
    for case in ("prune", "fuse", "nested"):
        gather, mask, variables = models(CASES[case])
        a, b = (jax.jit(partial(skip.kept_patches, m))(variables, IMAGES) for m in (gather, mask))
        first, second = list(a.values())[:2]
        assert (~first & second).sum() == 0
        for block, kept in a.items():
            np.testing.assert_array_equal(kept, b[block])
            assert kept.shape == (3, 16)


def test_warm_up_falls_along_a_cosine_to_the_setting():
    select = skip.selector(settings(drop_ratio=(0.5,)).skip)
    stairs = skip.phases(select, 0.5, 80)
    assert [end for end, _ in stairs] == [10, 20, 30, 40]
    kept = [s.counts(1000)[0][1] for _, s in stairs]
    cosine = [500 + 500 * (1 + math.cos(math.pi * t)) / 2 for t in (0.125, 0.375, 0.625, 0.875)]
    np.testing.assert_allclose(kept, cosine, atol=1)
    assert skip.phases(select, 0.0, 80) == ()
    assert skip.phases(select, 0.5, 1) == ()  # half a step is none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_ratio": (1.0,)}, r"skip\.drop_ratio=\(1\.0,\): at least 0 and below 1"),
        ({"drop_ratio": (-0.1,)}, r"skip\.drop_ratio=\(-0\.1,\)"),
        ({"drop_ratio": (0.1, 0.2, 0.3)}, r"one for each of the 2 splits"),
        ({"layers": (2, 0)}, r"skip\.layers=\(2, 0\): out of order"),
        ({"layers": (2, 2)}, "out of order"),
        ({"layers": ()}, "at least one"),
        ({"layers": (-1,)}, "from 0"),
        ({"keep": (0,)}, r"skip\.keep=\(0,\)"),
        ({"keep": (5, 4, 3)}, "one for each of the 2"),
        ({"rejoin": (1, None)}, r"skip\.rejoin=1 for the split after block 0.*at least 2"),
        ({"rejoin": (0, None)}, "at least 2"),
        ({"rejoin": (4, None)}, "lies inside the one from block 0 to 4"),
        ({"rejoin": (4, 5)}, "lies inside"),
        ({"rejoin": (3, None)}, r"after block 2, where tokens rejoin that have no score.*split after block 3"),
        ({"rejoin": (4,), "fuse": True}, "skip.fuse with skip.rejoin"),
        ({"mode": "flash"}, r"skip\.mode='flash'"),
        ({"warmup": 1.0}, r"skip\.warmup=1\.0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        methods.load(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"layers": (0, 4)}, {}, r"after block 4: the model has the blocks 0 to 4.*at most 3"),
        ({"layers": (7,)}, {}, r"after block 7"),
        ({"rejoin": (6,)}, {}, r"before block 6, but the model has 5 blocks"),
        ({"rejoin": (5,)}, {}, r"5 is after the last block.*at most 4"),
        ({"keep": (17, 4)}, {}, r"skip\.keep: 17 tokens after block 0, where 16 are left"),
        ({"keep": (8, 9)}, {}, r"skip\.keep: 9 tokens after block 2, where 8 are left"),
        ({}, {"features": "mean"}, r"reads 'mean', not the class token"),
    ],
)
def test_models_on_which_the_settings_make_no_sense_are_refused(changes, model, message):
    method = methods.load(settings(**changes))
    with pytest.raises(InputError, match=message):
        method.check(tiny(depth=DEPTH, **model), 16)
    methods.load(settings()).check(tiny(depth=DEPTH), 16)
