"""Saliency: the gradient of a logit by the brightness of each pixel (Simonyan et al. 2013, arXiv:1312.6034), by SmoothGrad.

SmoothGrad (Smilkov et al. 2017, arXiv:1706.03825) is the mean of the gradients at noisy copies of the image. Often it is
multiplied by the image; here not: that hides whatever is black, which in ultrasound is fluid and shadow.

Through int8 products the gradient is straight-through, that of the products of the rounded values with rounding taken for the
identity (see `quantizer`), and that of token skipping is the one with the choice of tokens fixed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vitft_jax import step, tree

SAMPLES = 8
"""Noisy copies."""
NOISE = 0.1
"""Standard deviation of the noise, as a share of the range of the pixels; Smilkov et al. look at 0.1 to 0.2."""


@partial(jax.jit, static_argnames="program")
def gradient(variables: tree.Tree, pictures: Array, outputs: Array, *, program: step.Program) -> Array:
    """Gradient of one logit of each image by its pixels, per grey level.

    Args:
        variables: Of the model.
        pictures: `(B, S, S, 3)`, on the scale 0 to 255.
        outputs: Which logit, `(B,)`.
        program: Of the run.

    Returns:
        `(B, S, S, 3)`, float32.
    """

    def chosen(pictures: Array) -> Array:
        logits = step.logits_of(program, variables, pictures)
        return jnp.take_along_axis(logits, outputs[:, None], axis=1).sum()

    return program.layout.whole(jax.grad(chosen)(pictures.astype(jnp.float32)))


def saliency(
    program: step.Program,
    variables: tree.Tree,
    pictures: np.ndarray,
    outputs: np.ndarray,
    samples: int = SAMPLES,
    noise: float = NOISE,
) -> np.ndarray:
    """How much a logit of each image moves, up or down, when a pixel gets brighter by one grey level in all its channels.

    Args:
        program: Of the run.
        variables: Of its model.
        pictures: uint8 `(B, S, S, 3)`.
        outputs: Which logit, `(B,)`.
        samples: See `SAMPLES`; without noise one is enough.
        noise: See `NOISE`; the same for every batch of this shape.

    Returns:
        `(B, S, S)`, float32, none negative.
    """
    rng = np.random.default_rng(0)
    total = np.zeros(pictures.shape, np.float32)
    for _ in range(samples):
        noisy = pictures + np.float32(255 * noise) * rng.standard_normal(pictures.shape, np.float32)
        total += np.asarray(gradient(variables, noisy, outputs, program=program))
    return np.abs(total.sum(axis=-1)) / samples
