"""What tests share: tiny models of every family."""

import jax
import jax.numpy as jnp
import numpy as np

from vitft_jax import vit

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
