"""What is odd about an image: looked at one by one, as it is stored and as it is seen after decoding."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vitft_jax.data.duplicates import Fingerprint, fingerprint
from vitft_jax.data.images import FORMATS, EncodedImages
from vitft_jax.data.sources import Images
from vitft_jax.errors import InputError

BLACK, MOSTLY = 8, 0.95  # a grey value below the first is black; an image with such a share of black is mostly black
ELONGATED = 2.5  # aspect ratio from which squashing into a square distorts much
ENLARGED = 2.0  # factor from which enlarging to the model's input shows pixels, not tissue
_WIDE = ("I", "F")  # beginnings of the modes of Pillow with more than 8 bits


@dataclass(frozen=True)
class Inspected:
    """What was seen of an image.

    Attributes:
        fault: Why it cannot be read; '' if it can.
        size: Width and height, pixels; (0, 0) if it cannot be read.
        mode: Of Pillow, as stored.
        print: None if it cannot be read.
        odd: What is odd about it: kind and details.
    """

    fault: str
    size: tuple[int, int]
    mode: str
    print: Fingerprint | None
    odd: tuple[tuple[str, str], ...]


def inspect(images: Images, index: int, image_size: int) -> Inspected:
    """Looks at image `index`; `image_size` is the side of the model's input."""
    try:
        image = images[index]
        size, mode, stored = image.size, image.mode, ()
        if isinstance(images, EncodedImages):
            source = images.source(index)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file:
                size, mode, stored = file.size, file.mode, tuple(_stored(file))
    except (InputError, OSError) as error:  # OSError: the file went away since it was decoded
        return Inspected(str(error), (0, 0), "", None, ())
    return Inspected("", size, mode, fingerprint(image), (*stored, *_seen(image, size, image_size)))


def _stored(file: Image.Image) -> Iterator[tuple[str, str]]:
    if file.mode.startswith(_WIDE):
        yield "more than 8 bits", f"mode {file.mode}"
    if file.has_transparency_data:
        yield "transparent", f"mode {file.mode}"
    try:
        frames = getattr(file, "n_frames", 1)
    except Exception as error:  # as in `images.decode`: the first frame is whole, but to count the others reads them
        yield "damaged later frames", f"only the first can be read: {str(error) or type(error).__name__}"
    else:
        if frames > 1:
            yield "several frames", f"{frames}, of which the first is read"


def _seen(image: Image.Image, size: tuple[int, int], image_size: int) -> Iterator[tuple[str, str]]:
    short, long = min(size), max(size)
    if image_size / short >= ENLARGED:
        yield "tiny", f"{size[0]} x {size[1]}"
    if long / short >= ELONGATED:
        yield "elongated", f"{size[0]} x {size[1]}"
    values = np.asarray(image)
    if values.min() == values.max():
        yield "constant", f"grey value {values.min()}"
    elif (black := float(np.mean(values < BLACK))) >= MOSTLY:
        yield "mostly black", f"{100 * black:.0f} %"
