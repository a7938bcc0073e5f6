import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import init, tiny

from vitft_jax import config as configs
from vitft_jax import methods, optim, step, tree

RNG = np.random.default_rng(0)
BATCH = {"image": RNG.integers(0, 255, (4, 16, 16, 3), np.uint8), "label": np.array([0, 1, 2, 1])}


def setup(trainable="head", random=True, **changes):
    config = configs.default()
    config.methods = changes.pop("methods", ("lora",))
    config.lora.update(changes.pop("lora", {}))
    config.train.lr = 1e-2
    method = methods.load(config)
    model = tiny(dot_general_cls=method.dot_general_cls)
    program = step.Program(
        model=model,
        method=method,
        tx=optim.optimizer(config, method, total_steps=20),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        **changes,
    )
    variables = init(model, random=random)
    return program, *tree.split(variables, lambda n: n.startswith("lora/") or trainable in n)


def computed_shapes(program, trainable, frozen):
    """Shapes of all arrays that arithmetic in the compiled train step makes, transposed operands of products aside."""
    state = step.init_state(program, trainable)
    one = {name: value[:1] for name, value in BATCH.items()}  # more images have as many tokens as a kernel has rows
    text = step.train_step.lower(state, frozen, one, program=program).compile().as_text()
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|add|subtract|multiply|divide|reduce)\(", text)
    return {tuple(int(size) for size in shape.split(",") if size) for shape in found}


def test_no_array_of_a_frozen_kernels_shape_is_computed():
    """Neither its gradient nor W + AB, then. Width and hidden size differ from all other sizes in the model."""
    program, trainable, frozen = setup(lora={"targets": "encoder", "rank": 3})
    kernels = {leaf.shape for name, leaf in tree.flatten(frozen).items() if name.endswith("kernel")}
    assert kernels == {(32, 32), (32, 64), (64, 32), (48, 32)}
    computed = computed_shapes(program, trainable, frozen)
    assert not computed & (kernels | {shape[::-1] for shape in kernels})
    assert {(32, 3), (3, 64)} <= computed | {shape[::-1] for shape in computed}  # while gradients of adapters are


def test_gradients_of_kernels_that_train_are_among_them():
    assert {(32, 32), (32, 64), (64, 32)} <= computed_shapes(*setup(trainable="kernel", methods=()))


def test_optimizer_state_only_for_what_trains():
    program, trainable, _ = setup()
    state = step.init_state(program, trainable)
    scalars = sum(leaf.size == 1 for leaf in jax.tree.leaves(state.opt_state))
    assert tree.count(state.opt_state) - scalars == 2 * tree.count(trainable)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_lowers_the_loss_and_leaves_frozen_leaves_alone(method):
    program, trainable, frozen = setup(methods=(method,))
    before = jax.tree.map(np.array, frozen)
    state, losses = step.init_state(program, trainable), []
    for _ in range(8):
        state, values = step.train_step(state, frozen, BATCH, program=program)
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0] / 2
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    for name, leaf in tree.flatten(state.trainable).items():
        assert (leaf != tree.flatten(trainable)[name]).any(), name
    assert int(state.step) == 8


def test_one_compilation():
    program, trainable, frozen = setup()
    state = step.init_state(program, trainable)
    before = step.train_step._cache_size()
    for _ in range(3):
        state, _ = step.train_step(state, frozen, BATCH, program=program)
    assert step.train_step._cache_size() == before + 1


@pytest.mark.parametrize(
    ("label", "parts"), [(BATCH["label"], (1, 2, 4)), (RNG.dirichlet(np.ones(3), 4).astype(np.float32), (1, 2))]
)
def test_micro_batches_equal_the_whole_batch(label, parts):
    results, batch = [], {**BATCH, "label": label}
    for accumulate in parts:
        program, trainable, frozen = setup(accumulate=accumulate, class_weights=(0.5, 1.0, 2.0))
        state, values = step.train_step(step.init_state(program, trainable), frozen, batch, program=program)
        results.append((state.trainable, values))
    for trainable, values in results[1:]:
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(values[key], results[0][1][key], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), trainable, results[0][0])


