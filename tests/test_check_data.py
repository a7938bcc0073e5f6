"""The command check_data on a folder with every fault that it looks for."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scans import annotated, scan

from vitft_jax import check_data, train
from vitft_jax import config as configs
from vitft_jax.errors import InputError


@pytest.fixture
def config(tmp_path):
    """A clean set of 24 scans, of two classes in three splits."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(24):
        Image.fromarray(scan(i)).save(root / f"{i}.png")
    write_table(root, rows())
    config = configs.default()
    config.data.path, config.data.table, config.data.image_size = str(root), "labels.csv", 128
    return config


def rows():
    splits = ("train", "train", "val", "test")
    return [[f"{i}.png", ("cyst", "mass")[i % 2], f"g{i // 8}{i % 4}", splits[i % 4]] for i in range(24)]


def write_table(root, cells, header=("path", "label", "group", "split")):
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *cells])


def root_of(config):
    return Path(config.data.path)


def findings(found):
    return {finding.kind: finding.items for finding in found.findings}


def test_a_clean_set_has_no_findings(config, tmp_path):
    root = root_of(config)
    table = rows()
    table[2][1], table[3][1] = "mass", "cyst"  # each class in each split
    write_table(root, table)
    found = check_data.check(config)
    assert found.clean
    assert found.findings == ()
    check_data.write(found, tmp_path / "check")
    assert {path.name for path in (tmp_path / "check").iterdir()} == {"check.json", "check.md"}
    facts = json.loads((tmp_path / "check" / "check.json").read_text())
    assert facts["splits"]["train"] == {"images": 12, "groups": 6, "classes": {"cyst": 6, "mass": 6}}
    assert facts["sizes"] == {"128 x 128": 24}
    assert facts["modes"] == {"L": 24}


