import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vitft_jax.data import images
from vitft_jax.data.images import ImageFiles, decode, find_images, resize
from vitft_jax.errors import InputError


@pytest.fixture
def save(tmp_path):
    def save(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return decode(tmp_path / name)

    return save


def ramp(dtype=np.uint8, scale=1):
    return (np.arange(256).reshape(16, 16) * scale).astype(dtype)


def colour():
    return np.stack([ramp(), ramp().T, 255 - ramp()], -1)


def test_grey_is_kept_exactly(save):
    image = save(Image.fromarray(ramp()))
    assert image.mode == "L"
    np.testing.assert_array_equal(image, ramp())


def test_colour_is_kept_exactly(save):
    image = save(Image.fromarray(colour()))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(image, colour())


def test_grey_stored_as_colour_is_grey(save):
    image = save(Image.fromarray(np.stack([ramp()] * 3, -1)))
    assert image.mode == "L"
    np.testing.assert_array_equal(image, ramp())


def test_one_bit(save):
    image = save(Image.fromarray(ramp() > 99))
    assert image.mode == "L"
    np.testing.assert_array_equal(image, (ramp() > 99) * 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("top", "bits"), [(255, 8), (256, 10), (1023, 10), (4000, 12), (4096, 14), (65535, 16)])
def test_16_bit_is_scaled_by_the_depth_that_holds_it(save, suffix, top, bits):
    values = np.linspace(0, top, 256).round().astype(np.uint16).reshape(16, 16)
    image = save(Image.fromarray(values), f"x.{suffix}")
    assert image.mode == "L"
    np.testing.assert_array_equal(image, np.rint(values * (255 / (2**bits - 1))))


def test_32_bit_integers_are_scaled_by_depth_or_else_by_range(save):
    values = ramp(np.int32, 16)
    np.testing.assert_array_equal(save(Image.fromarray(values), "a.tif"), np.rint(values / 4095 * 255))
    np.testing.assert_array_equal(save(Image.fromarray(ramp(np.int32, 1000) - 7000), "b.tif"), ramp())


def test_float_is_scaled_by_its_range(save):
    values = ramp(np.float32, 0.01) - 1
    np.testing.assert_array_equal(save(Image.fromarray(values), "x.tif"), ramp())
    values[0, 5], values[0, 6] = np.nan, np.inf
    expected = ramp()
    expected[0, 5:7] = 0
    np.testing.assert_array_equal(save(Image.fromarray(values), "y.tif"), expected)
    np.testing.assert_array_equal(save(Image.fromarray(np.full((4, 4), 3.5, np.float32)), "z.tif"), np.zeros((4, 4)))


def test_transparency_is_composited_on_black(save):
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:8] = 0
    half = colour()
    half[:8] = 0
    image = save(Image.fromarray(np.dstack([colour(), alpha])))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(image, half)
    grey = save(Image.merge("LA", (Image.fromarray(ramp()), Image.fromarray(alpha))))
    assert grey.mode == "L"
    np.testing.assert_array_equal(grey, ramp() * (alpha > 0))


def test_palette(save):
    indexed = Image.fromarray(np.eye(4, dtype=np.uint8))
    indexed = indexed.convert("P")
    indexed.putpalette([200, 0, 0, 0, 90, 30])
    expected = np.where(np.eye(4)[..., None] == 1, (0, 90, 30), (200, 0, 0))
    np.testing.assert_array_equal(save(indexed), expected)
    transparent = expected * np.eye(4, dtype=int)[..., None]
    np.testing.assert_array_equal(save(indexed, "t.png", transparency=0), transparent)


