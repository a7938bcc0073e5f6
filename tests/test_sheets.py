"""Contact sheets of predict and check_data: which picture, which words, which colour stand in which place."""

import csv

import numpy as np
import pytest
from PIL import Image
from support import TINY
from test_look import make

from vitft_jax import check_data, inputs, predict, predictor, sheets, vit
from vitft_jax import config as configs


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: (tiles, title) by the name of the file."""
    seen, real = {}, sheets.draw

    def draw(path, tiles, title, **more):
        seen[path.name] = tiles, title
        real(path, tiles, title, **more)

    monkeypatch.setattr(sheets, "draw", draw)
    return seen


def same(image, path):
    with Image.open(path) as there:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(there))


def test_predict_shows_every_image_with_what_is_said_of_it(image_folder, tmp_path, monkeypatch, drawn):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", {**TINY, "depth": 3})
    workdir = make(tmp_path / "run", image_folder, methods=("lora",))
    files = {f"{image_folder}/{c}/{i}.png": c for c in ("dark", "grey", "light") for i in (1, 2)} | {
        f"{image_folder}/grey/3.png": ""  # whose truth is not known
    }
    table = tmp_path / "table.csv"
    table.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in files.items()))
    predict.predict(workdir, table, tmp_path / "out.csv", tmp_path / "grid.png", tmp_path / "mistakes.png")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    right = {row["path"]: row["true"] == row["predicted"] if row["true"] else None for row in rows}
    assert {True, False, None} == set(right.values())  # or this test shows less than it should
    tiles, title = drawn["grid.png"]
    assert title == "7 of 7 images"
    for tile, row in zip(tiles, rows, strict=True):
        same(tile.image, row["path"])
        said = row["predicted"]
        lines = [row["path"], f"says: {said} {float(row[f'p:{said}']):.2f}"]
        if row["true"]:
            lines.append(f"true: {row['true']}{'' if right[row['path']] else ' (wrong)'}")
        assert tile.caption.split("\n") == lines
        assert tile.right is right[row["path"]]
    tiles, title = drawn["mistakes.png"]
    wrong = sorted((row for row in rows if right[row["path"]] is False), key=lambda row: float(row[f"p:{row['true']}"]))
    assert [tile.caption.split("\n")[0] for tile in tiles] == [row["path"] for row in wrong]
    assert title == f"{len(wrong)} mistakes in 6 images, those furthest off first"
    assert not any(tile.right for tile in tiles)


def test_check_data_shows_pairs_side_by_side_in_red_where_they_do_harm(tmp_path, drawn):
    rng = np.random.default_rng(0)
    scans = rng.integers(20, 250, (8, 128, 128), np.uint8)
    table = [["path", "label", "group", "split"]]
    for i, (scan, split) in enumerate(zip(scans, ("train", "val", "test", "train") * 2, strict=True)):
        Image.fromarray(scan).save(tmp_path / f"{i}.png")
        table.append([f"{i}.png", ("cyst", "mass")[i // 4], f"g{i}", split])
    for name, of, group, split in (("across", 0, "x", "test"), ("within", 3, "g3", "train")):
        Image.fromarray(scans[of]).save(tmp_path / f"{name}.png")
        table.append([f"{name}.png", "cyst", group, split])
    Image.new("L", (128, 128), 9).save(tmp_path / "flat.png")
    table.append(["flat.png", "mass", "y", "train"])
    (tmp_path / "labels.csv").write_text("".join(",".join(row) + "\n" for row in table))
    config = configs.default()
    config.data.path, config.data.table = str(tmp_path), "labels.csv"
    check_data.write(check_data.check(config), tmp_path / "check")
    tiles, title = drawn["duplicates.png"]
    assert title.startswith("2 of 2 pairs")
    expected = [
        ("0", "train", 1, False),
        ("across", "test", 1, False),
        ("3", "train", 2, None),
        ("within", "train", 2, None),
    ]
    for tile, (name, split, pair, right) in zip(tiles, expected, strict=True):
        same(tile.image, tmp_path / f"{name}.png")
        assert tile.caption.split("\n") == [f"pair {pair}, exact", f"{name}.png", f"{split}, cyst"]
        assert tile.right is right
    ((odd,), title) = drawn["odd.png"]
    assert title == "1 of 1 odd images"
    same(odd.image, tmp_path / "flat.png")
    assert odd.caption.split("\n") == ["flat.png", "constant: grey value 9"]


def test_a_caption_has_the_colour_of_its_truth(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(sheets.report, "write_figure", lambda path, figure: figures.append(figure))
    image = Image.new("L", (20, 20), 90)
    sheets.draw(
        tmp_path / "a.png", [sheets.Tile(image, f"name {i}", right) for i, right in enumerate((True, False, None))], "t"
    )
    labels = [axis.xaxis.label for axis in figures[0].axes]
    assert [(label.get_text(), label.get_color()) for label in labels] == [
        (f"name {i}", sheets.COLOURS[right]) for i, right in enumerate((True, False, None))
    ]
    assert len(set(sheets.COLOURS.values())) == 3


def test_of_several_labels_a_truth_that_is_partly_unknown_is_no_truth():
    from vitft_jax.captions import said_and_true

    class Labels:
        classes, multilabel = ("a", "b"), True
        names = predictor.Predictor.names

        def decide(self, p):
            return (p > 0.5).astype(int)

    p = np.array([0.25, 0.75])
    assert said_and_true(Labels(), p, np.array([0, 1])) == (["says: b 0.75", "true: b"], True)
    assert said_and_true(Labels(), p, np.array([0, 0])) == (["says: b 0.75", "true: none (wrong)"], False)
    assert said_and_true(Labels(), p, np.array([0, inputs.UNKNOWN])) == (["says: b 0.75"], None)
    assert said_and_true(Labels(), p - 0.5, None) == (["says: none"], None)
