"""DICOM files, written by pydicom here. The transformations are checked against PS3.3's formulas by hand."""

import sys

import numpy as np
import pytest

from vitft_jax import inputs
from vitft_jax.data import dicom
from vitft_jax.errors import InputError


@pytest.fixture
def write(tmp_path):
    """Writes pixels `(H, W)`, `(F, H, W)` or `(H, W, 3)` as a DICOM file; keywords are attributes."""
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom, an optional dependency")

    def make(pixels, name="a.dcm", kind="MONOCHROME2", bits=None, **attributes):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6.1"  # ultrasound image storage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        file = pydicom.Dataset()
        file.file_meta = meta
        colour = kind[:3] in ("RGB", "YBR")
        file.SamplesPerPixel = 3 if colour else 1
        file.PhotometricInterpretation = kind
        file.Rows, file.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
        if colour:
            file.PlanarConfiguration = 0
        if pixels.ndim - colour == 3:
            file.NumberOfFrames = len(pixels)
        file.BitsAllocated = 8 * pixels.dtype.itemsize
        file.BitsStored = bits or file.BitsAllocated
        file.HighBit = file.BitsStored - 1
        file.PixelRepresentation = int(pixels.dtype.kind == "i")
        file.PixelData = pixels.tobytes()
        file["PixelData"].VR = "OW" if pixels.dtype.itemsize == 2 else "OB"
        for key, value in attributes.items():
            setattr(file, key, value)
        path = tmp_path / name
        file.save_as(path, enforce_file_format=True)
        return path

    return make


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_8_bits_are_as_they_are_and_monochrome1_is_inverted(write):
    np.testing.assert_array_equal(dicom.read(write(GREY)), GREY)
    np.testing.assert_array_equal(dicom.read(write(GREY, RescaleSlope=1, RescaleIntercept=0)), GREY)
    np.testing.assert_array_equal(dicom.read(write(GREY, kind="MONOCHROME1")), 255 - GREY)


def test_colours(write):
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0], red[..., 1] = 200, np.arange(6)
    np.testing.assert_array_equal(dicom.read(write(red, kind="RGB")), red)
    grey = np.dstack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)])  # no colour difference
    image = dicom.read(write(grey, kind="YBR_FULL"))
    assert image.mode == "L"
    np.testing.assert_array_equal(image, GREY)
    ramp = (np.arange(256, dtype=np.uint16) * 256).tobytes()
    none = bytes(512)
    palette = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")}
    palette |= {"RedPaletteColorLookupTableData": ramp}
    palette |= {f"{c}PaletteColorLookupTableData": none for c in ("Green", "Blue")}
    pixels = np.asarray(dicom.read(write(GREY, kind="PALETTE COLOR", **palette)))
    np.testing.assert_array_equal(pixels[..., 0], GREY)
    assert not pixels[..., 1:].any()


def test_window_after_rescaling(write):
    stored = np.array([[0, 100, 200, 300, 4000]], np.int16) - 50
    path = write(stored, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[300.5, 7], WindowWidth=[401, 9])
    values = 2 * stored.astype(float) - 100  # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5)
    expected = np.rint(255 * ((values - 300) / 400 + 0.5).clip(0, 1))
    np.testing.assert_array_equal(dicom.read(path), expected)
    assert set(np.asarray(dicom.read(path)).ravel()) >= {0, 255}
    path = write(stored, WindowCenter=100, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_array_equal(dicom.read(path), np.rint(255 * (stored.astype(float) / 200).clip(0, 1)))
    path = write(stored, WindowCenter=100, WindowWidth=200, VOILUTFunction="SIGMOID")
    expected = np.rint(255 / (1 + np.exp(-4 * (stored.astype(float) - 100) / 200)))
    np.testing.assert_array_equal(dicom.read(path), expected)
    step = np.array([[9, 10, 11]], np.uint16)
    np.testing.assert_array_equal(dicom.read(write(step, WindowCenter=10, WindowWidth=1)), [[0, 255, 255]])


def test_frames_of_enhanced_files_have_their_own_transformations(write):
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom, an optional dependency")

    def item(**attributes):
        made = pydicom.Dataset()
        for key, value in attributes.items():
            setattr(made, key, value)
        return made

    stored = np.array([[[0, 100, 200, 300, 4000]]] * 2, np.uint16)
    rescale = item(RescaleSlope=2, RescaleIntercept=-100, RescaleType="US")
    windows = [item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=200)]) for c in (100, 300)]
    shared = [item(PixelValueTransformationSequence=[rescale])]
    path = write(stored, SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=windows)
    for frame, centre in enumerate((100, 300)):
        expected = np.rint(255 * ((2.0 * stored[frame] - 100 - (centre - 0.5)) / 199 + 0.5).clip(0, 1))
        np.testing.assert_array_equal(dicom.read(path, frame), expected)


def test_transformations_without_a_value_are_none(write):
    """As programs that anonymise leave them behind."""
    empty = dict.fromkeys(("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"))
    np.testing.assert_array_equal(dicom.read(write(GREY, **empty)), GREY)
    half = dicom.read(write(GREY, RescaleSlope=None, RescaleIntercept=-10, WindowCenter=118, WindowWidth=256))
    np.testing.assert_array_equal(half, np.rint(255 * ((GREY - 10.0 - 117.5) / 255 + 0.5).clip(0, 1)))


def test_without_a_window_12_bits_are_scaled_as_of_any_file(write):
    stored = np.array([[0, 1000, 4095]], np.uint16)
    np.testing.assert_array_equal(dicom.read(write(stored, bits=12)), np.rint(stored * (255 / 4095)))


def test_frames_are_images(write, tmp_path):
    clip = np.stack([GREY, 255 - GREY, GREY // 2])
    path = write(clip, name="clip.dcm")
    write(GREY, name="IM0001")  # scanners give no extension
    (tmp_path / "DICOMDIR").write_bytes((tmp_path / "IM0001").read_bytes())
    (tmp_path / "README").write_text("no image")
    assert dicom.frames(path) == 3
    found = inputs.find(tmp_path, ("a", "b"), False)
    assert [item.name for item in found.items] == ["IM0001", "clip.dcm#0", "clip.dcm#1", "clip.dcm#2"]
    for item, frame in zip(found.items[1:], clip, strict=True):
        np.testing.assert_array_equal(item.read(0), frame)
    np.testing.assert_array_equal(found.items[0].read(0), GREY)
    (tmp_path / "t.csv").write_text("path,label\nclip.dcm,b\nIM0001,a\n")
    np.testing.assert_array_equal(inputs.find(tmp_path / "t.csv", ("a", "b"), False).labels, [1, 1, 1, 0])


def test_damaged_files_are_named(write, tmp_path):
    path = write(GREY)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"Cannot read image .*a\.dcm: damaged DICOM, or not supported"):
        dicom.read(path)
    (tmp_path / "b.dcm").write_bytes(b"nothing")
    assert dicom.frames(tmp_path / "b.dcm") == 1
    with pytest.raises(InputError, match=r"b\.dcm"):
        dicom.read(tmp_path / "b.dcm")
    with pytest.raises(InputError, match="the file is missing"):
        dicom.read(tmp_path / "c.dcm")


def test_without_pydicom_a_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    path = tmp_path / "scan"
    path.write_bytes(bytes(128) + b"DICM")
    assert dicom.is_dicom(path)
    (item,) = inputs.find(path, ("a", "b"), False).items
    with pytest.raises(InputError, match=r"DICOM files need pydicom, which is not installed; pip install 'pydicom>=3'"):
        item.read(0)
