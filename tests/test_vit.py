import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, init, tiny

from vitft_jax import product, tree, vit

GOLDEN = {  # family, size: parameters at 224 px with 1000 classes, patch 16; timm's counts for the same names
    ("vit", "tiny"): 5_717_416,
    ("vit", "small"): 22_050_664,
    ("vit", "base"): 86_567_656,
    ("vit", "large"): 304_326_632,
    ("deit", "tiny"): 5_910_800,
    ("deit", "small"): 22_436_432,
    ("deit", "base"): 87_338_192,
}


def shapes(model, size=224):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


@pytest.mark.parametrize(("family", "size"), GOLDEN)
def test_parameter_counts(family, size):
    model = vit.ViT(**vit.VARIANTS[f"{family}_{size}_patch16"], classes=1000)
    assert tree.count(shapes(model)) == GOLDEN[family, size]


@pytest.mark.parametrize(("classes", "count"), [(1000, 86_567_656), (101, 85_876_325), (3, 85_800_963)])
def test_parameter_counts_of_vit_base_by_classes(classes, count):
    assert tree.count(shapes(vit.ViT(**vit.VARIANTS["vit_base_patch16"], classes=classes))) == count


def test_every_variant_has_the_parameters_of_its_formula():
    for name in (name for name in vit.VARIANTS if not name.endswith(("14", "32"))):
        kwargs = {**vit.VARIANTS[name], "depth": 3}  # as each takes long to trace
        d, h, depth, patch = kwargs["width"], kwargs["hidden"], kwargs["depth"], kwargs["patch"]
        size = patch * 4
        prefix = 1 + kwargs.get("distilled", False)
        block = 4 * (d * d + d) + 2 * d * h + h + d + 4 * d + 2 * d * kwargs.get("layer_scale", False)
        head_in = d * len(kwargs.get("features", "cls").split("+"))
        embed = patch * patch * 3 * d + d + prefix * d + (16 + prefix) * d
        expected = embed + depth * block + 2 * d + prefix * (head_in * 5 + 5)
        assert tree.count(shapes(vit.ViT(**kwargs, classes=5), size)) == expected, name


def test_patch_embedding_equals_a_convolution_whose_stride_is_its_size():
    embed = vit.Embed(width=8, patch=4, distilled=False)
    images = jax.random.normal(jax.random.key(1), (2, 12, 8, 3))
    variables = embed.init(jax.random.key(0), images)
    kernel = variables["params"]["patch"]["kernel"].reshape(4, 4, 3, 8)
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = convolved.reshape(2, 6, 8) + variables["params"]["position"][:, 1:]
    np.testing.assert_allclose(embed.apply(variables, images)[:, 1:], expected, atol=1e-5)


def test_distilled_logits_are_the_mean_of_both_heads():
    model = tiny(distilled=True)
    variables = init(model)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    tokens = model.clone(classes=0).apply(variables, images)
    heads = variables["params"]
    cls, dist = (
        tokens[:, i * 32 : (i + 1) * 32] @ heads[name]["kernel"] + heads[name]["bias"]
        for i, name in enumerate(("head", "head_dist"))
    )
    np.testing.assert_allclose(model.apply(variables, images), (cls + dist) / 2, atol=1e-5)


@pytest.mark.parametrize("features", vit.FEATURES)
def test_features_read_class_token_and_patch_mean(features):
    model = tiny(features=features, classes=0)
    variables = init(model)
    out = model.apply(variables, jax.random.normal(jax.random.key(1), (2, 16, 16, 3)))
    assert out.shape == (2, 32 * len(features.split("+")))
    both = tiny(features="cls+mean", classes=0).apply(variables, jax.random.normal(jax.random.key(1), (2, 16, 16, 3)))
    expected = {"cls": both[:, :32], "mean": both[:, 32:], "cls+mean": both}[features]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_last_block_computes_the_class_token_only_and_it_is_the_same():
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = init(tiny(classes=0))
    whole = tiny(classes=0, features="cls+mean").apply(variables, images)[:, :32]
    np.testing.assert_allclose(tiny(classes=0).apply(variables, images), whole, atol=1e-5)
    shapes = {
        features: {v.aval.shape for e in jaxpr.eqns for v in e.outvars}
        for features in ("cls", "cls+mean")
        for jaxpr in [jax.make_jaxpr(tiny(classes=0, features=features, depth=1).apply)(variables, images)]
    }
    assert (2, 17, 64) in shapes["cls+mean"]
    assert (2, 17, 64) not in shapes["cls"]


