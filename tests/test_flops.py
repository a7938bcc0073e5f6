import jax
import jax.numpy as jnp
import pytest
from support import lora_config

from vitft_jax import flops, methods, tree, vit
from vitft_jax.methods.skip import Skip, Split

WIDE = {"patch": 16, "width": 384, "depth": 4, "heads": 6, "hidden": 1536, "classes": 3}
SELECTORS = {
    "dense": None,
    "prune": Skip((Split(0, 0.5), Split(2, 0.5))),
    "fuse": Skip((Split(0, 0.5),), fuse=True),
    "rejoin": Skip((Split(0, 0.5, rejoin=2),)),
}


def by_xla(model, size):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.jit(model.apply).lower(shapes, images).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("name", "features"), [*((name, "cls") for name in SELECTORS), ("prune", "cls+mean"), ("dense", "cls+mean")]
)
def test_formula_is_within_5_percent_of_xla_and_below_dense(name, features):
    model = vit.ViT(**WIDE, features=features, select=SELECTORS[name])
    ours, theirs = flops.forward(model, 224), by_xla(model, 224)
    assert abs(ours / theirs - 1) < 0.05
    found = flops.report(model, 224)
    assert found["forward"] == ours
    if model.select is not None:
        assert found["forward"] < found["dense_forward"] == flops.forward(model.clone(select=None), 224)
        assert found["ratio"] == found["forward"] / found["dense_forward"] < 0.97
        assert theirs < by_xla(model.clone(select=None), 224)


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
@pytest.mark.parametrize("name", ["dense", "prune"])
def test_train_step_is_within_5_percent_of_xla(name, full):
    """XLA counts the elements of norms, GELU and softmax too, and adapters of rank 1."""
    model = vit.ViT(**WIDE, select=SELECTORS[name])
    method = methods.load(lora_config(rank=1, targets="qkv"))
    model = model if full else model.clone(dot_general_cls=method.dot_general_cls)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    trainable, frozen = tree.split(shapes, lambda leaf: full or leaf.startswith("lora/") or "head" in leaf)

    def loss(trainable, frozen, images):
        return jnp.sum(model.apply(tree.join(trainable, frozen), images) ** 2)

    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, images).compile()
    assert abs(flops.train_step(model, 224, full=full) / step.cost_analysis()["flops"] - 1) < 0.05


def test_mask_mode_saves_nothing_and_says_so():
    model = vit.ViT(**WIDE, select=Skip((Split(0, 0.5),), mode="mask"))
    assert flops.report(model, 224)["ratio"] > 1  # the rows for the score come on top


@pytest.mark.parametrize(("name", "giga"), [("vit_small_patch16", 4.60), ("vit_base_patch16", 17.56)])
def test_published_multiplications_of_whole_models(name, giga):
    """Of models whose last block computes all tokens, as theirs does."""
    model = vit.ViT(**vit.VARIANTS[name], classes=1000, features="mean")
    assert flops.forward(model, 224) / 2e9 == pytest.approx(giga, rel=5e-3)


def test_the_settings_of_the_original_cost_four_fifths():
    model = vit.ViT(**vit.VARIANTS["vit_base_patch16"], classes=1000, features="cls+mean")
    model = model.clone(select=Skip((Split(6, 0.35), Split(8, 0.35))))
    assert [n for n, _ in flops.tokens(model, 224)] == [197] * 7 + [129] * 2 + [85] * 3
    assert flops.report(model, 224)["ratio"] == pytest.approx(0.80, abs=0.005)
