"""What is said of an image and what is true of it, in words below or above its picture."""

import numpy as np

from vitft_jax.inputs import UNKNOWN
from vitft_jax.predictor import Predictor


def said_and_true(model: Predictor, p: np.ndarray, label: np.ndarray | None) -> tuple[list[str], bool | None]:
    """Lines for one image, and whether what is said is right; None where the truth, or a part of it, is not known.

    Args:
        model: That says it.
        p: Its probabilities `(C,)`.
        label: The true class `()`, or 0/1 for each label `(C,)`, or `inputs.UNKNOWN`; None as that.
    """
    said = model.names(model.decide(p[None]))[0]
    sure = ", ".join(f"{name} {p[model.classes.index(name)]:.2f}" for name in said) or "none"
    if label is None or (label == UNKNOWN).any():
        return [f"says: {sure}"], None
    true = model.names(label[None])[0]
    right = true == said
    return [f"says: {sure}", f"true: {', '.join(true) or 'none'}{'' if right else ' (wrong)'}"], right
