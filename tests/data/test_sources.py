import numpy as np
import pytest

from vitft_jax import config as configs
from vitft_jax.data import sources
from vitft_jax.data.sources import load
from vitft_jax.data.tables import write_table
from vitft_jax.errors import InputError

ROWS = [f"{'cyst' if i < 10 else 'solid'}/{i:02}.png,{'cyst' if i < 10 else 'solid'}" for i in range(24)]
SPLIT = [("val", "test", "train", "train", "train")[i % 5] for i in range(24)]


def same(first, second):
    for field in ("classes", "multilabel", "names", "groups", "splits"):
        assert getattr(first, field) == getattr(second, field), field
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.labels.dtype == second.labels.dtype
    for left, right in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(left, right)
    return True


def test_class_folders(folder, config, write_image):
    write_image(folder / "solid" / "deep" / "er" / "x.BMP")
    write_image(folder / "solid" / ".hidden.png")
    write_image(folder / ".git" / "x.png")
    (folder / "cyst" / "notes.txt").touch()
    dataset = load(config, 0)
    assert dataset.classes == ("cyst", "solid")
    assert not dataset.multilabel
    assert len(dataset) == 25
    assert dataset.names[0] == "cyst/00.png"
    assert dataset.names[-1] == "solid/deep/er/x.BMP"
    assert dataset.labels.dtype == np.int32
    assert [dataset.classes[label] for label in dataset.labels] == [name.split("/")[0] for name in dataset.names]
    assert dataset.groups == dataset.names
    assert dataset.images[3].size == (16, 16)
    parts = [dataset.indices(split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts)) == list(range(25))
    assert all(len(part) > 2 for part in parts)


def test_table_with_groups_and_splits(table, config):
    table(
        "split,path,note,label,group",
        [f"{SPLIT[i]},{row.split(',')[0]},,{row.split(',')[1]},g{i}" for i, row in enumerate(ROWS)],
    )
    dataset = load(config, 0)
    assert dataset.classes == ("cyst", "solid")
    assert dataset.groups == tuple(f"g{i}" for i in range(24))
    assert dataset.splits == tuple(SPLIT)
    np.testing.assert_array_equal(dataset.labels, [0] * 10 + [1] * 14)


def test_blank_group_is_the_example_itself(table, config):
    table("path,label,group", [f"{row},{'g' if i < 2 else ''}" for i, row in enumerate(ROWS)])
    dataset = load(config, 0)
    assert dataset.groups[:3] == ("g", "g", "cyst/02.png")
    assert dataset.splits[0] == dataset.splits[1]


def test_split_names_have_synonyms(table, config):
    words = {"train": ["Train", "training"], "val": ["valid", "validation", "DEV", "val"], "test": ["testing", "test"]}
    table("path,label,split", [f"{row},{words[SPLIT[i]][i % len(words[SPLIT[i]])]}" for i, row in enumerate(ROWS)])
    assert load(config, 0).splits == tuple(SPLIT)


def test_val_is_taken_from_train_by_group_where_the_table_has_none(table, config):
    rows = [f"{row},g{i // 2},{'test' if i % 12 < 2 else 'train'}" for i, row in enumerate(ROWS)]
    table("path,label,group,split", rows)
    dataset = load(config, 0)
    assert [split == "test" for split in dataset.splits] == [i % 12 < 2 for i in range(24)]
    assert len(dataset.indices("val")) in (4, 6)
    assert same(dataset, load(config, 0))
    assert any(load(config, seed).splits != dataset.splits for seed in (1, 2, 3))


def test_multilabel(table, config):
    rows = [f"{row.split(',')[0]},{i % 2},{int(i % 3 == 0)}.0" for i, row in enumerate(ROWS)]
    table("path,mass,calc", rows)
    config.labels = ("calc", "mass")
    dataset = load(config, 0)
    assert dataset.multilabel
    assert dataset.classes == ("calc", "mass")
    assert dataset.labels.dtype == np.float32
    np.testing.assert_array_equal(dataset.labels, [[i % 3 == 0, i % 2] for i in range(24)])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_with_or_without_mark(table, config, encoding):
    table("path,label", [row.replace(",cyst", ",zyste_ä") for row in ROWS], encoding=encoding)
    assert load(config, 0).classes == ("solid", "zyste_ä")


def test_paths_are_relative_to_a_table_inside_the_folder(table, config):
    table("path,label", ["../" + row for row in ROWS], name="meta/labels.csv")
    assert load(config, 0).names[0] == "cyst/00.png"


def test_paths_are_relative_to_the_folder_for_a_table_outside(table, config, tmp_path):
    moved = table("path,label", ROWS).rename(tmp_path / "elsewhere.csv")
    for name in (str(moved), "../elsewhere.csv"):
        config.table = name
        assert load(config, 0).names[0] == "cyst/00.png"


