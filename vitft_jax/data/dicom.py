"""DICOM files as 8-bit images. They are read by pydicom, which is an optional dependency.

Grey values go through the modality transformation and the value-of-interest transformation of the file, as on a viewer
(DICOM PS3.3, C.11.1 and C.11.2): a lookup table, or rescale slope and intercept; then a lookup table, or the first window.
Of enhanced files each frame has those of its functional groups (C.7.6.16). Without a window they are scaled as those of any
16-bit file, see `images.decode`. MONOCHROME1 is inverted, palettes are looked
up, YBR becomes RGB.
"""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vitft_jax.data.images import to_8_bit
from vitft_jax.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

EXTENSIONS = frozenset({".dcm", ".dicom"})
_INDEX = "DICOMDIR"  # a DICOM file that lists others
_GROUPS = {"shared": 0x52009229, "frames": 0x52009230}  # tags of the functional groups of enhanced files


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its extension or, as scanners often give none, by the mark in its header."""
    if path.suffix.lower() in EXTENSIONS:
        return True
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" and path.name != _INDEX
    except OSError:
        return False


def frames(path: Path) -> int:
    """Number of frames; 1 where that cannot be told, and `read` says why."""
    try:
        if not path.is_file():  # as above
            return 1
        header = _pydicom(path).dcmread(path, specific_tags=["NumberOfFrames"], stop_before_pixels=True)
        return max(1, int(header.get("NumberOfFrames") or 1))
    except Exception:  # a damaged file can raise nearly anything
        return 1


def read(path: Path, frame: int = 0, max_side: int = 0) -> Image.Image:
    """Reads a frame as an image of mode 'L' or 'RGB'; `max_side` as in `images.decode`.

    Raises:
        InputError: pydicom is not installed, or the file is missing, damaged or compressed in a way that pydicom cannot read.
    """
    pydicom = _pydicom(path)
    try:
        if not path.is_file():  # as above
            raise FileNotFoundError
        header = pydicom.Dataset()
        values = pydicom.pixels.pixel_array(path, index=frame, ds_out=header, specific_tags=list(_GROUPS.values()))
        return to_8_bit(_image(values, _of_frame(header, frame), pydicom), max_side)
    except FileNotFoundError:
        raise InputError(f"Cannot read image {path}: the file is missing.") from None
    except Exception as error:  # as in `frames`
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Cannot read image {path}: damaged DICOM, or not supported: {reason}") from error


def _pydicom(path: Path) -> ModuleType:
    try:
        import pydicom
        import pydicom.pixels
    except ModuleNotFoundError:
        raise InputError(
            f"Cannot read image {path}: DICOM files need pydicom, which is not installed; pip install 'pydicom>=3'"
        ) from None
    return pydicom


def _of_frame(header: "Dataset", frame: int) -> "Dataset":
    """The header with the transformations of a frame, and without those that are there but empty."""
    for of, at in (("shared", 0), ("frames", frame)):
        groups = header[_GROUPS[of]].value or () if _GROUPS[of] in header else ()
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if at < len(groups) and groups[at].get(name):
                header.update(groups[at][name].value[0])
    for key in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        if key in header and header[key].value in (None, ""):
            del header[key]
    if "RescaleSlope" in header or "RescaleIntercept" in header:
        header.RescaleSlope, header.RescaleIntercept = header.get("RescaleSlope", 1), header.get("RescaleIntercept", 0)
    return header


def _image(values: np.ndarray, header: "Dataset", pydicom: ModuleType) -> Image.Image:
    """A frame `(H, W)` or `(H, W, 3)` of stored values as an image."""
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, header)
        return Image.fromarray((values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8))
    if values.ndim == 3:
        excess = max(0, int(header.BitsStored) - 8)
        return Image.fromarray((values >> excess).astype(np.uint8))
    if header.get("ModalityLUTSequence") or (
        (header.get("RescaleSlope", 1), header.get("RescaleIntercept", 0)) != (1, 0)
    ):
        values = pydicom.pixels.apply_modality_lut(values, header)
    if header.get("VOILUTSequence"):
        values = pydicom.pixels.apply_voi(values, header)
        image = _grey(values / (2.0 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1))
    elif "WindowCenter" in header and "WindowWidth" in header:
        centre, width = (float(np.atleast_1d(header[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
        image = _grey(_window(values.astype(np.float64), centre, width, header.get("VOILUTFunction", "LINEAR")))
    else:
        image = to_8_bit(Image.fromarray(values if values.dtype == np.uint8 else _wide(values)))
    return Image.eval(image, lambda x: 255 - x) if kind == "MONOCHROME1" else image


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Brightness from 0 to 1 before clipping (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5  # a width of 1 is a step


def _grey(brightness: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255 * brightness.clip(0, 1)).astype(np.uint8))


def _wide(values: np.ndarray) -> np.ndarray:
    """Values of a type that Pillow has: it knows 32-bit numbers only."""
    return values.astype(np.int32 if values.dtype.kind in "iu" and values.dtype.itemsize < 4 else np.float32)
