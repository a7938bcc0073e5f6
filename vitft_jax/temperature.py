"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): logits are divided by one number, fitted on the validation split."""

import math

import numpy as np
from scipy import optimize, special

_WIDEST = 5.0  # of the natural logarithm of the temperature


def fit(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of logits `(n, C)` under which labels `(n,)`, or `(n, C)` of 0/1, are the most likely.

    A validation split that the model gets right throughout would ask for a temperature of 0, and so for certainty. Therefore
    the logarithm of the temperature has a standard normal prior: it weighs as much as a fraction of an image elsewhere.
    """
    z = logits.astype(np.float64)

    def cost(log_temperature: float) -> float:
        scaled = z / math.exp(log_temperature)
        if labels.ndim == 2:
            likelihood = -np.logaddexp(0, np.where(labels > 0, -scaled, scaled)).sum()
        else:
            likelihood = special.log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].sum()
        return log_temperature**2 / 2 - likelihood

    return math.exp(optimize.minimize_scalar(cost, bounds=(-_WIDEST, _WIDEST), method="bounded").x)
