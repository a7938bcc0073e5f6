"""Where arrays lie: the rules by themselves, and tiny runs on eight virtual devices against one."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec, SingleDeviceSharding
from support import tiny, virtual_devices

from vitft_jax import config as configs
from vitft_jax import methods, optim, sharding, step, tree
from vitft_jax.build import build
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder

P = PartitionSpec
METHODS = ("full", "lora", "adalora", "skip", "qat")
EIGHT = ("data", "fsdp", "model")
ALL = ("lora", "dora", "static", "int8")  # with everything at once: FSDP, tensor parallelism and micro-batches
ROUNDED = "qat in float32"


def config_of(*names, **quant):
    config = configs.default()
    config.methods = names
    config.lora.targets = config.adalora.targets = "encoder"
    config.quant.update(quant)
    return config


def shapes_of(config, trainable=lambda name: name.startswith(("params/head", "lora", "adalora"))):
    """Shapes of all that a run holds, by name; and the rules of its methods."""
    method = methods.load(config)
    model = tiny(dot_general_cls=method.dot_general_cls)
    variables = jax.eval_shape(
        lambda: method.prepare(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))),
    )
    chosen, frozen = tree.split(variables, trainable)
    opt_state = jax.eval_shape(optim.optimizer(config, method, 20).init, chosen)
    state = step.State(jax.ShapeDtypeStruct((), jnp.int32), chosen, opt_state)
    return {"state": state, "frozen": frozen}, method.sharding


def layout(rules=(), data=4, model=2, fsdp=False):
    return sharding.Layout(AbstractMesh((data, model), sharding.AXES), fsdp, rules)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of("lora"),
        config_of("dora"),
        config_of("adalora"),
        config_of("quant", static=True),
        config_of("quant", "lora", base="int8"),
        config_of("quant", "adalora"),
        config_of("lora", "skip"),
    ],
    ids=lambda config: "+".join(config.methods) or "full",
)
def test_every_leaf_has_a_rule_and_every_rule_a_leaf(config, fsdp):
    shapes, rules = shapes_of(config)
    layout(rules, fsdp=fsdp).check(shapes)


def test_a_leaf_without_a_rule_and_a_rule_without_a_leaf_are_named():
    shapes, rules = shapes_of(config_of("lora"))
    with pytest.raises(InputError, match=r"no rule covers state/\S*dot/[ab]"):
        layout().check(shapes)
    with pytest.raises(InputError, match=r"'/dot/c\$' cover none"):
        layout((*rules, (r"/dot/c$", ("in",)))).check(shapes)
    with pytest.raises(InputError, match=r"'/dot/b\$' cover none"):  # the first takes them all
        layout(((r"/dot/[ab]$", (None, None)), *rules[1:])).check(shapes)
    with pytest.raises(InputError, match=r"/dot/a is for dimensions"):
        layout(((r"/dot/a$", ("in",)), *rules[1:])).check(shapes)


QUERY, OUT = "blocks_0/attn/query", "blocks_0/mlp/fc2"


@pytest.mark.parametrize(
    ("name", "shape", "cut"),
    [
        (f"params/{QUERY}/kernel", (32, 64), P(None, "model")),
        (f"params/{QUERY}/bias", (64,), P("model")),
        (f"lora/{QUERY}/dot/a", (32, 8), P()),
        (f"lora/{QUERY}/dot/b", (8, 64), P(None, "model")),
        (f"lora/{QUERY}/dot/m", (64,), P("model")),
        (f"adalora/{QUERY}/dot/q", (32, 8), P()),
        (f"adalora/{QUERY}/dot/p", (8, 64), P(None, "model")),
        (f"adalora/{QUERY}/dot/lam", (8,), P()),
        (f"quant/{QUERY}/quant/scale", (64,), P("model")),
        (f"state/opt_state/1/mu/lora/{QUERY}/dot/b", (8, 64), P(None, "model")),
        (f"params/{OUT}/kernel", (64, 32), P("model")),
        (f"params/{OUT}/bias", (32,), P()),
        (f"lora/{OUT}/dot/a", (64, 8), P("model")),
        (f"lora/{OUT}/dot/b", (8, 32), P()),
        (f"lora/{OUT}/dot/m", (32,), P()),
        (f"adalora/{OUT}/dot/q", (64, 8), P("model")),
        (f"adalora/{OUT}/dot/p", (8, 32), P()),
        (f"quant/{OUT}/quant/scale", (32,), P()),
        ("params/head/kernel", (32, 4), P()),
        ("params/blocks_0/norm1/bias", (32,), P()),
        ("params/embed/patch/kernel", (48, 32), P()),
        ("params/embed/position", (1, 17, 32), P()),
    ],
)
def test_linear_layers_and_what_stands_beside_them_are_cut_by_output_or_input(name, shape, cut):
    rules = [methods.load(config_of(*names, base="int8")).sharding for names in (["dora"], ["adalora"], ["quant"])]
    assert layout(sum(rules, ())).spec(name, shape) == cut


@pytest.mark.parametrize(
    ("name", "shape", "cut"),
    [
        (f"params/{QUERY}/kernel", (32, 64), P("data", "model")),
        (f"params/{OUT}/kernel", (64, 32), P("model", "data")),
        ("params/embed/patch/kernel", (48, 32), P("data")),  # the longer one
        ("params/head/kernel", (30, 4), P(None, "data")),  # 4 does not divide 30
        ("params/head/kernel", (30, 3), P()),
        ("params/embed/position", (1, 16, 32), P(None, None, "data")),
        ("params/head/bias", (64,), P()),
        ("params/blocks_0/norm1/scale", (64,), P()),
    ],
)
def test_fsdp_cuts_the_longest_dimension_that_divides(name, shape, cut):
    assert layout(fsdp=True).spec(name, shape) == cut


def test_model_must_divide_what_it_cuts():
    with pytest.raises(InputError, match=r"mesh\.model=3: does not divide the 32 of params/\S*kernel"):
        layout(model=3).spec(f"params/{QUERY}/kernel", (32, 32))


@pytest.mark.parametrize("mesh", [{"data": 3}, {"model": 2}, {"data": 1, "model": 5}])
def test_a_mesh_of_more_devices_than_there_are_is_refused(tiny_config, mesh):
    tiny_config.mesh.update(mesh)
    with pytest.raises(InputError, match="config keys mesh"):
        sharding.layout(tiny_config)


def test_one_device_is_left_as_it_is(tiny_config):
    here = sharding.layout(tiny_config)
    assert here.mesh is None
    assert here.reader == (0, 1)
    rows = {"image": np.zeros(3)}
    assert here.batch(rows) is rows
    assert here.products(None) is None
    arrays = here.put({"a": np.ones(2)})
    assert arrays["a"].sharding == SingleDeviceSharding(jax.devices()[0])
    assert here.pin(arrays) is arrays
    here.check_batch(7, 1)


def test_batches_that_do_not_divide_are_refused_with_what_would():
    layout(data=4).check_batch(16, 4)
    with pytest.raises(InputError, match=r"2 micro-batches of 6 images .* train.batch_size=16, or mesh.data=3"):
        layout(data=4).check_batch(12, 2)
    assert [layout(data=4).rows(n) for n in (1, 4, 5)] == [4, 4, 8]


def test_a_run_may_go_on_elsewhere(tiny_config, tmp_path):
    """Another mesh is no other run; other settings are."""
    folder, there = Folder(tmp_path / "run"), tiny_config.copy_and_resolve_references()
    dataset = folder.dataset(tiny_config)
    folder.open(tiny_config, dataset, build(tiny_config, dataset, None))
    there.mesh.data, there.remat = 1, "full"
    folder.check(there)
    there.seed = 1
    with pytest.raises(InputError, match="differs in seed"):
        folder.check(there)


def on_eight(*arguments):
    """Lines of JSON that a script of the tests prints, on eight virtual devices."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env=virtual_devices(8),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert not done.returncode, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def trained():
    lines = on_eight(
        "meshes.py",
        f"{','.join(METHODS)}:one,{','.join(EIGHT)}",
        f"{','.join(ALL[1:])}:one",
        f"{','.join(ALL)}:all",
        f"{ROUNDED}:one,{','.join(EIGHT)}",
        "restored:data,fsdp,model,all,fsdp 2",
        "memory:one,fsdp 2,fsdp 4,fsdp,data",
        "product:data",
    )
    return {(line["method"], line["mesh"]): line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mesh"), [*itertools.product(METHODS, EIGHT), *itertools.product(ALL, ("all",))])
def test_losses_are_those_of_one_device(trained, method, mesh):
    one, many = trained[method, "one"], trained[method, mesh]
    assert len(one["losses"]) == 20
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < 0.95 * one["losses"][0]
    assert many["mask"] == one["mask"]
    assert (one["mask"] is not None) == (method == "adalora")
    assert many["compilations"] == 1 or mesh == "data"  # which is compiled by hand, to look into it


@pytest.mark.slow
@pytest.mark.parametrize("mesh", EIGHT)
def test_in_float32_a_turned_integer_moves_a_loss_a_little(trained, mesh):
    """What `DOUBLE` of meshes.py leaves out: AQT's product, and the numbers that users see."""
    np.testing.assert_allclose(trained[ROUNDED, mesh]["losses"], trained[ROUNDED, "one"]["losses"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*EIGHT, "all", "fsdp 2"])
def test_a_run_of_one_device_goes_on_elsewhere_read_straight_into_place(trained, mesh):
    found = trained["restored", mesh]
    assert found["in place"]
    assert len(found["losses"]) == 10
    np.testing.assert_allclose(found["losses"], found["of one"], rtol=1e-5)


@pytest.mark.slow
def test_adalora_pruned_on_the_way(trained):
    mask = np.array(trained["adalora", "one"]["mask"])
    assert mask.sum() == 2 * len(mask) < mask.size


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, ROUNDED])
def test_examples_are_not_sent_around(trained, method):
    """Gradients and a few scalars are summed; nothing is gathered: not in products, attention, int8 or the choice of tokens."""
    assert {kind for _, kind in trained[method, "data"]["collectives"]} == {"all-reduce"}