def test_dropout_differs_by_step_and_repeats_by_seed():
    losses = []
    for _ in range(2):
        program, trainable, frozen = setup(lora={"dropout": 0.5})
        grads = [
            step.loss(trainable, frozen, BATCH, jax.random.fold_in(jax.random.key(0), i), program)[0] for i in (0, 1)
        ]
        losses.append([float(g) for g in grads])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_multiclass_loss_against_optax_with_weights_and_smoothing():
    program, *_ = setup(class_weights=(0.5, 1.0, 2.0), label_smoothing=0.1)
    logits, labels = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), BATCH["label"]
    targets = 0.9 * np.eye(3)[labels] + 0.1 / 3
    expected = np.array([0.5, 1.0, 2.0])[labels] * -(targets * jax.nn.log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(step.example_losses(program, logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_mixed_labels_is_the_mixture_of_the_losses(multilabel, weights, smoothing):
    """As in mixup's own training: the loss is linear in the labels, whatever weighs or smooths them."""
    program, *_ = setup(multilabel=multilabel, class_weights=weights, label_smoothing=smoothing)
    logits = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    first, second = (RNG.integers(0, 2, (6, 3)) if multilabel else RNG.integers(0, 3, 6) for _ in range(2))
    share = RNG.uniform(size=6).astype(np.float32)
    shares = [labels if multilabel else np.eye(3)[labels] for labels in (first, second)]
    mixed = jnp.asarray(share[:, None] * shares[0] + (1 - share[:, None]) * shares[1], jnp.float32)
    losses = [step.example_losses(program, logits, jnp.asarray(labels)) for labels in (first, second)]
    expected = share * losses[0] + (1 - share) * losses[1]
    np.testing.assert_allclose(step.example_losses(program, logits, mixed), expected, rtol=1e-5)


def test_loss_of_shares_against_optax():
    program, *_ = setup()
    logits = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    shares = jnp.asarray(RNG.dirichlet(np.ones(3), 4), jnp.float32)
    expected = optax.softmax_cross_entropy(logits, shares)
    np.testing.assert_allclose(step.example_losses(program, logits, shares), expected, rtol=1e-6)


def test_multilabel_loss_against_optax():
    program, *_ = setup(multilabel=True, class_weights=(3.0, 1.0, 1.0))
    logits = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    labels = jnp.asarray(RNG.integers(0, 2, (4, 3)), jnp.float32)
    each = optax.sigmoid_binary_cross_entropy(logits, labels) * jnp.where(labels == 1, jnp.array([3.0, 1, 1]), 1)
    np.testing.assert_allclose(step.example_losses(program, logits, labels), each.mean(-1), rtol=1e-6)


def losses(**changes):
    """A program of which `example_losses` needs no more than these settings."""
    return step.Program(model=None, method=None, tx=None, mean=(), std=(), **changes)


def hand_focal(p, target, gamma):
    """Sum over the classes of target (1 - p)^gamma (-log p)."""
    return (target * (1 - p) ** gamma * -np.log(p)).sum(-1)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 2.0)])
