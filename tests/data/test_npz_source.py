import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from vitft_jax.data.batches import train_batches
from vitft_jax.data.sources import load
from vitft_jax.data.tables import write_table
from vitft_jax.errors import InputError

COUNTS = {"train": 12, "val": 5, "test": 7}


def arrays(columns=1, colour=False):
    """A whole MedMNIST-style file: classes 0, 1, 2 in turn, or 0/1 in several columns."""
    rng, made = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        made[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16, 3) if colour else (count, 16, 16), np.uint8)
        numbers = np.arange(count)[:, None]
        made[f"{split}_labels"] = numbers % 3 if columns == 1 else (numbers >> np.arange(columns)) % 2
    return made


@pytest.fixture
def save(tmp_path, config):
    """Writes arrays and returns the `data` group that reads them."""

    def save(made, **changes):
        np.savez_compressed(tmp_path / "scans.npz", **made)
        changed = config.copy_and_resolve_references()
        changed.update({"source": "npz", "path": str(tmp_path / "scans.npz")} | changes)
        return changed

    return save


def same(first, second):
    for field in ("classes", "multilabel", "names", "groups", "splits"):
        assert getattr(first, field) == getattr(second, field), field
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.labels.dtype == second.labels.dtype
    for left, right in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(left, right)
    return True


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_several_classes(save, colour, flat):
    made = arrays(colour=colour)
    if flat:
        made |= {f"{split}_labels": made[f"{split}_labels"][:, 0] for split in COUNTS}
    dataset = load(save(made), 0)
    assert dataset.classes == ("0", "1", "2")
    assert dataset.labels.dtype == np.int32
    assert not dataset.multilabel
    assert dataset.names == tuple(f"{split}/{i}" for split, count in COUNTS.items() for i in range(count))
    assert dataset.groups == dataset.names
    assert len(dataset.images) == 24
    for i, name in enumerate(dataset.names):
        split, row = name.split("/")
        assert dataset.splits[i] == split
        assert dataset.labels[i] == int(row) % 3
        assert dataset.images[i].mode == ("RGB" if colour else "L")
        np.testing.assert_array_equal(dataset.images[i], made[f"{split}_images"][int(row)])


@pytest.mark.parametrize("flat", [False, True])
def test_labels_of_yes_and_no(save, flat):
    made = arrays()
    for split in COUNTS:
        yes = made[f"{split}_labels"] > 0
        made[f"{split}_labels"] = yes[:, 0] if flat else yes
    dataset = load(save(made), 0)
    assert dataset.classes == ("0", "1")
    np.testing.assert_array_equal(dataset.labels[:6], [0, 1, 1, 0, 1, 1])


def test_classes_keep_the_order_of_their_numbers(save):
    made = arrays() | {"train_images": np.zeros((12, 16, 16), np.uint8), "train_labels": np.arange(12)[:, None]}
    assert load(save(made), 0).classes == tuple(str(i) for i in range(12))