def test_every_fault_is_found_and_told(config, tmp_path, capsys):
    root = root_of(config)
    table = rows()
    pictures = {
        "copy.png": (scan(0), "cyst", "x1", "test"),  # of 0.png, in train
        "marks.png": (annotated(scan(1)), "cyst", "g01", "train"),  # of 1.png, a mass, in train
        "turned.png": (scan(4)[:, ::-1], "cyst", "x3", "train"),  # of 4.png, in train, another group
        "again.png": (annotated(scan(5)), "mass", "g01", "train"),  # of 5.png, in train, the same group
        "flat.png": (np.full((128, 128), 9, np.uint8), "cyst", "x5", "train"),
        "black.png": (np.pad(scan(90)[:28, :28], ((100, 0), (100, 0))), "cyst", "x6", "train"),
        "tiny.png": (scan(91)[:20, :20], "cyst", "x7", "train"),
        "long.png": (np.tile(scan(92), (1, 3)), "cyst", "x8", "train"),
        "deep.png": (scan(93).astype(np.uint16) * 16, "cyst", "x9", "train"),
        "clear.png": (np.dstack([scan(94)] * 3 + [np.full((128, 128), 255, np.uint8)]), "cyst", "x10", "train"),
        "across.png": (scan(95), "cyst", "g00", "val"),  # a group that is in train
    }
    for name, (array, *cells) in pictures.items():
        Image.fromarray(array).save(root / name)
        table.append([name, *cells])
    Image.fromarray(scan(96)).save(root / "clip.gif", save_all=True, append_images=[Image.fromarray(scan(97))])
    (root / "broken.png").write_bytes((root / "0.png").read_bytes()[:200])
    table += [["clip.gif", "mass", "x11", "train"], ["broken.png", "mass", "x12", "train"]]
    write_table(root, table)
    output = tmp_path / "check"
    (tmp_path / "c.py").write_text(
        "from vitft_jax import config\ndef get_config():\n    c = config.default()\n"
        f"    c.data.path = {str(root)!r}\n    return c\n"
    )
    command = [f"--config={tmp_path / 'c.py'}", "--config.data.table=labels.csv", f"--output={output}"]
    with pytest.raises(SystemExit) as stop:
        check_data.main([*command, "--config.data.image_size=128"])
    assert stop.value.code == check_data.PROBLEMS_FOUND == 4
    facts = json.loads((output / "check.json").read_text())
    found = {f["kind"]: f["items"] for f in facts["findings"]}
    assert found["duplicates across splits"] == ["0.png (train, cyst) = copy.png (test, cyst): exact"]
    assert [item.rsplit(" ", 1)[0] for item in found["duplicates with different labels"]] == [
        "1.png (train, mass) = marks.png (train, cyst): near"
    ]
    (apart,) = found["duplicates in different groups of a split"]
    assert apart.startswith("4.png (train, cyst) = turned.png (train, cyst): mirrored 0.")
    (within,) = found["duplicates within a group"]
    assert within.startswith("5.png (train, mass) = again.png (train, mass): near 0.")
    assert found["groups across splits"] == ["g00: 2 train, 1 val"]
    assert "broken.png" in found["unreadable images"][0]
    assert found["constant images"] == ["flat.png: grey value 9"]
    assert found["mostly black images"] == ["black.png: 95 %"]
    assert found["tiny images"] == ["tiny.png: 20 x 20"]
    assert found["elongated images"] == ["long.png: 384 x 128"]
    assert found["more than 8 bits images"] == ["deep.png: mode I;16"]
    assert found["transparent images"] == ["clear.png: mode RGBA"]
    assert found["several frames images"] == ["clip.gif: 2, of which the first is read"]
    assert found["classes that a split lacks"] == ["mass: none in val"]
    problems = {f["kind"] for f in facts["findings"] if f["problem"]}
    assert problems == {
        "duplicates across splits", "duplicates with different labels", "groups across splits", "unreadable images",
        "constant images",
    }  # fmt: skip
    assert [pair["names"] for pair in facts["pairs"]] == [
        ["0.png", "copy.png"], ["1.png", "marks.png"], ["5.png", "again.png"], ["4.png", "turned.png"],
    ]  # fmt: skip
    said, page = capsys.readouterr().out, (output / "check.md").read_text()
    for kind in found:
        assert kind in said
        assert kind in page
    for name in ("duplicates.png", "odd.png"):
        assert f"({name})" in page
        with Image.open(output / name) as picture:
            assert picture.width > 400


def test_labels_that_change_within_a_video_do_not_contradict(config):
    root = root_of(config)
    Image.fromarray(annotated(scan(0))).save(root / "next.png")
    Image.fromarray(scan(8)).save(root / "same.png")
    several = [[name, int(label == "cyst"), 1, group, split] for name, label, group, split in rows()]
    several += [["next.png", 0, 1, "g00", "train"], ["same.png", 0, 1, "g10", "train"]]
    write_table(root, several, ("path", "cyst", "probe", "group", "split"))
    config.data.labels = ("cyst", "probe")
    found = findings(check_data.check(config))
    (conflict,) = found["duplicates with different labels"]
    assert conflict == "8.png (train, cyst+probe) = same.png (train, probe): exact"
    (within,) = found["duplicates within a group"]
    assert within.startswith("0.png (train, cyst+probe) = next.png (train, probe): near")


def test_that_no_groups_are_known_is_told(config):
    root, table = root_of(config), rows()
    table[2][1], table[3][1] = "mass", "cyst"
    write_table(root, [[name, label, split] for name, label, _, split in table], ("path", "label", "split"))
    found = check_data.check(config)
    assert findings(found) == {"images without a group": tuple(f"{i}.png" for i in range(24))}
    assert found.clean  # there may be one image of each patient


def test_groups_that_are_none_or_spelt_in_two_ways_are_told(config):
    root, table = root_of(config), rows()
    table[2][1], table[3][1] = "mass", "cyst"
    for row, group in {0: "", 1: "", 4: "NA", 5: "NA", 8: "P1", 12: "p1"}.items():
        table[row][2] = group
    write_table(root, table)
    found = check_data.check(config)
    assert findings(found) == {
        "images without a group": ("0.png", "1.png"),
        "groups with the name of none": ("NA: 2 images",),
        "groups that differ in capital letters alone": ("P1, p1",),
    }
    assert found.clean