def test_blank_lines_and_spaces_do_no_harm(folder, table, config):
    path = table("path,label", ROWS)
    path.write_text(path.read_text().replace("\r\n", "\n\n").replace(",cyst", ", cyst "))
    assert load(config, 0).classes == ("cyst", "solid")


@pytest.mark.parametrize("multilabel", [False, True])
def test_written_table_gives_the_same_dataset(table, config, tmp_path, multilabel):
    if multilabel:
        config.labels = ("b,1", "a")
        path = table(
            "path,x,a", [f"{row.split(',')[0]},{i % 2},{i % 3 % 2}" for i, row in enumerate(ROWS)], name="s/t.csv"
        )
        path.write_text(
            path.read_text()
            .replace("path,x,a", 'path,"b,1",a')
            .replace("cyst/", "../cyst/")
            .replace("solid/", "../solid/")
        )
    dataset = load(config, 5)
    write_table(dataset, tmp_path / "split.csv")
    again = load(config, 6, classes=dataset.classes, table=tmp_path / "split.csv")
    assert same(dataset, again)
    write_table(again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "split.csv").read_bytes()


def test_known_classes_keep_their_order(table, config):
    table("path,label", ROWS)
    dataset = load(config, 0, classes=["solid", "cyst"])
    np.testing.assert_array_equal(dataset.labels, [1] * 10 + [0] * 14)


def test_unknown_label_for_known_classes(table, config):
    table("path,label", [*ROWS[:20], ROWS[20].replace(",solid", ",sollid"), *ROWS[21:]])
    with pytest.raises(InputError, match=r"row 22\): label 'sollid' is none of the classes cyst, solid.* 'solid'"):
        load(config, 0, classes=["cyst", "solid"])


def test_other_label_columns_than_the_model_has(table, config):
    table("path,a,b", [f"{row.split(',')[0]},1,0" for row in ROWS])
    config.labels = ("a", "b")
    with pytest.raises(InputError, match=r"classes are b, a"):
        load(config, 0, classes=["b", "a"])


def changed(row, text):
    """ROWS with data row `row` (as an editor counts) replaced."""
    return [*ROWS[: row - 2], text, *ROWS[row - 1 :]]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,class", ROWS, r"labels\.csv: there is no column 'label'; choose one of class, path .*data\.labels"),
        ("file,label", ROWS, r"no column 'path'; choose one of file, label"),
        (
            "path;label",
            [row.replace(",", ";") for row in ROWS],
            "its columns are separated by ';'; save it with commas",
        ),
        ("path,label,label", [f"{row},x" for row in ROWS], "column 'label' is there twice"),
        ("path,label", [], "no rows"),
        ("path,label", changed(7, "cyst/00.png,cyst"), r"row 7: 'cyst/00\.png' is listed in row 2 already"),
        ("path,label", changed(7, "./cyst//00.png,cyst"), r"row 7: .* is listed in row 2 already"),
        ("path,label", changed(5, "cyst/03.png, "), "row 5: the label is blank"),
        ("path,label", changed(5, ",cyst"), "row 5: the path is blank"),
        ("path,label", changed(5, "cyst/03.png"), r"row 5: 1 values for 2 columns \(path, label\)"),
        ("path,label", changed(5, "cyst/03.png,cyst,1"), "row 5: 3 values for 2 columns"),
        ("path,label", changed(5, "../03.png,cyst"), r"row 5: '\.\./03\.png' leads out of"),
        ("path,label", changed(5, "a/../../03.png,cyst"), r"row 5: .* leads out of"),
        ("path,label", changed(5, "/etc/03.png,cyst"), r"row 5: '/etc/03\.png' is an absolute path"),
        ("path,label", changed(5, "C:\\03.png,cyst"), r"row 5: .* is an absolute path"),
        ("path,label", changed(5, "cyst\\03.png,cyst"), r"1 of 24 (.|\n)*row 5: cyst\\03.png\nPut '/'"),
        ("path,label", [f"{row.split(',')[0]},cyst" for row in ROWS], "only one class, 'cyst'"),
        ("path,label,group", [f"{row},g{i % 2}" for i, row in enumerate(ROWS)], "2 groups"),
    ],
)
def test_faulty_tables(table, config, header, rows, message):
    table(header, rows)
    with pytest.raises(InputError, match=message):
        load(config, 0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,label,Group", "column 'Group' would not be read; write 'group', or give it another name"),
        ("path,label,SPLIT", "column 'SPLIT' would not be read; write 'split'"),
        ("path,label,patient", "column 'patient' would not be read, and images of one patient"),
        ("path,label,Patient ID", "column 'Patient ID' would not be read"),
        ("path,label,video_no", "call it 'group', or if it is none give it another name"),
    ],
)
def test_columns_that_were_meant_to_be_read(table, config, header, message):
    """Passed over, they would let images of one patient into two splits, or test images into training."""
    table(header, [f"{row},train" for row in ROWS])
    with pytest.raises(InputError, match=message):
        load(config, 0)
    table("path,label,group,patient,age,mode", [f"{row},g{i},p1,40,B" for i, row in enumerate(ROWS)])
    assert load(config, 0).groups[:2] == ("g0", "g1")