@pytest.mark.slow
def test_a_product_sums_the_gradient_of_its_kernel_once_and_sends_nothing_else(trained):
    ((result, kind),) = trained["product", "data"]["collectives"]
    assert (kind, re.sub(r"\{.*\}", "", result)) == ("all-reduce", "f32[32,64]")


@pytest.mark.slow
def test_bytes_of_the_frozen_base_fall_as_the_number_of_devices(trained):
    """By the memory analysis of the compiled step. Leaves of one dimension stay whole, and so they are counted."""
    sizes = {name: 4 * math.prod(shape) for name, shape in trained["memory", "one"]["frozen"].items()}
    small = sum(size for name, size in sizes.items() if len(trained["memory", "one"]["frozen"][name]) == 1)
    assert small < 0.05 * sum(sizes.values())
    for n, mesh in ((1, "one"), (2, "fsdp 2"), (4, "fsdp 4"), (8, "fsdp")):
        assert trained["memory", mesh]["base"] == small + (sum(sizes.values()) - small) / n
    assert trained["memory", "data"]["base"] == sum(sizes.values())
    assert trained["memory", "fsdp"]["state"] < trained["memory", "data"]["state"] / 4


@pytest.mark.slow
def test_variables_are_cut_as_the_rules_say(trained):
    def cut(mesh):
        return {name: (tuple(whole), tuple(here)) for name, (_, whole, here) in trained["lora", mesh]["layout"].items()}

    kernel, adapter = "frozen/params/blocks_0/attn/query/kernel", "trainable/lora/blocks_0/attn/query/dot/b"
    assert cut("data")[kernel] == ((32, 32), (32, 32))
    assert cut("fsdp")[kernel] == ((32, 32), (4, 32))
    assert cut("fsdp")[adapter] == ((4, 32), (4, 4))
    assert cut("model")[kernel] == ((32, 32), (32, 8))
    assert cut("model")[adapter] == ((4, 32), (4, 8))
    assert cut("all")[kernel] == ((32, 32), (8, 16))