def test_classes_spelt_in_two_ways_are_a_problem(config):
    table = [[name, label.title() if i % 3 == 0 else label, *rest] for i, (name, label, *rest) in enumerate(rows())]
    write_table(root_of(config), table)
    found = check_data.check(config)
    assert set(findings(found)["classes that differ in capital letters alone"]) == {"Cyst, cyst", "Mass, mass"}
    assert not found.clean


def test_the_side_of_the_input_is_that_of_the_bundled_weights(config, monkeypatch):
    sides = []
    real = check_data.inspect
    monkeypatch.setattr(check_data, "inspect", lambda images, i, side: (sides.append(side), real(images, i, side))[1])
    config.data.image_size = 0
    check_data.check(config)
    assert set(sides) == {128}


def test_names_from_outside_are_text_in_the_report(config, tmp_path):
    """Neither a table cell ends nor a code span begins in a name of a class or of a file."""
    root, table = root_of(config), rows()
    table[0][0] = "a`b|c<i>.png"
    (root / "0.png").rename(root / table[0][0])
    Image.fromarray(annotated(scan(0))).save(root / "copy`.png")
    table.append(["copy`.png", "cyst", "x", "test"])
    hostile = {"cyst": "cyst | `<script>", "mass": "mass"}
    write_table(root, [[name, hostile[label], *rest] for name, label, *rest in table])
    output = tmp_path / "check"
    check_data.write(check_data.check(config), output)
    page = (output / "check.md").read_text()
    heads = [line for line in page.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in heads}
    assert columns == {6}  # split, images, groups and two classes
    bare = re.sub(r"\\[\\`*_{}\[\]#|~$]", "", page.split("![")[0])
    assert not set("`<>*[]") & set(bare)
    assert r"a\`b\|c&lt;i&gt;.png (train, cyst \| \`&lt;script&gt;) = copy\`.png" in page


def test_an_empty_split_and_a_class_that_never_trains(config):
    table = [[*row[:3], "val" if row[3] == "test" else row[3]] for row in rows()]
    table = [row for row in table if not (row[3] == "train" and row[1] == "mass")]
    write_table(root_of(config), table)
    found = findings(check_data.check(config))
    assert found["empty splits"] == ("test",)
    assert found["classes without training images"] == ("mass",)


def test_faults_of_a_table_are_listed_together(config, capsys):
    table = rows()
    table[1][1], table[3][3], table[5][0] = "", "tset", "0.png"
    write_table(root_of(config), table)
    with pytest.raises(InputError) as error:
        check_data.check(config)
    lines = str(error.value).splitlines()
    assert "3 rows cannot be used" in lines[0]
    assert "row 3: the label is blank" in lines[1]
    assert "row 5: the split is 'tset'" in lines[2]
    assert "row 7: '0.png' is listed in row 2 already" in lines[3]


def test_training_warns_of_duplicates_across_splits(tiny_config, config, capsys, tmp_path):
    tiny_config.data.update({"path": config.data.path, "table": "labels.csv"})
    tiny_config.train.epochs, tiny_config.train.best_metric = 1.0, "loss"
    train.train(tiny_config, tmp_path / "clean")
    said = capsys.readouterr().out
    assert "warning" not in said
    assert "no groups" not in said
    Image.fromarray(annotated(scan(0))).save(root_of(config) / "marks.png")
    leaky = [[name, label, split] for name, label, _, split in rows()]
    write_table(root_of(config), [*leaky, ["marks.png", "cyst", "test"]], ("path", "label", "split"))
    train.train(tiny_config, tmp_path / "leaky")
    said = capsys.readouterr().out
    assert "no groups (patients, videos) are known, so each image counts as one" in said
    assert "the same (0) or nearly the same (1)" in said
    assert "0.png (train) = marks.png (test)" in said
