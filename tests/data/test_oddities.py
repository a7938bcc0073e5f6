"""What is odd about single images, also where a file is damaged behind what training reads of it."""

import io

import numpy as np
import pytest
from PIL import Image
from scans import scan

from vitft_jax.data import oddities
from vitft_jax.data.images import ImageFiles
from vitft_jax.data.oddities import inspect


def inspected(folder, name="a.tif", image_size=64):
    return inspect(ImageFiles(folder, [name]), 0, image_size)


def pages(count=3):
    file = io.BytesIO()
    first, *rest = (Image.fromarray(scan(i)) for i in range(count))
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


def test_a_whole_file_tells_its_frames(tmp_path):
    (tmp_path / "a.tif").write_bytes(pages())
    found = inspected(tmp_path)
    assert found.odd == (("several frames", "3, of which the first is read"),)
    assert (found.fault, found.size, found.mode) == ("", (128, 128), "L")


def test_no_damage_behind_the_first_page_ends_the_check(tmp_path):
    """Each of these files is told of as readable (with what is odd) or as unreadable; Pillow raises many kinds of errors."""
    whole, first, rng = pages(), len(pages(1)), np.random.default_rng(0)
    kinds = []
    for _ in range(200):
        damaged = np.frombuffer(whole, np.uint8).copy()
        headers = len(whole) * np.arange(1, 3) // 3  # near these the later pages begin, with their lists of tags
        places = np.concatenate([rng.integers(at - 200, min(at + 400, len(whole)), 60) for at in headers])
        places = places[places >= first]
        damaged[places] = rng.integers(0, 256, len(places))
        (tmp_path / "a.tif").write_bytes(damaged.tobytes())
        found = inspected(tmp_path)
        assert found.fault or found.print is not None
        kinds += [kind for kind, _ in found.odd]
    assert "damaged later frames" in kinds


@pytest.mark.parametrize("error", [TypeError("Missing dimensions"), KeyError(114), SyntaxError("unknown"), EOFError()])
def test_whatever_is_raised_for_later_frames_is_told_of_them(tmp_path, monkeypatch, error):
    from PIL import TiffImagePlugin

    def raises(_):
        raise error

    (tmp_path / "a.tif").write_bytes(pages())
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(raises))
    found = inspected(tmp_path)
    assert [kind for kind, _ in found.odd] == ["damaged later frames"]
    assert found.print is not None
    assert found.odd[0][1].endswith(str(error) or "EOFError")


def test_a_file_that_goes_away_while_it_is_looked_at_is_unreadable(tmp_path):
    Image.fromarray(scan(0)).save(tmp_path / "a.png")
    images = ImageFiles(tmp_path, ["a.png"])
    images.check()  # which keeps it in memory
    (tmp_path / "a.png").unlink()
    found = inspect(images, 0, 64)
    assert "a.png" in found.fault
    assert found.print is None


@pytest.mark.parametrize(
    ("shape", "kind", "details"),
    [
        ((32, 40), "tiny", "40 x 32"),
        ((33, 40), "", ""),  # no more than doubled
        ((64, 160), "elongated", "160 x 64"),
        ((64, 159), "", ""),
    ],
)
def test_bounds_of_size_and_shape(tmp_path, shape, kind, details):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).save(tmp_path / "a.png")
    assert inspected(tmp_path, "a.png").odd == (((kind, details),) if kind else ())


@pytest.mark.parametrize(("share", "black"), [(0.94, False), (0.95, True)])
def test_bounds_of_black(tmp_path, share, black):
    values = np.full(10_000, oddities.BLACK - 1, np.uint8)
    values[: round((1 - share) * 10_000)] = oddities.BLACK
    Image.fromarray(values.reshape(100, 100)).save(tmp_path / "a.png")
    assert inspected(tmp_path, "a.png").odd == ((("mostly black", "95 %"),) if black else ())
