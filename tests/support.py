"""What tests share: tiny models of every family, with adapters."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vitft_jax import config as configs
from vitft_jax import methods, run, step, tree, vit
from vitft_jax.build import build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.folder import Folder
from vitft_jax.methods import skip

TINY = {"patch": 4, "width": 32, "depth": 2, "heads": 4, "hidden": 64}


def tiny(**changes) -> vit.ViT:
    return vit.ViT(**{**TINY, "classes": 3, **changes})


def randomised(variables, seed=0):
    """Fills every leaf with noise around its initial value, so that zeros and ones hide nothing."""
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def init(model, size=16, seed=0, random=True):
    """Variables of a model, `randomised` unless told otherwise."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, size, size, 3)))
    return randomised(variables, seed) if random else dict(variables)


def lora_config(method="lora", **changes):
    """A config with LoRA or a variant of it, and changes to its settings."""
    config = configs.default()
    config.methods = (method,)
    config.lora.update(changes)
    return config


def skipping(**changes):
    """The selector of a config with these settings of skipping."""
    config = configs.default()
    config.skip.update(changes)
    return skip.selector(config.skip)


def adapted(name="lora", random=True, model=None, **changes):
    """A tiny model with LoRA or a variant: (method, model, variables), the adapters as initialised unless `random`."""
    method = methods.load(lora_config(name, **changes))
    model = (model or tiny()).clone(dot_general_cls=method.dot_general_cls)
    variables = init(model, random=False)
    variables = dict(method.prepare({**variables, "params": randomised(variables["params"])}))
    if random:
        variables["lora"] = randomised(variables["lora"])
    return method, model, variables


def adapters_and_head(variant, classes, method="lora", **changes):
    """Number of parameters that train in a model of full size."""
    dot_general_cls = methods.load(lora_config(method, **changes)).dot_general_cls
    model = vit.ViT(**vit.VARIANTS[variant], classes=classes, dot_general_cls=dot_general_cls)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    return tree.count(shapes["lora"]) + tree.count(shapes["params"]["head"])


def integer_dots(compiled):
    """Shapes of the int32 results of products of two int8 arrays in a compiled program."""
    text, shapes = compiled.as_text(), []
    for computation in text.split("\n\n"):
        types = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", computation)) | dict(
            re.findall(r"%?([\w.-]+): (\w+)\[", computation)
        )
        for out, shape, left, right in re.findall(
            r" = (\w+)\[([\d,]*)\]\S* dot\(%?([\w.-]+), %?([\w.-]+)\)", computation
        ):
            if (out, types[left], types[right]) == ("s32", "s8", "s8"):
                shapes.append(shape)
    return shapes


def virtual_devices(count):
    """The environment of a process with so many devices, which finds our scripts and those of the tests."""
    here = Path(__file__).parent
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parent / "scripts"))),
    }


def trained(workdir):
    """State and loop of a run's newest checkpoint."""
    folder = Folder(workdir)
    config, source = run.resolve(folder.config())
    built = build(config, folder.dataset(config), source)
    with Checkpoints(folder.checkpoints) as checkpoints:
        return checkpoints.restore(step.init_state(built.program, built.trainable))


def lines(workdir):
    """The entries of a run's log."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def largest(folder):
    """The largest file in a folder: in a checkpoint, one that holds numbers."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