def test_focal_loss_by_its_formula(gamma, weights):
    program = losses(focal_gamma=gamma, class_weights=weights, label_smoothing=0.1)
    logits, labels = RNG.normal(size=(4, 3)), BATCH["label"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = (0.9 * np.eye(3)[labels] + 0.1 / 3) * np.array(weights or (1, 1, 1))[labels][:, None]
    found = step.example_losses(program, jnp.asarray(logits, jnp.float32), labels)
    np.testing.assert_allclose(found, hand_focal(p, targets, gamma), rtol=1e-5)


def test_focal_loss_by_hand():
    """Lin et al. 2017: with gamma 2, an image at p = 0.9 counts a hundredth, one at p = 0.5 a quarter."""
    program = losses(focal_gamma=2.0)
    logits = jnp.log(jnp.array([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2]]))
    found = step.example_losses(program, logits, jnp.array([0, 0]))
    np.testing.assert_allclose(found, [0.01 * -np.log(0.9), 0.25 * -np.log(0.5)], rtol=1e-4)
    many = losses(focal_gamma=2.0, multilabel=True)
    logits = jnp.log(jnp.array([[0.9 / 0.1, 0.2 / 0.8, 1.0]]))
    found = step.example_losses(many, logits, jnp.array([[1.0, 0.0, 1.0]]))
    by_hand = [0.1**2 * -np.log(0.9), 0.2**2 * -np.log(0.8), 0.5**2 * -np.log(0.5)]
    np.testing.assert_allclose(found, [np.mean(by_hand)], rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_labels_against_optax(gamma):
    program = losses(multilabel=True, focal_gamma=gamma)
    logits = jnp.asarray(4 * RNG.normal(size=(20, 3)), jnp.float32)
    labels = jnp.asarray(RNG.integers(0, 2, (20, 3)), jnp.float32)
    expected = optax.losses.sigmoid_focal_loss(logits, labels, gamma=gamma).mean(-1)
    np.testing.assert_allclose(step.example_losses(program, logits, labels), expected, rtol=2e-4)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_of_certain_images_is_finite_and_so_is_its_gradient(multilabel, gamma):
    program = losses(focal_gamma=gamma, multilabel=multilabel)
    logits = jnp.array([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]])
    labels = jnp.array([[1.0, 0, 0]] * 2) if multilabel else jnp.array([0, 0])
    values = step.example_losses(program, logits, labels)
    slopes = jax.grad(lambda z: step.example_losses(program, z, labels).sum())(logits)
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    assert values[1] > 100
    assert slopes[1, 0] < -0.3  # certain and wrong: it learns as with cross-entropy


def test_images_are_normalised():
    program, trainable, frozen = setup()
    x = (BATCH["image"] / 255 - 0.5) / 0.25
    expected = program.model.apply(tree.join(trainable, frozen), x)
    np.testing.assert_allclose(
        step.eval_step(trainable, frozen, BATCH["image"], program=program), expected, rtol=1e-4, atol=1e-4
    )


def test_schedule_rises_then_falls_to_zero():
    config = configs.default()
    rate = optim.schedule(config, 100)
    values = np.array([float(rate(i)) for i in range(101)])
    assert values[0] > 0
    assert (np.diff(values[:11]) > 0).all()
    assert (np.diff(values[10:]) < 0).all()
    np.testing.assert_allclose([values.max(), values[-1]], [config.train.lr, 0], atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_a_warm_up_of_nearly_all_steps_leaves_one_to_the_cosine(steps):
    config = configs.default()
    config.train.warmup = 0.95
    values = [float(optim.schedule(config, steps)(i)) for i in range(steps + 1)]
    assert (np.diff(values[:steps]) > 0).all()
    np.testing.assert_allclose(values[-2:], [config.train.lr, 0], atol=1e-9)


def test_decay_touches_kernels_in_params_only():
    leaves = {"params": {"head": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}}, "lora": {"q": {"kernel": 0, "a": 0}}}
    chosen = [name for name, decays in tree.flatten(optim.decays(leaves)).items() if decays]
    assert chosen == ["params/head/kernel"]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_bounds_what_the_optimizer_sees(clip):
    config = configs.default()
    config.train.clip, config.train.warmup = clip, 0.0
    seen = []

    def record(tx, total_steps):
        spy = optax.stateless(lambda g, p: (seen.append(optax.global_norm(g)), g)[1])
        return optax.chain(spy, tx)

    method = methods.Method(wrap_tx=record)
    tx = optim.optimizer(config, method, 10)
    params = {"params": {"w": jnp.zeros(4)}}
    tx.update({"params": {"w": jnp.ones(4)}}, tx.init(params), params)
    np.testing.assert_allclose(seen[0], clip or 2.0, rtol=1e-6)