def test_class_names(save):
    dataset = load(save(arrays(), labels=("normal", "benign", "malignant")), 0)
    assert dataset.classes == ("normal", "benign", "malignant")
    assert dataset.labels[:4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("labels", [(), ("mass", "calc", "cyst")])
def test_multilabel(save, tmp_path, labels):
    made = arrays(columns=3)
    dataset = load(save(made, labels=labels), 0)
    assert dataset.multilabel
    assert dataset.classes == (labels or ("0", "1", "2"))
    assert dataset.labels.dtype == np.float32
    np.testing.assert_array_equal(dataset.labels, np.concatenate([made[f"{split}_labels"] for split in COUNTS]))
    write_table(dataset, tmp_path / "split.csv")
    assert same(dataset, load(save(made, labels=labels), 1, dataset.classes, table=tmp_path / "split.csv"))


def test_grey_stored_as_colour_is_grey_and_large_images_are_reduced(save):
    made = {key: np.stack([value] * 3, -1) if "images" in key else value for key, value in arrays().items()}
    image = load(save(made, image_size=4), 0).images[0]
    assert image.mode == "L"
    assert image.size == (8, 8)


def test_train_alone_is_split_by_group(save):
    made = arrays()
    groups = np.array([f"p{i // 2}" for i in range(12)])
    one = {"train_images": made["train_images"], "train_labels": made["train_labels"] % 2, "train_groups": groups}
    dataset = load(save(one), 0)
    assert dataset.groups == tuple(groups)
    parts = {split: {dataset.groups[i] for i in dataset.indices(split)} for split in COUNTS}
    assert sum(map(len, parts.values())) == 6
    assert all(parts.values())
    assert any(load(save(one), seed).splits != dataset.splits for seed in (1, 2, 3))


def test_train_and_test_alone(save):
    made = {key: value for key, value in arrays().items() if not key.startswith("val")}
    dataset = load(save(made), 0)
    assert [split == "test" for split in dataset.splits] == [name.startswith("test") for name in dataset.names]
    assert "val" in dataset.splits


def test_a_group_in_two_splits(save):
    made = arrays() | {"train_groups": np.arange(12), "test_groups": np.arange(5, 12)}
    with pytest.raises(InputError, match=r"Group '5' is in two splits: train/5 in train and test/0 in test"):
        load(save(made), 0)


def test_the_table_of_a_run_decides(save, tmp_path):
    config = save(arrays(), labels=("normal", "benign", "malignant"))
    dataset = load(config, 0)
    write_table(dataset, tmp_path / "split.csv")
    assert same(dataset, load(config, 9, dataset.classes, table=tmp_path / "split.csv"))
    lines = (tmp_path / "split.csv").read_text().splitlines()
    (tmp_path / "split.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    turned = load(config, 9, dataset.classes, table=tmp_path / "split.csv")
    assert turned.names == dataset.names[::-1]
    np.testing.assert_array_equal(turned.labels, dataset.labels[::-1])
    for left, right in zip(turned.images, reversed(dataset.images), strict=True):
        np.testing.assert_array_equal(left, right)
    made = arrays() | {"test_images": np.zeros((6, 16, 16), np.uint8), "test_labels": np.arange(6) % 3}
    with pytest.raises(InputError, match=r"1 of 24 examples are not in .*scans\.npz:\n  row 2: test/6\n"):
        load(save(made), 9, dataset.classes, table=tmp_path / "split.csv")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_same_images_in_a_folder(save, config, folder, tmp_path, knobs, workers):
    made = arrays(colour=True)
    rows = ["path,label,split"]
    for split, count in COUNTS.items():
        (folder / split).mkdir()
        for i in range(count):
            Image.fromarray(made[f"{split}_images"][i]).save(folder / split / f"{i}.png")
            rows.append(f"{split}/{i}.png,{i % 3},{split}")
    (folder / "labels.csv").write_text("\n".join(rows))
    config.table = "labels.csv"
    augment = knobs(crop=0.5, flip=0.5, rotate=10.0, gain=0.2, contrast=0.2)
    options = {"batch_size": 5, "image_size": 8, "fit": "squash", "augment": augment, "seed": 3}
    dataset = load(save(made, table=""), 0)
    dataset.images.check()
    fresh = dataclasses.replace(dataset, images=pickle.loads(pickle.dumps(dataset.images)))
    batches = train_batches(fresh, workers=workers, **options)
    for left, right in zip(itertools.islice(train_batches(load(config, 0), **options), 6), batches, strict=False):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    assert batches.get_state() == {"next_batch": 6}
    batches.close()


def test_only_what_is_needed_is_read(save):
    dataset = load(save(arrays()), 0)
    assert dataset.images._arrays == {}
    assert dataset.images[-1].size == (16, 16)
    assert set(dataset.images._arrays) == {"test"}
    dataset.images.check()
    assert set(dataset.images._arrays) == set(COUNTS)
    assert len(pickle.dumps(dataset.images)) < 2000  # 24 images are 6144 bytes


def plus(**changes):
    return lambda made: made | changes


def less(*keys):
    return lambda made: {key: value for key, value in made.items() if key not in keys}


LABELS = np.arange(12)[:, None] % 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (less("train_images", "train_labels"), r"no array train_images; it has test_images, .*val_labels\."),
        (less("train_images"), "no array train_images; it has test_images"),
        (less("val_labels"), "no array val_labels"),
        (less("val_images"), "no array val_images"),
        (less("val_images", "val_labels", "test_images", "test_labels", "train_labels"), "no array train_labels"),
        (less("test_images", "test_labels"), "test split is empty"),
        (plus(train_images=np.zeros((12, 16, 16))), r"train_images is float64 \(12, 16, 16\); uint8"),
        (plus(train_images=np.zeros((12, 16, 16, 16), np.uint8)), r"train_images is uint8 \(12, 16, 16, 16\); uint8"),
        (plus(train_images=np.zeros((12, 256), np.uint8)), r"train_images is uint8 \(12, 256\)"),
        (plus(train_images=np.zeros((0, 16, 16), np.uint8)), r"train_images is uint8 \(0, 16, 16\)"),
        (plus(train_images=np.zeros((12, 16, 16), object)), "train_images holds pickled objects"),
        (plus(notes=np.array([None])), "notes holds pickled objects"),
        (plus(train_labels=LABELS[:9]), "train_labels has 9 rows for 12 images"),
        (plus(train_labels=LABELS.astype(float)), r"train_labels is float64 \(12, 1\); integers"),
        (plus(train_labels=LABELS.astype(str)), r"train_labels is <U\d+ \(12, 1\); integers"),
        (plus(train_labels=np.zeros((12, 0), int)), r"train_labels is int64 \(12, 0\)"),
        (plus(train_labels=np.zeros((12, 1, 1), int)), r"train_labels is int64 \(12, 1, 1\)"),
        (plus(train_labels=np.array(1)), r"train_labels is int64 \(\)"),
        (plus(val_labels=LABELS[:5] - 1), "val_labels is -1 in row 0; it must be 0 or more"),
        (plus(val_labels=LABELS[:5] + 10**12), "there are classes up to 1000000000002 and 24 images"),
        (plus(val_labels=LABELS[:5] + 3), "Class '3' has no example in train"),
        (
            plus(train_labels=np.zeros((12, 3), int)),
            r"labels of train, val, test have shapes \(12, 3\), \(5,\), \(7,\)",
        ),
        (plus(train_labels=np.hstack([LABELS, LABELS])), "train_labels is 2 in row 2; it must be 0 or 1"),
        (plus(train_labels=0 * LABELS, val_labels=0 * LABELS[:5], test_labels=0 * LABELS[:7]), "only one class, '0'"),
        (plus(train_groups=np.arange(11)), r"train_groups is int64 \(11,\); integers or strings \(12,\)"),
        (plus(train_groups=np.arange(12.0)), r"train_groups is float64 \(12,\)"),
    ],
)
def test_arrays_that_do_not_fit(save, change, message):
    with pytest.raises(InputError, match=message) as error:
        load(save(change(arrays())), 0)
    assert "scans.npz" in str(error.value) or "split is empty" in message or "lass" in message