def test_columns_that_a_spreadsheet_leaves_behind(table, config):
    table("path,label", ROWS)
    plain = load(config, 0)
    table("path,label,,", [f"{row},," for row in ROWS])
    assert load(config, 0).names == plain.names
    table("path,label,,", [*(f"{row},," for row in ROWS[:-1]), f"{ROWS[-1]},,benign?"])
    with pytest.raises(InputError, match="column '' is there twice"):
        load(config, 0)
    table("path,label", [*(f"{row},," for row in ROWS[:-1]), f"{ROWS[-1]},,benign?"])
    with pytest.raises(InputError, match=r"row 25: 4 values for 2 columns"):
        load(config, 0)


@pytest.mark.parametrize(("mark", "name"), [(";", "';'"), ("\t", "tabs")])
def test_columns_that_are_not_separated_by_commas(table, config, mark, name):
    table(f"path{mark}label{mark}age", [f"{row.replace(',', mark)}{mark}45,5" for row in ROWS])
    with pytest.raises(InputError, match=f"its columns are separated by {name}; save it with commas"):
        load(config, 0)


def test_missing_images_are_counted_and_five_named(table, config):
    table("path,label", [row.replace("solid/", "sold/") for row in ROWS])
    with pytest.raises(InputError) as error:
        load(config, 0)
    lines = str(error.value).split("\n")
    assert "14 of 24 images" in lines[0]
    assert [line.strip() for line in lines[1:6]] == [f"row {12 + i}: sold/{10 + i}.png" for i in range(5)]
    assert "9 more" in lines[6]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([*SPLIT[:4], "trian", *SPLIT[5:]], r"row 6: the split is 'trian'.* 'train'"),
        ([""] * 24, "row 2: the split is ''"),
        (["train"] * 24, "val split is empty"),
        (["train", "val"] * 12, "test split is empty"),
        (["train"] * 10 + ["val", "test"] * 7, "Class 'solid' has no example in train"),
    ],
)
def test_faulty_splits(table, config, splits, message):
    table("path,label,split", [f"{row},{split}" for row, split in zip(ROWS, splits, strict=True)])
    with pytest.raises(InputError, match=message):
        load(config, 0)


def test_group_in_two_splits(table, config):
    table("path,label,group,split", [f"{row},g{i % 20},{SPLIT[i]}" for i, row in enumerate(ROWS)])
    load(config, 0)  # 20 is a multiple of the period of SPLIT, 19 is not
    table("path,label,group,split", [f"{row},g{i % 19},{SPLIT[i]}" for i, row in enumerate(ROWS)])
    first, second = r"cyst/00\.png \(labels\.csv, row 2\) in val", r"solid/19\.png \(labels\.csv, row 21\) in train"
    with pytest.raises(InputError, match=f"Group 'g0' is in two splits: {first} and {second}"):
        load(config, 0)


@pytest.mark.parametrize("value", ["", "2", "yes", "0.5"])
def test_multilabel_values_are_0_or_1(table, config, value):
    table("path,a,b", [f"{row.split(',')[0]},1,{value if i == 3 else i % 2}" for i, row in enumerate(ROWS)])
    config.labels = ("a", "b")
    with pytest.raises(InputError, match=f"row 5: b is '{value}'"):
        load(config, 0)


def test_multilabel_column_names(table, config):
    table("path,mass,calc", [f"{row.split(',')[0]},1,0" for row in ROWS])
    config.labels = ("mass", "calk")
    with pytest.raises(InputError, match=r"no column 'calk'; did you mean 'calc'"):
        load(config, 0)
    config.labels = ("mass", "path")
    with pytest.raises(InputError, match=r"data\.labels: 'path'"):
        load(config, 0)
    config.labels, config.table = ("mass",), ""
    with pytest.raises(InputError, match=r"data\.table must name"):
        load(config, 0)


