"""Decode images of any common kind to 8-bit grey or RGB, and fit them into a square."""

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vitft_jax.errors import InputError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")  # Pillow hands some of the others to outside programs
FITS = ("squash", "crop", "pad")

# Decoded images are kept in memory up to this many bytes per process. Small sets are read again every epoch, and
# decoding them again would cost more than augmenting them; 1 GiB holds 16,000 grey images of 256 x 256 and is a small
# part of the memory of a machine that can train a ViT.
CACHE_BYTES = 1 << 30

_CHECK_THREADS = 4  # PIL releases the GIL while it decodes; more threads than this only wait for the disk.
_BITS = (8, 10, 12, 14, 16)  # depths at which scanners store grey values in 16-bit files


def find_images(folder: Path) -> list[str]:
    """Lists the image files below a folder.

    Args:
      folder: an existing folder; it is searched recursively.

    Returns:
      Paths relative to `folder`, with '/' between parts, sorted. Hidden files and folders are left out.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                found.append((Path(parent) / name).relative_to(folder).as_posix())
    return sorted(found)


def side_to_keep(image_size: int) -> int:
    """The `max_side` for a model whose input has `image_size` pixels a side; 0 where it is not known yet."""
    return 2 * image_size  # room for a crop of a quarter of the area, and for an antialiased resize after the reduction


def decode(source: str | Path | bytes, *, max_side: int = 0, place: str = "") -> Image.Image:
    """Reads one image file as 8-bit grey or RGB.

    The first frame is taken, EXIF orientation is applied and transparency is composited on black. Colour files whose
    three channels are equal everywhere count as grey. A 16-bit grey image is scaled linearly by the smallest of 8, 10,
    12, 14 and 16 bits that holds its maximum (so most images of one 12-bit scanner share one scale); float images, and
    integers outside 16 bits, by their own minimum and maximum (non-finite values become black). Of 16-bit colour files
    the upper eight bits are read.

    Args:
      source: the path of the file, or its contents.
      max_side: if positive, an image whose sides are both at least twice this is reduced by the largest integer factor
        that leaves both sides at least this long.
      place: how the user knows this image (name and table row), for the error; the path where empty.

    Returns:
      An image of mode 'L' or 'RGB', independent of the file.

    Raises:
      InputError: the file is missing, truncated or no image.
    """
    try:
        # Given a path instead of an open file, Pillow maps uncompressed TIFFs into memory and scrambles turned ones.
        with _file(source) as file, Image.open(file, formats=FORMATS) as opened:
            opened.load()
            return to_8_bit(ImageOps.exif_transpose(opened), max_side)
    except Exception as error:  # a damaged file can make PIL raise nearly anything; all of it means the same here
        raise _unreadable(source, place, error) from error


def resize(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """Fits an image into a square, bicubic and antialiased.

    Args:
      image: mode 'L' or 'RGB'.
      size: side of the result in pixels.
      fit: 'squash' (the whole image; its aspect ratio is not kept), 'crop' (the short side becomes `size`, the centre
        is kept) or 'pad' (the long side becomes `size`, the rest is black).

    Returns:
      uint8 of shape (size, size, 3).

    Raises:
      InputError: `fit` is none of these.
    """
    return to_array(resize_image(image, size, fit))


def resize_image(image: Image.Image, size: int, fit: str) -> Image.Image:
    """`resize`, but returns a PIL image of the mode of `image`."""
    check_fit(fit)
    width, height = image.size
    if fit == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new(image.mode, (size, size))
    square.paste(image.resize(fitted, Image.Resampling.BICUBIC), ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return square


def to_array(image: Image.Image) -> np.ndarray:
    """Returns an 'L' or 'RGB' image as a uint8 array of shape (height, width, 3)."""
    if image.mode == "L":
        image = Image.merge("RGB", (image, image, image))
    return np.array(image)


def check_fit(fit: str) -> None:
    """Raises InputError if `fit` is not one of FITS."""
    if fit not in FITS:
        raise InputError(f"data.fit = {fit!r} is unknown; choose one of {', '.join(FITS)}.")


class EncodedImages(Sequence[Image.Image], ABC):
    """The images of a dataset as encoded files: decoded when asked for, kept in memory up to CACHE_BYTES.

    Threads may read it together. Worker processes get it without the cache and each keep their own.
    Treat the images as read-only: the cache hands out the same object again.
    """

    def __init__(self, where: str | Path, places: Sequence[str], max_side: int = 0) -> None:
        """Describes the images; reads nothing.

        Args:
          where: the folder or dataset that holds them, for errors.
          places: how the user knows each image, for errors (its name, and the table row if there is one).
          max_side: see `decode`.
        """
        self._where = where
        self._places = tuple(places)
        self._max_side = max_side
        self._start_cache()

    @abstractmethod
    def _source(self, index: int) -> Path | bytes:
        """Returns the path of file `index` or its contents; raises InputError if it cannot."""

    def source(self, index: int) -> Path | bytes:
        """The path of file `index` or its contents, as stored; raises InputError if they cannot be had."""
        return self._source(index)

    def _start_cache(self) -> None:
        self._cache: dict[int, Image.Image] = {}
        self._cached_bytes = 0
        self._full = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Image.Image:
        """Returns image `index` (mode 'L' or 'RGB'); raises InputError, naming it, if it cannot be read."""
        index = range(len(self))[index]
        image = self._cache.get(index)
        if image is None:
            image = decode(self._source(index), max_side=self._max_side, place=self._places[index])
            self._keep(index, image)
        return image

    def _keep(self, index: int, image: Image.Image) -> None:
        # First come, first kept: every epoch visits every image once, so no eviction order would do better.
        size = image.width * image.height * len(image.getbands())
        with self._lock:
            if self._cached_bytes + size > CACHE_BYTES:
                self._full = True
            elif index not in self._cache:
                self._cache[index] = image
                self._cached_bytes += size

    def check(self) -> None:
        """Decodes every image and fills the cache; once the cache is full, Pillow's quicker `verify` has to do.

        Raises:
          InputError: some images cannot be read; names the first five and gives their number.
        """
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            errors = [error for error in pool.map(self._fault, range(len(self))) if error]
        if errors:
            more = f"\n  ... and {len(errors) - 5} more" if len(errors) > 5 else ""
            listed = "\n  ".join(errors[:5])
            raise InputError(
                f"{len(errors)} of {len(self)} images in {self._where} cannot be read:\n  {listed}{more}\n"
                "Repair these files, or take them out of the data."
            )

    def _fault(self, index: int) -> str:
        read: Callable[[int], object] = self._verify if self._full else self.__getitem__
        try:
            read(index)
        except InputError as error:
            return str(error)
        return ""

    def _verify(self, index: int) -> None:
        source = self._source(index)
        try:
            with _file(source) as file, Image.open(file, formats=FORMATS) as image:
                image.verify()
        except Exception as error:
            raise _unreadable(source, self._places[index], error) from error

    def __getstate__(self) -> dict[str, object]:
        dropped = ("_cache", "_cached_bytes", "_full", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_cache()


class ImageFiles(EncodedImages):
    """The files of a folder as images."""

    def __init__(
        self, root: str | Path, names: Sequence[str], *, places: Sequence[str] | None = None, max_side: int = 0
    ) -> None:
        """Describes the files; reads nothing.

        Args:
          root: the folder.
          names: path of each image relative to `root`.
          places: see `EncodedImages`; the names where None.
          max_side: see `decode`.
        """
        super().__init__(root, names if places is None else places, max_side)
        self._root = Path(root)
        self._names = tuple(names)

    def _source(self, index: int) -> Path:
        return self._root / self._names[index]


def _file(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if Path(source).exists() and not Path(source).is_file():  # to open a pipe would wait for ever
        raise FileNotFoundError
    return Path(source).open("rb")


def _unreadable(source: str | Path | bytes, place: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        reason = "the file is missing"
    elif isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image, or of a kind that Pillow does not know"
    else:
        reason = f"damaged or not supported: {error}"
    name = place or ("" if isinstance(source, bytes) else source)
    return InputError(f"Cannot read image {name}: {reason}.")


def to_8_bit(image: Image.Image, max_side: int = 0) -> Image.Image:
    """Returns an image of any mode as 'L' or 'RGB', reduced; see `decode`."""
    image = _grey_or_rgb(image)
    if max_side > 0 and min(image.size) >= 2 * max_side:
        image = image.reduce(min(image.size) // max_side)
    return image


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scale_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    if image.mode in ("1", "L"):
        image = image.convert("L")
    else:
        image = image.convert("RGB")
        red, green, blue = image.split()
        # Most ultrasound is grey stored as RGB: one channel gives the same result in a third of the time and memory.
        if red.tobytes() == green.tobytes() == blue.tobytes():
            image = red
    image.info.clear()  # profiles and EXIF blocks would stay in the cache
    return image


def _scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    if values.dtype.kind in "iu" and low >= 0 and high < 2**16:
        low, high = 0.0, next(2.0**bits - 1 for bits in _BITS if high < 2**bits)
    span = high - low or 1.0
    return np.rint(np.where(finite, values.astype(np.float64) - low, 0.0) * (255 / span)).astype(np.uint8)
