import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_names
import pytest
from PIL import Image
from support import init, randomised, tiny

from vitft_jax import config as configs
from vitft_jax import methods, optim, step, train, tree, vit
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.methods import adalora, lora

IMAGES = jax.random.normal(jax.random.key(7), (2, 16, 16, 3))
SETTINGS = adalora.Settings(4, 2, 6.0, "", t_init=0.1, t_final=0.3, delta_t=1, penalty=0.5)  # of 20 steps: 2 and 6


def settings(**changes):
    config = configs.default()
    config.methods = ("adalora",)
    config.adalora.update(changes)
    return config


@functools.cache
def adapted(random=True, **changes):
    """A tiny model with AdaLoRA: (method, model, variables), the adapters as initialised unless `random`."""
    method = methods.load(settings(**changes))
    model = tiny(dot_general_cls=method.dot_general_cls)
    variables = init(model, random=False)
    variables["params"] = randomised(variables["params"])
    if random:
        variables["adalora"] = randomised(variables["adalora"])
    return method, model, variables


def adapters(count=5, r=4, seed=0):
    """Trainable variables with `count` adapters of a layer from 6 to 3."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layer = lambda: {"dot": {"q": draw(6, r), "lam": draw(r), "p": draw(r, 3)}}  # noqa: E731
    return {"adalora": {f"layer_{i}": layer() for i in range(count)}, "params": {"head": {"kernel": draw(2)}}}


@functools.cache
def history(settings, lr=0.1, order=range(5), total=20):
    """Steps on random gradients: (params, gradients, state of the wrapper) by step, leading axis `total`.

    Layer i gets the values and gradients of layer ``order[i]``.
    """

    def turn(params):
        layers = list(params["adalora"].values())
        return {**params, "adalora": {f"layer_{i}": layers[j] for i, j in enumerate(order)}}

    params = turn(adapters(r=settings.init_r))
    tx = adalora.allocate_rank(optax.sgd(lr), settings, total)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(size=(total, *x.shape)), jnp.float32)  # noqa: E731
    gradients = turn(jax.tree.map(draw, adapters(r=settings.init_r)))

    def one(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    _, (after, states) = jax.jit(lambda c: jax.lax.scan(one, c, gradients))((params, tx.init(params)))
    return after, gradients, states


def lams(params):
    """`(..., layers, r)`."""
    return np.stack([np.asarray(a["lam"]) for a in adalora.layers(params["adalora"]).values()], -2)


def events(start, end, every, total):
    return [t for t in range(1, total + 1) if (start < t < end and t % every == 0) or t == end]


# The adapter


def test_golden_count():
    method = methods.load(settings(targets="qkv", init_r=12))
    model = vit.ViT(**vit.VARIANTS["vit_base_patch16"], classes=101, dot_general_cls=method.dot_general_cls)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert tree.count(shapes["adalora"]) == 663_984


def test_a_fresh_adapter_changes_nothing_to_the_bit():
    _, model, variables = adapted(random=False)
    np.testing.assert_array_equal(model.apply(variables, IMAGES), tiny().apply({"params": variables["params"]}, IMAGES))


def test_p_and_q_start_as_normal_and_lam_at_zero():
    _, _, variables = adapted(random=False, targets="encoder")
    leaves = tree.flatten(variables["adalora"])
    for part in ("p", "q"):
        x = np.concatenate([np.ravel(leaf) for name, leaf in leaves.items() if name.endswith(part)])
        np.testing.assert_allclose([x.mean(), x.std()], [0, 0.02], atol=5 * 0.02 / np.sqrt(x.size))
    assert all((leaf == 0).all() for name, leaf in leaves.items() if name.endswith("lam"))


def test_gradients_at_the_start_are_zero_for_p_and_q_and_not_for_lam():
    _, model, variables = adapted(random=False)
    grads = jax.grad(lambda ad: jnp.sum(model.apply({**variables, "adalora": ad}, IMAGES) ** 2))(variables["adalora"])
    for name, leaf in tree.flatten(grads).items():
        assert (leaf != 0).all() if name.endswith("/lam") else (leaf == 0).all(), name


@pytest.mark.parametrize("targets", ["qkv", "encoder", r"blocks_1/mlp"])
def test_output_equals_kernel_plus_scaled_product(targets):
    method, model, variables = adapted(targets=targets, init_r=3, target_r=1, alpha=5.0)
    params, leaves = tree.flatten(variables["params"]), tree.flatten(variables["adalora"])
    for name in (n for n in leaves if n.endswith("/dot/lam")):
        layer = name.removesuffix("/dot/lam")
        q, p = np.float64(leaves[f"{layer}/dot/q"]), np.float64(leaves[f"{layer}/dot/p"])
        change = 5.0 / (3 + 1e-5) * q @ np.diag(leaves[name]) @ p
        params[f"{layer}/kernel"] += change.astype(np.float32)
    expected = tiny().apply({"params": tree.unflatten(params)}, IMAGES)
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, rtol=1e-5, atol=1e-5)
    before = jax.tree.map(np.array, variables)
    merged = method.merge(variables)
    assert set(merged) == {"params"}
    for name, leaf in tree.flatten(merged["params"]).items():
        np.testing.assert_allclose(leaf, params[name], atol=1e-6, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_penalty_is_the_mean_distance_from_orthonormal():
    variables = adapters()
    distances = []
    for adapter in adalora.layers(variables["adalora"]).values():
        p, q = np.float64(adapter["p"]), np.float64(adapter["q"])
        distances += [np.linalg.norm(p @ p.T - np.eye(4)), np.linalg.norm(q.T @ q - np.eye(4))]
    np.testing.assert_allclose(adalora.penalty(variables, SETTINGS), 0.5 * np.mean(distances), rtol=1e-6)


def test_penalty_of_orthonormal_adapters_is_zero_with_a_finite_gradient():
    eye = {"dot": {"q": jnp.eye(6, 4), "lam": jnp.ones(4), "p": jnp.eye(4, 9)}}
    value, grads = jax.value_and_grad(adalora.penalty)({"adalora": {"layer": eye}}, SETTINGS)
    assert value < 1e-6
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


# The budget


@pytest.mark.parametrize(
    ("t_init", "t_final", "total", "start", "end"),
    [(0.1, 0.3, 20, 2, 14), (0.0, 0.0, 7, 0, 7), (0.25, 0.5, 40, 10, 20), (0.1, 0.4, 1, 0, 1)],
)
def test_budget_table(t_init, t_final, total, start, end):
    s = adalora.Settings(12, 5, 1.0, "", t_init, t_final, 1, 0.0)
    table = adalora.budgets(s, 7, total)
    assert adalora.phases(s, total) == (start, end)
    assert len(table) == total + 1
    assert set(table[: start + 1]) == {12 * 7}
    assert set(table[end:]) == {5 * 7}
    assert (np.diff(table) <= 0).all()
    expected = [int(35 + 49 * (1 - (t - start) / (end - start)) ** 3) for t in range(start + 1, end + 1)]
    assert table[start + 1 : end + 1] == expected


@pytest.mark.parametrize(
    ("delta_t", "t_init", "t_final"), [(1, 0.1, 0.3), (4, 0.1, 0.3), (3, 0.0, 0.0), (5, 0.2, 0.45)]
)
def test_masks_follow_the_budget_and_lam_the_masks(delta_t, t_init, t_final):
    s = dataclasses.replace(SETTINGS, delta_t=delta_t, t_init=t_init, t_final=t_final)
    params, _, states = history(s)
    start, end = adalora.phases(s, 20)
    table = adalora.budgets(s, 5, 20)
    lam, masks = lams(params), np.concatenate([np.ones((1, 5, 4), bool), states.mask])
    for t in range(1, 21):
        if t in events(start, end, delta_t, 20):
            assert masks[t].sum() == table[t]
            assert (lam[t - 1][~masks[t]] == 0).all()
        else:
            assert (masks[t] == masks[t - 1]).all()
            assert (lam[t - 1] != 0).all() or t > end  # between allocations what was zero trains on
        if t >= end:
            assert (masks[t] == masks[end]).all()
            assert ((lam[t - 1] != 0) == masks[end]).all()
    assert masks[-1].sum() == 2 * 5
    np.testing.assert_array_equal(states.final, np.arange(1, 21) >= end)
    assert states.step.tolist() == list(range(1, 21))


def test_the_wrapped_optimiser_and_all_but_lam_are_left_alone():
    params, gradients, _ = history(SETTINGS)
    expected = jax.tree.map(lambda x, g: x - 0.1 * jnp.cumsum(g, axis=0), adapters(), gradients)
    for name, leaf in tree.flatten(expected).items():
        if not name.endswith("/lam"):
            np.testing.assert_allclose(tree.flatten(params)[name], leaf, atol=1e-5, err_msg=name)


def test_equal_initial_and_target_rank_prunes_nothing():
    params, _, states = history(dataclasses.replace(SETTINGS, target_r=4))
    assert states.mask.all()
    assert (lams(params) != 0).all()


def test_ties_give_exactly_the_budget_and_the_first_stay():
    for budget in range(13):
        mask = adalora.keep_best(jnp.zeros((3, 4)), jnp.int32(budget))
        np.testing.assert_array_equal(mask.ravel(), np.arange(12) < budget)
    scores = jnp.array([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]])
    np.testing.assert_array_equal(adalora.keep_best(scores, jnp.int32(3)), [[False, True, True], [False, False, True]])


def test_the_best_stay_whatever_the_order_of_the_layers():
    order = (3, 0, 4, 2, 1)
    mask, moved = history(SETTINGS)[2].mask, history(SETTINGS, order=order)[2].mask
    assert 0 < mask[-1].sum() < mask[-1].size
    np.testing.assert_array_equal(moved, mask[:, list(order)])


@pytest.mark.parametrize("at", ["post", "pre"])
def test_averages_and_scores_against_numpy(at):
    params, gradients, states = history(dataclasses.replace(SETTINGS, importance_at=at))
    # The weight in the importance of lam is that before the mask, which is not at hand here; p and q have no mask.
    for name, g in tree.flatten(gradients["adalora"]).items():
        if name.endswith("/lam"):
            continue
        after = np.float64(tree.flatten(params["adalora"])[name])
        before = np.concatenate([np.float64(tree.flatten(adapters()["adalora"])[name])[None], after[:-1]])
        mean = spread = np.zeros(g.shape[1:])
        for t in range(1, 21):
            if t < 14:
                now = np.abs((after if at == "post" else before)[t - 1] * np.float64(g[t - 1]))
                mean = 0.85 * mean + 0.15 * now
                spread = 0.85 * spread + 0.15 * np.abs(now - mean)
            np.testing.assert_allclose(tree.flatten(states.sensitivity)[name][t - 1], mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(tree.flatten(states.uncertainty)[name][t - 1], spread, rtol=1e-4, atol=1e-6)
    last = jax.tree.map(lambda x: np.float64(x[-1]), (states.sensitivity, states.uncertainty))
    entries = [jax.tree.map(np.multiply, last[0][n]["dot"], last[1][n]["dot"]) for n in sorted(last[0])]
    expected = np.array([[e["lam"][j] + e["q"][:, j].mean() + e["p"][j].mean() for j in range(4)] for e in entries])
    scores = adalora.scores(*jax.tree.map(lambda x: x[-1], (states.sensitivity, states.uncertainty)))
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert (scores >= 0).all()


def test_importance_before_the_step_differs_from_after():
    post, pre = (dataclasses.replace(SETTINGS, importance_at=at) for at in adalora.IMPORTANCE_AT)
    assert (history(post, lr=1.0)[2].mask != history(pre, lr=1.0)[2].mask).any()


def test_the_gradient_in_the_importance_is_clipped():
    config = settings(init_r=4, target_r=2, t_init=0.1)
    config.train.clip, config.train.lr, config.train.warmup = 0.5, 0.0, 0.0
    params = adapters()
    tx = optim.optimizer(config, methods.load(config), 20)
    sevens = jax.tree.map(lambda x: jnp.full_like(x, 7.0), params)
    _, state = jax.jit(tx.update)(sevens, tx.init(params), params)
    clipped = 0.5 / np.sqrt(tree.count(params))
    for name, leaf in tree.flatten(state[1].sensitivity).items():
        expected = 0.15 * np.abs(tree.flatten(params["adalora"])[name]) * clipped
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, err_msg=name)


def test_replay_of_a_run_of_peft():
    """Golden file of scripts/make_golden.py: singular values and masks are the same to the bit at all 20 steps."""
    with np.load(peft_names.GOLDEN / "adalora.npz") as golden:
        lam, their_lam, mask, their_mask = peft_names.replay(dict(golden))
    assert lam.shape == (20, 9, 4)
    assert mask.sum((1, 2)).tolist() == [36] * 2 + [31] * 3 + [23] * 3 + [19] * 3 + [18] * 9
    np.testing.assert_array_equal(mask, their_mask)
    np.testing.assert_array_equal(lam, their_lam)


# The step


def program(accumulate=1):
    config = settings(init_r=4, target_r=2, t_final=0.3)
    config.train.lr = 1e-2
    method = methods.load(config)
    model = tiny(dot_general_cls=method.dot_general_cls)
    tx = optim.optimizer(config, method, total_steps=20)
    made = step.Program(model, method, tx, (0.5,) * 3, (0.25,) * 3, accumulate=accumulate)
    return made, *tree.split(init(model, random=False), lambda n: n.startswith("adalora/") or "head" in n)


def test_a_step_is_an_optimiser_step_and_compiles_once_over_all_phases():
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 255, (4, 16, 16, 3), np.uint8), "label": np.array([0, 1, 2, 1])}
    results = []
    for accumulate in (1, 2):
        made, trainable, frozen = program(accumulate)
        state, compiled = step.init_state(made, trainable), step.train_step._cache_size()
        losses, ranks = [], []
        for _ in range(20):
            state, values = step.train_step(state, frozen, batch, program=made)
            losses.append(float(values["loss"]))
            ranks.append(made.method.report(state.trainable, state.opt_state)["total_rank"])
        assert step.train_step._cache_size() == compiled + 1
        assert int(state.opt_state[1].step) == int(state.step) == 20
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(values["penalty"], made.method.penalty(state.trainable), rtol=0.1)
        assert ranks == adalora.budgets(SETTINGS, 6, 20)[1:]
        results.append((losses, state.opt_state[1].mask, lams(state.trainable)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-3)
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_allclose(results[0][2], results[1][2], atol=1e-4)


# What comes out


def pruned(masks, **changes):
    """A tiny adapted model whose lam is zero outside `masks` `(layers, r0)`."""
    _, model, variables = adapted(init_r=4, target_r=2, alpha=5.0, **changes)
    leaves = tree.flatten(variables)
    for mask, path in zip(masks, adalora.layers(variables["adalora"]), strict=True):
        leaves[f"adalora/{path}/dot/lam"] *= mask
    return model, tree.unflatten(leaves)


@pytest.mark.parametrize("targets", ["qkv", "encoder"])
def test_as_plain_lora_it_is_smaller_and_says_the_same(targets):
    count = 6 if targets == "qkv" else 12
    masks = np.random.default_rng(0).random((count, 4)) < 0.5
    masks[1] = False  # a layer without rank
    masks[2] = True
    model, variables = pruned(masks, targets=targets)
    s = dataclasses.replace(SETTINGS, alpha=5.0, targets=lora.TARGETS[targets])
    plain, lora_settings = adalora.to_lora(variables, s)
    config = configs.default()
    config.methods = ("lora",)
    config.lora.update(rank=lora_settings.rank, alpha=lora_settings.alpha, targets=targets)
    config.lora.rank_pattern = lora_settings.rank_pattern
    method = methods.load(config)
    smaller = tiny(dot_general_cls=method.dot_general_cls)
    shapes = jax.eval_shape(smaller.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, plain["lora"]) == jax.tree.map(jnp.shape, shapes["lora"])
    assert (
        sum(leaf.shape[0] for name, leaf in tree.flatten(plain["lora"]).items() if name.endswith("/b")) == masks.sum()
    )
    expected = model.apply(variables, IMAGES)
    np.testing.assert_allclose(smaller.apply(plain, IMAGES), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tiny().apply(method.merge(plain), IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_the_change_of_a_kernel_has_the_rank_of_the_mask():
    masks = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)
    _, variables = pruned(masks)
    for mask, adapter in zip(masks, adalora.layers(variables["adalora"]).values(), strict=True):
        assert np.linalg.matrix_rank(adalora.delta(adapter, SETTINGS), tol=1e-5) == mask.sum()


def test_report_counts_what_is_active_and_refuses_what_is_not_frozen():
    params, _, states = history(SETTINGS)
    state, trainable = jax.tree.map(lambda x: x[-1], (states, params))
    told = adalora.report(trainable, (optax.EmptyState(), state), SETTINGS)
    ranks = np.count_nonzero(lams(trainable), axis=1)
    assert told["active_rank"] == {f"layer_{i}": rank for i, rank in enumerate(ranks.tolist())}
    assert told["total_rank"] == 10
    assert told["active_parameters"] == 10 * (6 + 3 + 1)
    json.dumps(told)
    lam = trainable["adalora"]["layer_0"]["dot"]["lam"]
    trainable["adalora"]["layer_0"]["dot"]["lam"] = jnp.ones_like(lam)  # jax.tree.map made a tree of its own
    with pytest.raises(RuntimeError, match=f"{4 - ranks[0]} singular values outside it are not zero"):
        adalora.report(trainable, (optax.EmptyState(), state), SETTINGS)
    with pytest.raises(RuntimeError, match="total rank is 20 of a budget of 10"):
        adalora.report(trainable, state._replace(mask=jnp.ones((5, 4), bool)), SETTINGS)
    adalora.report(trainable, state._replace(final=jnp.array(False)), SETTINGS)


# A run


@pytest.mark.slow
def test_a_run_cut_while_ranks_fall_ends_as_if_it_had_not_been(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.methods = ("adalora",)
    tiny_config.train.epochs = 4.0  # 12 steps: 1 with all ranks, the last allocation at 7
    whole = train.train(tiny_config, tmp_path / "whole")
    assert "step 6  val" in (shown := capsys.readouterr().out)
    assert shown.count("no candidate before step 7") == 2
    real, calls = step.train_step, itertools.count()

    def dies(*args, **kwargs):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(step, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_config, tmp_path / "cut")
    monkeypatch.setattr(step, "train_step", real)
    cut = train.train(tiny_config, tmp_path / "cut")

    states = []
    for folder in (Folder(tmp_path / "whole"), Folder(tmp_path / "cut")):
        built = build(tiny_config, folder.dataset(tiny_config), None)
        with Checkpoints(folder.checkpoints) as checkpoints:
            states.append(checkpoints.restore(step.init_state(built.program, built.trainable))[0])
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert whole["method"] == cut["method"]
    assert whole["method"]["total_rank"] == sum(whole["method"]["active_rank"].values()) == 6 * 8
    assert whole["method"]["active_parameters"] == 6 * 8 * (32 + 32 + 1)
    assert whole["parameters"]["trainable"] == 6 * 12 * (32 + 32 + 1) + 32 * 3 + 3
    assert whole["candidates_from_step"] == 7
    assert whole["best_step"] in (9, 12)
    entries = [[json.loads(x) for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "cut")]
    trains = [[{**e, "images_per_second": 0} for e in part if e["split"] == "train"] for part in entries]
    assert trains[0] == trains[1]
    table = adalora.budgets(adalora.Settings(12, 8, 24.0, "", 0.1, 0.4, 1, 0.5), 6, 12)
    assert [(e["step"], e["total_rank"]) for e in trains[0]] == [(t, table[t]) for t in (3, 6, 9, 10, 12)]
    assert all(e["penalty"] > 0 and len(e["active_rank"]) == 6 for e in trains[0])
    assert Image.open(tmp_path / "whole" / "figures" / "active_rank.png").format == "PNG"


def test_best_checkpoint_and_early_stopping_wait_for_the_final_ranks(tiny_config, tmp_path):
    tiny_config.methods = ("adalora",)
    tiny_config.train.lr = 0.0  # nothing improves after the first epoch
    tiny_config.train.epochs = 6.0  # 18 steps, the last allocation at 11
    tiny_config.train.patience = 1
    summary = train.train(tiny_config, tmp_path / "run")
    assert summary["best_step"] == 12
    assert summary["timing"]["steps"] == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_r": 13}, r"adalora\.target_r=13, adalora\.init_r=12"),
        ({"target_r": 0}, r"adalora\.target_r=0"),
        ({"t_init": 1.0}, r"adalora\.t_init=1\.0: a share"),
        ({"t_final": -0.1}, r"adalora\.t_final=-0\.1"),
        ({"delta_t": 0}, r"adalora\.delta_t=0"),
        ({"alpha": 0.0}, r"adalora\.alpha=0\.0"),
        ({"penalty": -1.0}, r"adalora\.penalty=-1\.0"),
        ({"importance_at": "past"}, r"importance_at='past'"),
        ({"targets": "(qv"}, r"'\(qv'.*no regex"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        methods.load(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"t_init": 0.5, "t_final": 0.5}, "of 6 steps in all, the first 3 (t_init=0.5)"),
        ({"t_init": 0.2, "t_final": 0.7}, "the last 4 (t_final=0.7) the final ones; 1 are left"),
        ({"delta_t": 4}, "3 are left to allocate rank, fewer than delta_t=4"),
    ],
)
def test_phases_that_do_not_fit_are_refused_with_the_numbers(changes, numbers):
    method = methods.load(settings(**{"delta_t": 2, **changes}))
    with pytest.raises(InputError) as error:
        method.wrap_tx(optax.sgd(0.1), 6)
    assert numbers in str(error.value)


def test_a_run_without_room_for_an_allocation_is_refused_before_its_directory_is_made(tiny_config, tmp_path):
    tiny_config.methods = ("adalora",)
    tiny_config.adalora.delta_t = 50
    with pytest.raises(InputError, match=r"of 6 steps in all.*fewer than delta_t=50"):
        train.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