def test_row_numbers_are_those_of_an_editor(table, config):
    path = table("path,label,note", [f"{row},x" for row in ROWS])
    text = path.read_text().replace("\r\n", "\n").replace("02.png,cyst,x", '02.png,cyst,"two\nlines"')
    path.write_text(text.replace("cyst/05.png,cyst", "\ncyst/05.png,"))
    number = path.read_text().split("\n").index("cyst/05.png,,x") + 1
    with pytest.raises(InputError, match=f"row {number}: the label is blank"):
        load(config, 0)


def test_not_utf8(table, config):
    table("path,label", [row.replace(",cyst", ",zyste_ä") for row in ROWS], encoding="latin-1")
    with pytest.raises(InputError, match=r"labels\.csv is not UTF-8"):
        load(config, 0)


def test_open_quote(table, config):
    path = table("path,label", ROWS)
    path.write_text(path.read_text().replace("cyst/04.png", '"cyst/04.png'))
    with pytest.raises(InputError, match=r"row 6: not valid CSV"):
        load(config, 0)


def test_missing_table_and_folder(config):
    config.table = "lables.csv"
    with pytest.raises(InputError, match=r"no table .*lables\.csv"):
        load(config, 0)
    config.path += "x"
    with pytest.raises(InputError, match=r"data\.path: there is no folder .*imagesx"):
        load(config, 0)
    config.path = ""
    with pytest.raises(InputError, match=r"data\.path is empty"):
        load(config, 0)


def test_empty_class_folder(folder, config):
    (folder / "normal").mkdir()
    with pytest.raises(InputError, match=r"normal holds no images"):
        load(config, 0)


@pytest.mark.parametrize("name", ["benign /0.png", " benign/0.png"])
def test_classes_with_a_space_at_an_end_are_refused(folder, config, write_image, name):
    """The table of the split, from which a run is read again, has them without."""
    write_image(folder / name)
    with pytest.raises(InputError, match=r"begins or ends with a space"):
        load(config, 0)


def test_folder_without_classes_points_to_its_table(tmp_path, config):
    config.path = str(tmp_path / "flat")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "all.csv").touch()
    with pytest.raises(InputError, match=r"no sub-folders.*data\.table=all\.csv"):
        load(config, 0)


def test_folders_that_are_splits(tmp_path, config, write_image):
    for split in ("train", "test"):
        write_image(tmp_path / "layout" / split / "cyst" / "0.png")
    config.path = str(tmp_path / "layout")
    with pytest.raises(InputError, match="look like splits, not classes"):
        load(config, 0)


def test_only_one_class_folder(folder, config):
    (folder / "solid").rename(folder / "cyst" / "more")
    with pytest.raises(InputError, match="only one class, 'cyst'"):
        load(config, 0)


def test_links_to_images_elsewhere_are_taken_where_they_are_trusted(folder, config, tmp_path, write_image):
    config.links = True
    write_image(tmp_path / "store.png", 1)
    (folder / "cyst" / "link.png").symlink_to(tmp_path / "store.png")
    assert "cyst/link.png" in load(config, 0).names


def test_unknown_source_split_and_seed(config):
    with pytest.raises(InputError, match=r"no split 'tests'.*did you mean 'test'"):
        load(config, 0).indices("tests")
    with pytest.raises(InputError, match="seed = -1"):
        load(config, -1)
    config.source = "foldr"
    with pytest.raises(InputError, match=r"'foldr' is unknown; did you mean 'folder'"):
        load(config, 0)


def test_large_images_are_reduced_to_what_the_model_needs(config):
    config.image_size = 4
    assert load(config, 0).images[0].size == (8, 8)
    config.image_size = 0
    assert load(config, 0).images[0].size == (16, 16)


@pytest.mark.parametrize(
    ("made", "path", "expected"),
    [
        ((), "", "phantom"),
        (("images/",), "images", "folder"),
        (("images/", "images/dataset_info.json"), "images", "tfds"),
        (("set.npz",), "set.npz", "npz"),
    ],
)
def test_the_path_tells_the_source(made, path, expected, tmp_path, monkeypatch):
    for name in made:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"")
    asked = []
    for kind in sources.SOURCES:
        monkeypatch.setitem(sources.SOURCES, kind, lambda config, table, kind=kind: asked.append(kind) or 1 / 0)
    config = configs.default().data
    config.path = str(tmp_path / path) if path else ""
    with pytest.raises(ZeroDivisionError):
        sources.load(config, seed=0)
    assert asked == [expected]


def test_a_path_beside_generated_images_is_refused(tmp_path):
    config = configs.default().data
    config.source, config.path = "phantom", str(tmp_path)
    with pytest.raises(InputError, match=r"data\.path"):
        sources.load(config, seed=0)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("VITFT_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / "vitft_jax"
    monkeypatch.setenv("VITFT_JAX_CACHE", str(tmp_path / "mine"))
    assert sources.cache_folder() == tmp_path / "mine"
