"""Duplicates among images that look like ultrasound."""

import csv
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scans import annotated, scan

from vitft_jax.data import duplicates
from vitft_jax.data.duplicates import fingerprint, pairs
from vitft_jax.data.sources import Dataset


def compressed(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


CHANGES = {
    "brighter": lambda x: np.clip(1.4 * x, 0, 255).astype(np.uint8),
    "less contrast": lambda x: (0.5 * x + 60).astype(np.uint8),
    "gamma": lambda x: (255 * (x / 255) ** 0.6).astype(np.uint8),
    "smaller": lambda x: np.asarray(Image.fromarray(x).resize((100, 100), Image.Resampling.BICUBIC)),
    "compressed": compressed,
    "annotated": annotated,
    "shifted": lambda x: np.roll(x, 2, axis=1),
    "cropped": lambda x: x[2:-2, 2:-2],
    "in colour": lambda x: np.dstack([x, x, np.clip(x + 2.0, 0, 255).astype(np.uint8)]),
}


def prints(arrays):
    return [fingerprint(Image.fromarray(array)) for array in arrays]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change):
    arrays = [scan(i) for i in range(40)]
    found = pairs(prints([*arrays, *(CHANGES[change](arrays[i]) for i in (3, 30))]))
    assert [(p.first, p.second, p.kind) for p in sorted(found, key=lambda p: p.first)] == [
        (3, 40, "near"),
        (30, 41, "near"),
    ]
    assert all(duplicates.NEAR <= p.similarity <= 1 + 1e-6 for p in found)


def test_exact_copies_and_mirror_images():
    arrays = [scan(i) for i in range(20)]
    found = pairs(prints([*arrays, arrays[5].copy(), arrays[5].copy(), arrays[7][:, ::-1]]))
    assert [(p.first, p.second, p.kind) for p in found] == [
        (5, 20, "exact"),
        (5, 21, "exact"),
        (7, 22, "mirrored"),
    ]
    one_level_off = arrays[5].copy()
    one_level_off[0, 0] ^= 1
    assert [p.kind for p in pairs(prints([*arrays, one_level_off]))] == ["near"]


def test_the_frame_of_a_screen_makes_no_duplicates():
    def framed(array):
        screen = Image.new("L", (200, 170), 10)
        screen.paste(Image.fromarray(array), (40, 30))
        draw = ImageDraw.Draw(screen)
        draw.text((5, 5), "CLINIC  L12-5  38 Hz", fill=255)
        draw.rectangle((180, 30, 190, 150), fill=180)
        return np.asarray(screen)

    arrays = [framed(scan(i)) for i in range(60)]
    assert [(p.first, p.second) for p in pairs(prints([*arrays, framed(annotated(scan(4)))]))] == [(4, 60)]


def test_few_or_empty_images():
    assert pairs([]) == []
    assert pairs(prints([scan(0)])) == []
    assert [p.kind for p in pairs(prints([scan(0), annotated(scan(0)), scan(1)]))] == [
        "near"
    ]  # too few to subtract a mean
    flat = [np.full((9, 9), level, np.uint8) for level in (0, 0, 7)]
    assert [(p.first, p.second, p.kind) for p in pairs(prints(flat))] == [(0, 1, "exact")]


def test_blocks_give_what_the_whole_table_gives(monkeypatch):
    arrays = [scan(i // 2) if i % 2 else annotated(scan(i // 2)) for i in range(30)]
    whole = pairs(prints(arrays))
    assert {(p.first, p.second) for p in whole} == {(i, i + 1) for i in range(0, 30, 2)}
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    blocked = pairs(prints(arrays))
    assert [(p.first, p.second, p.kind) for p in blocked] == [(p.first, p.second, p.kind) for p in whole]
    monkeypatch.setattr(duplicates, "MOST", 4)
    assert len(pairs(prints(arrays))) == 4


def dataset(arrays, splits):
    images = [Image.fromarray(array) for array in arrays]
    names = tuple(f"{i}.png" for i in range(len(images)))
    return Dataset(("a", "b"), False, names, np.arange(len(images)) % 2, names, tuple(splits), images)


def said(found):
    return duplicates.warning(found, duplicates.across(found))


def test_the_warning_is_about_pairs_in_different_splits(monkeypatch):
    arrays = [scan(i) for i in range(20)] + [annotated(scan(2)), scan(3)]
    assert said(dataset(arrays, ["train"] * 22)) == ""
    apart = dataset(arrays, ["train"] * 20 + ["test", "val"])
    assert duplicates.counts(duplicates.across(apart)) == {"exact": 1, "near": 1}
    assert "2 pairs of images are the same (1) or nearly the same (1)" in said(apart)
    assert "3.png (train) = 21.png (val); 2.png (train) = 20.png (test). " in said(apart)
    assert "vitft_jax.check_data" in said(apart)
    monkeypatch.setattr(duplicates, "AT_START", 21)
    assert duplicates.across(apart) is None
    assert said(apart) == ""


def test_near_duplicates_of_busi(busi):
    """What the module and docs/predict.md claim of BUSI: which pairs are found, and what they mean for its table."""
    with (busi / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = pairs([fingerprint(Image.open(busi / row["path"]).convert("RGB")) for row in rows])
    assert len(found) == 223
    same = sum(rows[p.first]["group"] == rows[p.second]["group"] for p in found)
    assert same == 149
    crossing, different = (
        sum(rows[p.first][column] != rows[p.second][column] for p in found) for column in ("split", "label")
    )
    assert (crossing, different) == (26, 11)
    exact = [p for p in found if p.kind == "exact"]
    assert [(rows[p.first]["path"][-16:], rows[p.second]["path"][-19:]) for p in exact] == [
        ("benign (433).png", "malignant (145).png")
    ]
