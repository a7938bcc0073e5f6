"""Mixup and CutMix: images of a train batch are mixed in pairs, and their labels become soft targets."""

import math

import numpy as np
from ml_collections import ConfigDict

_CUTMIX = 0.5  # probability of CutMix where both are on


def mixes(config: ConfigDict) -> bool:
    """Whether the `augment` group asks for mixing, so that labels are soft targets."""
    return config.mixup > 0 or config.cutmix > 0


def mix(
    batch: dict[str, np.ndarray], rng: np.random.Generator, config: ConfigDict, classes: int
) -> dict[str, np.ndarray]:
    """Mixes rows 0 and 1 of a batch with each other, rows 2 and 3, and so on.

    The order of the rows is random already, so neighbours are random partners. Kind, share and place are drawn once for
    the batch. Always draws the same numbers for one kind, whether the other is on or not.

    Args:
      batch: image uint8 (b, S, S, 3) and label int32 (b,) or float32 (b, C), b even; other entries are kept.
      rng: the only source of randomness.
      config: `mixup` and `cutmix` (alpha of the Beta(alpha, alpha) distribution of the share of a row's own image, 0 is
        off). With both on, each batch gets either one with equal probability.
      classes: C.

    Returns:
      The batch with mixed images and with label float32 (b, C): the labels of both images by their shares.
    """
    draws = rng.random(3)
    cuts = config.cutmix > 0 and (config.mixup == 0 or draws[0] < _CUTMIX)
    alpha = config.cutmix if cuts else config.mixup
    share = rng.beta(alpha, alpha)
    if cuts:
        image, share = cutmix(batch["image"], share, (draws[1], draws[2]))
    else:
        image = mixup(batch["image"], share)
    own = batch["label"] if batch["label"].ndim == 2 else np.eye(classes, dtype=np.float32)[batch["label"]]
    other = own.reshape(-1, 2, classes)[:, ::-1].reshape(own.shape)
    return {**batch, "image": image, "label": own + np.float32(1 - share) * (other - own)}


def mixup(images: np.ndarray, share: float) -> np.ndarray:
    """Blends each image with its neighbour (Zhang et al. 2018, arXiv:1710.09412).

    Args:
      images: uint8 (b, S, S, 3), b even.
      share: of an image in its own row; its neighbour has the rest.

    Returns:
      uint8 (b, S, S, 3): convex combinations, rounded.
    """
    first, second = images[::2], images[1::2]
    shift = np.float32(1 - share) * (second.astype(np.int16) - first)
    shift = np.rint(shift, out=shift).astype(np.int16).astype(np.uint8)  # modulo 256, which the sums below undo
    mixed = np.empty_like(images)
    np.add(first, shift, out=mixed[::2])
    np.subtract(second, shift, out=mixed[1::2])
    return mixed


def cutmix(images: np.ndarray, share: float, centre: tuple[float, float]) -> tuple[np.ndarray, float]:
    """Exchanges a box between each image and its neighbour (Yun et al. 2019, arXiv:1905.04899).

    Args:
      images: uint8 (b, S, S, 3), b even.
      share: of the area that an image keeps; the box is a square of the rest, cut off at the border of the image.
      centre: of the box, as fractions of the height and the width.

    Returns:
      uint8 (b, S, S, 3), and the share that an image has in fact kept.
    """
    size = images.shape[1]
    half = math.sqrt(1 - share) / 2
    top, left = (round(size * max(0.0, at - half)) for at in centre)
    bottom, right = (round(size * min(1.0, at + half)) for at in centre)
    mixed = images.copy()
    mixed[::2, top:bottom, left:right] = images[1::2, top:bottom, left:right]
    mixed[1::2, top:bottom, left:right] = images[::2, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / size**2
