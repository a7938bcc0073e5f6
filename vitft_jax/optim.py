"""The optimiser of a run: AdamW under a warm-up and a cosine, with clipping."""

from typing import Any

import optax

from vitft_jax import tree
from vitft_jax.methods import Method


def schedule(config: Any, total_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear rise over ``train.warmup`` of the steps, then a cosine to 0."""
    warmup = min(round(config.train.warmup * total_steps), total_steps - 1)  # the cosine has a step at least
    return optax.warmup_cosine_decay_schedule(
        init_value=config.train.lr / (warmup + 1),
        peak_value=config.train.lr,
        warmup_steps=warmup,
        decay_steps=total_steps,
    )


def decays(trainable: tree.Tree) -> dict[str, Any]:
    """Which leaves decay: kernels in `params`; not biases, norms, positions, tokens or adapters."""
    return tree.map_named(lambda name, _: name.startswith("params/") and name.endswith("/kernel"), trainable)


def optimizer(config: Any, method: Method, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019); a method's wrapper sees gradients after clipping."""
    adamw = optax.adamw(schedule(config, total_steps), weight_decay=config.train.weight_decay, mask=decays)
    clip = optax.clip_by_global_norm(config.train.clip) if config.train.clip else optax.identity()
    return optax.chain(clip, method.wrap_tx(adamw, total_steps))
