"""Random changes that only ultrasound has: speckle, and gain that varies with depth.

A B-mode image shows the logarithm of the echo amplitude, so noise that multiplies the echoes is added to the image.
"""

import math
from collections.abc import Sequence

import numpy as np

# Grey levels that one neper of echo amplitude spans, if 0..255 shows 60 dB, as is usual.
_LEVELS = 255 / 60 * 20 / math.log(10)
# Standard deviations, in pixels along rows and columns, of the kernel that correlates the noise. The autocorrelation
# falls to 1/e at twice that: 1.8 pixels in depth and 3.6 across, as measured on breast images at 224 x 224.
_KERNEL = (0.9, 1.8)
# Below this grey level the noise fades: what lies under the displayed range is not known, and black stays black.
_FADE = 32.0


def speckle(values: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Adds speckle-like noise to a log-compressed image.

    Echoes of unresolved scatterers interfere; the amplitude of fully developed speckle has a standard deviation of 1/1.91
    of its mean, and is correlated over the resolution cell, which is longer across the beam than along it (Wagner et al.
    1983, 'Statistics of speckle in ultrasound B-scans'). Here the amplitude is multiplied by a log-normal, correlated
    field, which is what weak diffuse scattering beside a stronger echo amounts to, to first order.

    Args:
      values: float32 of shape (H, W) or (H, W, 3), grey levels 0..255; rows are depth.
      contrast: standard deviation of the factor over its mean; 0 returns `values`.
      rng: the only source of randomness; if `contrast` is 0, nothing is drawn.

    Returns:
      float32 of the shape of `values`. Where the image is not dark its expected value is unchanged, and zeros stay zeros.
    """
    if contrast == 0:
        return values
    noise = _LEVELS * math.sqrt(math.log1p(contrast**2)) * _correlated(values.shape[:2], rng)
    if values.ndim == 3:
        noise = noise[..., None]
    return values + np.minimum(values / _FADE, 1) * noise


def time_gain(values: np.ndarray, changes: Sequence[float]) -> np.ndarray:
    """Scales the rows of an image, as the sliders for time-gain compensation do (augmentation: Singla et al. 2022).

    Args:
      values: float32 of shape (H, W) or (H, W, 3); rows are depth.
      changes: relative change of brightness at equally spaced depths from the first row to the last, two or more. Between
        them it follows a cosine, so it is smooth and nowhere beyond them.

    Returns:
      float32 of the shape of `values`.
    """
    depth = np.linspace(0, len(changes) - 1, len(values))
    above = np.floor(depth)
    eased = above + (1 - np.cos(np.pi * (depth - above))) / 2
    curve = 1 + np.interp(eased, np.arange(len(changes)), changes)
    return values * curve.astype(np.float32).reshape(-1, *(1,) * (values.ndim - 1))


def _correlated(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Stationary Gaussian field: float32, mean 0, variance 1, autocorrelation exp(-(d / 2k)^2), k of _KERNEL."""
    rows, columns = (_taps(deviation) for deviation in _KERNEL)
    field = rng.standard_normal((shape[0] + len(rows) - 1, shape[1] + len(columns) - 1), np.float32)
    field = sum(tap * field[i : i + shape[0]] for i, tap in enumerate(rows))
    return sum(tap * field[:, i : i + shape[1]] for i, tap in enumerate(columns))


def _taps(deviation: float) -> np.ndarray:
    reach = math.ceil(3 * deviation)
    taps = np.exp(-((np.arange(-reach, reach + 1) / deviation) ** 2) / 2)
    return (taps / np.sqrt((taps**2).sum())).astype(np.float32)