def test_selector_sees_every_block_and_the_attention_rows_it_asks_for():
    seen = []

    class Spy:
        def wants_rows(self, block):
            return block == 1

        def __call__(self, block, x, rows, carry):
            seen.append((block, x.shape, None if rows is None else rows.shape, carry))
            return (x[:, :-4], None, "dropped") if block == 0 else (x, None, carry)

    model = tiny(depth=3, select=Spy())
    variables = init(tiny(depth=3))
    model.apply(variables, jnp.zeros((2, 16, 16, 3)))
    assert seen == [
        (0, (2, 17, 32), None, None),
        (1, (2, 13, 32), (2, 4, 1, 13), "dropped"),
        (2, (2, 1, 32), None, "dropped"),  # after the last block the class token alone is of use
    ]


def test_every_linear_layer_goes_through_the_door():
    calls = []

    def dot(x, kernel, dimensions, **kwargs):
        calls.append(kernel.shape)
        return jax.lax.dot_general(x, kernel, dimensions, **kwargs)

    model = tiny(distilled=True)
    variables = init(model)
    model.clone(dot_general_cls=lambda: dot).apply(variables, jnp.zeros((1, 16, 16, 3)))
    kernels = [leaf.shape for name, leaf in tree.flatten(variables["params"]).items() if name.endswith("kernel")]
    assert sorted(calls) == sorted(kernels)
    assert len(kernels) == 1 + 2 * 6 + 2


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_logits():
    model, half = tiny(), tiny(dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    variables = half.init(jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    a, b = model.apply(variables, images), half.apply(variables, images)
    assert b.dtype == jnp.float32
    assert not (a == b).all()
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(a).max()))
    dots = re.findall(
        r"dot_general.*?:.*?\(tensor<(.*?)>, tensor<(.*?)>\)", jax.jit(half.apply).lower(variables, images).as_text()
    )
    assert len(dots) >= 6 * model.depth
    assert {kind.rsplit("x", 1)[1] for pair in dots for kind in pair} == {"bf16"}


def test_the_door_gets_the_kernel_as_it_is_stored():
    """What quantises it, or reads its norm, must not see it rounded to the compute dtype."""
    seen = []

    def dot(x, kernel, dimensions, **_):
        seen.append((x.dtype, kernel.dtype))
        return product.dot_general(x, kernel, dimensions)

    model = tiny(dtype=jnp.bfloat16, dot_general_cls=lambda: dot)
    model.apply(init(tiny()), jnp.zeros((1, 16, 16, 3)))
    assert set(seen) == {(jnp.dtype("bfloat16"), jnp.dtype("float32"))}


def test_batch_elements_do_not_see_each_other():
    model = tiny(layer_scale=True)
    variables = init(model)
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    alone = jnp.concatenate([model.apply(variables, images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(model.apply(variables, images), alone, atol=1e-5)


def test_parameter_count_of_vit_huge():
    """That of torchvision's vit_h_14."""
    assert tree.count(shapes(vit.ViT(**vit.VARIANTS["vit_huge_patch14"], classes=1000))) == 632_045_800


@pytest.mark.parametrize(
    ("changes", "size", "message"), [({}, 18, "18x18.*patch size 4"), ({"features": "max"}, 16, "max")]
)
def test_bad_sizes_and_features_are_refused(changes, size, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes).init(jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_variants_cover_sizes_and_patches():
    assert {f"vit_{s}_patch{p}" for s in ("tiny", "small", "base", "large", "huge") for p in (8, 14, 16, 32)} <= set(
        vit.VARIANTS
    )
    assert TINY.keys() <= vit.VARIANTS["vit_tiny_patch16"].keys()