@pytest.mark.parametrize(
    ("columns", "labels"), [(1, ("a", "b")), (1, ("a", "b", "b")), (1, ("a", " ", "c")), (3, ("a", "b", "c", "d"))]
)
def test_class_names_that_do_not_fit(save, columns, labels):
    with pytest.raises(InputError, match=r"data\.labels = a, .*scans\.npz has 3 classes; give each a name"):
        load(save(arrays(columns), labels=labels), 0)


def test_label_columns_that_a_table_cannot_have(save):
    with pytest.raises(InputError, match=r"data\.labels: 'path' cannot be a label column"):
        load(save(arrays(3), labels=("a", "path", "c")), 0)


def test_files_that_are_none(save, tmp_path):
    config = save(arrays())
    for contents in (b"", b"no zip file", pickle.dumps(arrays()), (tmp_path / "scans.npz").read_bytes()[:-200]):
        (tmp_path / "scans.npz").write_bytes(contents)
        with pytest.raises(InputError, match=r"scans\.npz: damaged, or not an \.npz file"):
            load(config, 0)
    (tmp_path / "scans.npz").unlink()
    with pytest.raises(InputError, match=r"data\.path: there is no file .*scans\.npz"):
        load(config, 0)
    config.path = ""
    with pytest.raises(InputError, match=r"data\.path is empty; set it to an \.npz file"):
        load(config, 0)


def test_damaged_values_are_found_by_the_check(save, tmp_path):
    config = save(arrays() | {"train_images": np.random.default_rng(0).integers(0, 256, (12, 64, 64), np.uint8)})
    contents = bytearray((tmp_path / "scans.npz").read_bytes())
    contents[20000] ^= 255  # among the values of train_images, which come first
    (tmp_path / "scans.npz").write_bytes(contents)
    dataset = load(config, 0)
    with pytest.raises(InputError, match=r"scans\.npz: train_images cannot be read, the file is damaged"):
        dataset.images.check()
