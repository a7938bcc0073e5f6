"""Random crop, flip, rotation, speckle, time gain, gain and contrast: one resampling, one lookup table."""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vitft_jax.data.echo import speckle, time_gain
from vitft_jax.data.images import check_fit, resize_image, to_array
from vitft_jax.errors import InputError

# A crop's sides may differ by this factor. The usual 4/3 deforms anatomy, whose shape is often the finding.
_ASPECT = 1.25
_SLIDERS = 5  # depths at which the time gain is drawn; fewer than scanners have, whose users set them smoothly


def check_augment(config: ConfigDict) -> None:
    """Raises InputError, naming the key, if a value of the `augment` group is out of range."""
    ranges = {
        "crop": (0.01, 1.0, "the smallest part of the area that a crop keeps; 1 is off"),
        "flip": (0.0, 1.0, "the probability of a horizontal flip"),
        "rotate": (0.0, 180.0, "the largest rotation in degrees"),
        "gain": (0.0, 1.0, "the largest relative change of brightness"),
        "contrast": (0.0, 1.0, "the largest relative change of contrast"),
        "speckle": (0.0, 1.0, "the largest standard deviation of added speckle, relative to the echo amplitude"),
        "tgc": (0.0, 1.0, "the largest relative change of brightness with depth"),
        "mixup": (0.0, 100.0, "alpha of the Beta distribution of the share of an image; 0 is off"),
        "cutmix": (0.0, 100.0, "alpha of the Beta distribution of the share of an image; 0 is off"),
    }
    for key, (low, high, meaning) in ranges.items():
        if not low <= config[key] <= high:
            raise InputError(f"augment.{key} = {config[key]}: must lie in {low:g}..{high:g} ({meaning}).")


def augment(image: Image.Image, rng: np.random.Generator, config: ConfigDict, size: int, fit: str) -> np.ndarray:
    """Fits an image into a square and changes it at random.

    Always draws the same count of numbers from `rng` before the field of speckle, which comes last, so that turning one
    knob leaves the draws of the others alone.

    Args:
      image: mode 'L' or 'RGB'.
      rng: the only source of randomness.
      config: `crop` (smallest area of a random crop as a fraction of the fitted square, 1 is off; its position is
        uniform and its aspect ratio at most 1.25), `flip` (probability of a horizontal flip), `rotate` (largest
        rotation, degrees, either way), `gain` (largest relative change of brightness, either way), `contrast` (largest
        relative change of contrast around the mean of the result, either way), `speckle` (largest contrast, see
        `echo.speckle`), `tgc` (largest relative change of brightness with depth, either way, see
        `echo.time_gain`; depth is the rows of the result).
      size: side of the result in pixels.
      fit: as in `resize`; with everything off the result is exactly that of `resize`.

    Returns:
      uint8 of shape (size, size, 3).

    Raises:
      InputError: `fit` is unknown.
    """
    draws = rng.random(9 + _SLIDERS)
    area = config.crop + (1 - config.crop) * draws[0]
    log_aspect = min(math.log(_ASPECT), -math.log(area)) * (2 * draws[1] - 1)  # both sides stay within the square
    width, height = math.sqrt(area * math.exp(log_aspect)), math.sqrt(area * math.exp(-log_aspect))
    box = ((1 - width) * draws[2], (1 - height) * draws[3], width, height)
    flip = draws[4] < config.flip
    degrees = config.rotate * (2 * draws[5] - 1)
    gain = 1 + config.gain * (2 * draws[6] - 1)
    contrast = 1 + config.contrast * (2 * draws[7] - 1)
    image = warp(image, size, fit, box=box, flip=flip, degrees=degrees)
    if config.speckle or config.tgc:
        values = speckle(np.asarray(image, np.float32), config.speckle * draws[8], rng)
        values = time_gain(values, config.tgc * (2 * draws[9:] - 1))
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    return to_array(_levels(image, gain, contrast))


def warp(
    image: Image.Image,
    size: int,
    fit: str,
    *,
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    flip: bool = False,
    degrees: float = 0.0,
) -> Image.Image:
    """Fits an image into a square, then crops, flips and rotates it, in one resampling.

    Args:
      image: mode 'L' or 'RGB'.
      size: side of the result in pixels.
      fit: as in `resize`.
      box: left, top, width and height of the crop, as fractions of the fitted square.
      flip: whether to mirror left and right, before the rotation.
      degrees: rotation of the content about the centre, clockwise as seen.

    Returns:
      An image of the mode of `image`. What lies outside the source is black.
    """
    check_fit(fit)
    if box[2:] == (1.0, 1.0) and degrees == 0:
        fitted = resize_image(image, size, fit)
        return fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else fitted

    # The fitted square covers extent[i] source pixels along axis i (0 = x, 1 = y), starting at origin[i].
    extent = _extent(image.size, fit)
    origin = [(side - covered) / 2 for side, covered in zip(image.size, extent, strict=True)]

    # The affine step interpolates between neighbours only, so an image that will shrink is first brought, antialiased,
    # to about one pixel per pixel of the result.
    shrink = [max(1.0, covered * part / size) for covered, part in zip(extent, box[2:], strict=True)]
    source = image
    if max(shrink) > 1:
        small = [max(1, round(side / factor)) for side, factor in zip(image.size, shrink, strict=True)]
        source = image.resize((small[0], small[1]), Image.Resampling.BICUBIC)
    ratio = [after / before for after, before in zip(source.size, image.size, strict=True)]

    # Result pixel -> centred unit square -> undo rotation -> undo flip -> crop -> source. PIL wants this direction, and
    # takes coordinates at pixel centres.
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    mirror = -1.0 if flip else 1.0
    turned = ((mirror * cos, mirror * sin), (-sin, cos))
    coefficients: list[float] = []
    for axis in (0, 1):
        scale = box[2 + axis] * extent[axis] * ratio[axis]
        centre = (origin[axis] + (box[axis] + box[2 + axis] / 2) * extent[axis]) * ratio[axis]
        x, y = (scale * factor / size for factor in turned[axis])
        coefficients += [x, y, centre - (x + y) * size / 2]
    return source.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _extent(source: tuple[int, int], fit: str) -> tuple[int, int]:
    if fit == "squash":
        return source
    side = min(source) if fit == "crop" else max(source)
    return side, side


def _levels(image: Image.Image, gain: float, contrast: float) -> Image.Image:
    if gain == 1 and contrast == 1:
        return image
    mean = np.asarray(image).mean()
    table = gain * (contrast * (np.arange(256) - mean) + mean)
    return image.point(np.clip(np.rint(table), 0, 255).astype(np.uint8).tolist() * len(image.getbands()))