def test_cmyk(save):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0] = 255  # full cyan takes the red away
    image = np.asarray(save(Image.fromarray(ink, mode="CMYK"), "x.tif"))
    np.testing.assert_array_equal(image, np.broadcast_to([0, 255, 255], (8, 8, 3)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation_is_honoured_once(save, suffix):
    values = np.zeros((16, 32), np.uint8)
    values[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise, so that left becomes top
    image = save(Image.fromarray(values), f"x.{suffix}", exif=exif)
    assert image.size == (16, 32)
    assert np.asarray(image)[:14].min() > 240
    assert np.asarray(image)[18:].max() < 15


def test_first_frame_of_many(save):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    image = save(frames[0], "x.tif", save_all=True, append_images=frames[1:])
    assert np.unique(image).tolist() == [10]


def test_decoded_image_carries_no_metadata(save):
    assert save(Image.fromarray(ramp()), icc_profile=b"x" * 1000).info == {}


def test_large_images_are_reduced_by_a_whole_factor(tmp_path):
    Image.fromarray(ramp().repeat(4, 0).repeat(5, 1)).save(tmp_path / "x.png")  # 80 wide, 64 high
    path = tmp_path / "x.png"
    assert decode(path, max_side=33).size == (80, 64)
    assert decode(path, max_side=32).size == (40, 32)
    assert decode(path, max_side=20).size == (27, 22)
    assert decode(path).size == (80, 64)


@pytest.mark.parametrize("fault", ["truncated", "text", "missing", "empty"])
def test_unreadable_files_are_named(tmp_path, fault):
    path = tmp_path / "scan 7.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    contents = {"truncated": path.read_bytes()[:2000], "text": b"hello", "empty": b""}
    path.unlink() if fault == "missing" else path.write_bytes(contents[fault])
    with pytest.raises(InputError, match=r"scan 7\.png"):
        decode(path)
    with pytest.raises(InputError, match=r"scan 7 \(t\.csv, row 3\)"):
        decode(path, place="scan 7 (t.csv, row 3)")


def test_resize_squash_keeps_the_whole_field():
    values = np.zeros((20, 40), np.uint8)
    values[:, 20:] = 255
    out = resize(Image.fromarray(values), 10, "squash")
    assert out.shape == (10, 10, 3)
    assert out.dtype == np.uint8
    assert out[:, :4].max() == 0
    assert out[:, 6:].min() == 255


def test_resize_crop_keeps_the_centre():
    values = np.zeros((20, 40), np.uint8)
    values[:, 10:30] = 200
    out = resize(Image.fromarray(values), 10, "crop")
    np.testing.assert_array_equal(out[:, 2:-2], np.full((10, 6, 3), 200))
    assert out.min() > 180  # the outermost columns also see a little of what lies beyond


def test_resize_pad_keeps_the_aspect_ratio():
    out = resize(Image.fromarray(np.full((20, 40), 200, np.uint8)), 10, "pad")
    expected = np.zeros((10, 10, 3))
    expected[2:7] = 200
    np.testing.assert_array_equal(out, expected)


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resize(Image.fromarray(stripes), 16, "squash")[:, 2:-2].astype(int)) < 10


def test_resize_of_the_right_size_changes_nothing():
    for fit in images.FITS:
        np.testing.assert_array_equal(resize(Image.fromarray(colour()), 16, fit), colour())


def test_unknown_fit():
    with pytest.raises(InputError, match="squash, crop, pad"):
        resize(Image.fromarray(ramp()), 8, "stretch")


def test_find_images(tmp_path):
    for name in ("b.PNG", "a/c.jpeg", "a/.hidden.png", ".cache/d.png", "notes.txt", "e.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["a/c.jpeg", "b.PNG", "e.tiff"]


@pytest.fixture
def files(tmp_path, write_image):
    names = [f"{i}.png" for i in range(8)]
    for i, name in enumerate(names):
        write_image(tmp_path / name, i)
    return ImageFiles(tmp_path, names, places=[f"{name} (t.csv, row {i + 2})" for i, name in enumerate(names)])


def test_cache_is_bounded_and_changes_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE_BYTES", 3 * 256)
    for _ in range(2):
        for i in range(8):
            np.testing.assert_array_equal(files[i], decode(tmp_path / f"{i}.png"))
    assert len(files._cache) == 3
    assert files[0] is files[0]
    assert files[5] is not files[5]


def test_check_fills_the_cache(files, tmp_path):
    files.check()
    for path in tmp_path.iterdir():
        path.unlink()
    assert [image.size for image in files] == [(16, 16)] * 8


def test_check_beyond_the_cache_still_finds_files_that_are_no_images(files, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    (tmp_path / "6.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 of 8 .*\n.*6\.png \(t\.csv, row 8\)"):
        files.check()


def test_check_lists_five_and_counts_all(files, tmp_path):
    for i in range(1, 8):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InputError) as error:
        files.check()
    message = str(error.value)
    assert message.startswith("7 of 8 images")
    assert [f"{i}.png (t.csv, row {i + 2})" in message for i in range(8)] == [False, *[True] * 5, False, False]
    assert "2 more" in message


def test_pickle_leaves_the_cache_behind(files):
    files.check()
    copy = pickle.loads(pickle.dumps(files))
    assert copy._cache == {}
    np.testing.assert_array_equal(copy[3], files[3])


def test_threads_may_share(files):
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: np.asarray(files[i % 8]), range(200)))
    for i, values in enumerate(read):
        np.testing.assert_array_equal(values, files[i % 8])
    assert files._cached_bytes == 8 * 256
