import dataclasses
import io
import itertools
import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vitft_jax.data import tfds_source
from vitft_jax.data.batches import train_batches
from vitft_jax.data.images import decode
from vitft_jax.data.sources import load
from vitft_jax.data.tables import write_table
from vitft_jax.errors import InputError

AUGMENT = {"crop": 0.5, "flip": 0.5, "rotate": 10.0, "gain": 0.2, "contrast": 0.2}
CLASSES = ("solid", "cyst")  # not in alphabetical order: TFDS has its own
FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 1)),
    "label": tfds.features.ClassLabel(names=CLASSES),
    "group": tfds.features.Text(),
    "name": tfds.features.Text(),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"reached for the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def png(number):
    values = np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def scans(count=24):
    """Examples of two images a group, 10 cysts first."""
    return [
        {"image": png(i), "label": "cyst" if i < 10 else "solid", "group": f"g{i // 2}", "name": f"scan {i}"}
        for i in range(count)
    ]


def without(key, examples):
    return [{k: v for k, v in example.items() if k != key} for example in examples]


def build(root, splits, features=FEATURES, **info):
    """Prepares a dataset and returns its directory; `splits` gives the examples of each split."""
    used = {key for examples in splits.values() for example in examples for key in example}

    class Scans(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kept = tfds.features.FeaturesDict({key: value for key, value in features.items() if key in used})
            return tfds.core.DatasetInfo(builder=self, features=kept, **info)

        def _split_generators(self, dl_manager):
            return {name: enumerate(examples) for name, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Scans(data_dir=root)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


class VitftTinyScan(tfds.core.GeneratorBasedBuilder):
    """A dataset that TFDS knows by name; `fault` is raised after ten examples."""

    VERSION = tfds.core.Version("1.0.0")
    fault: Exception | None = None
    prepared = 0

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        type(self).prepared += 1
        for number, example in enumerate(scans()):
            if number == 10 and self.fault:
                raise self.fault
            yield number, example


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tfds"), {"train": scans()})


@pytest.fixture
def prepared(original, tmp_path):
    """A copy of one prepared dataset, which a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "scans" / "1.0.0"))


@pytest.fixture
def of(config):
    """The `data` group for a directory, changed."""

    def make(path, **changes):
        changed = config.copy_and_resolve_references()
        changed.update({"source": "tfds", "path": str(path)} | changes)
        return changed

    return make


@pytest.fixture
def by_name(of, tmp_path, monkeypatch):
    """The `data` group for a dataset by name in an empty data_dir."""
    monkeypatch.setattr(VitftTinyScan, "prepared", 0)
    (tmp_path / "data").mkdir()
    return lambda name, **changes: of(tmp_path / "data", name=name, **changes)


def same(first, second):
    for field in ("classes", "multilabel", "names", "groups", "splits"):
        assert getattr(first, field) == getattr(second, field), field
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.labels.dtype == second.labels.dtype
    for left, right in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(left, right)
    return True


def test_a_prepared_dataset_is_read_whole_and_split_by_group(original, of):
    dataset = load(of(original), 0)
    assert dataset.classes == CLASSES
    assert dataset.labels.dtype == np.int32
    found = {
        name: (dataset.classes[label], group)
        for name, label, group in zip(dataset.names, dataset.labels, dataset.groups, strict=True)
    }
    assert found == {example["name"]: (example["label"], example["group"]) for example in scans()}
    for name, image in zip(dataset.names, dataset.images, strict=True):
        np.testing.assert_array_equal(image, decode(png(int(name.split()[1]))))
    parts = {split: {dataset.groups[i] for i in dataset.indices(split)} for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 12
    assert all(parts.values())
    assert same(dataset, load(of(original), 0))
    assert any(load(of(original), seed).splits != dataset.splits for seed in (1, 2, 3))


def test_without_names_and_groups(of, tmp_path):
    examples = without("group", without("name", scans()))
    dataset = load(of(build(tmp_path, {"train": examples[:20], "test": examples[20:]})), 0)
    assert dataset.names == (*(f"train/{i}" for i in range(20)), *(f"test/{i}" for i in range(4)))
    assert dataset.groups == dataset.names


ENCODINGS = {
    "PNG": Image.fromarray,
    "TIFF": lambda values: Image.fromarray(values.astype(np.uint16) << 4),
    "JPEG": lambda values: Image.fromarray(np.stack([values, values.T, 255 - values, values // 2], -1), mode="CMYK"),
    "BMP": lambda values: Image.fromarray(np.stack([values] * 3, -1)),
    "GIF": lambda values: Image.fromarray(values).convert("P"),
    "WEBP": lambda values: Image.fromarray(np.dstack([values, values.T, values, values])),
}


@pytest.fixture
def twins(folder, config, tmp_path):
    """The same files in a folder and in TFDS, and the config of each; of every kind that a folder may hold."""
    files, kinds = sorted(path for path in folder.rglob("*.*")), itertools.cycle(ENCODINGS)
    for path, kind in zip(files, kinds, strict=False):
        ENCODINGS[kind](np.asarray(Image.open(path))).save(path, kind)
    examples = [
        {"image": path.read_bytes(), "label": path.parent.name, "name": path.relative_to(folder).as_posix()}
        for path in files
    ]
    other = config.copy_and_resolve_references()
    other.update({"source": "tfds", "path": str(build(tmp_path, {"train": examples}))})
    return config, other


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_same_files_in_a_folder(twins, knobs, tmp_path, workers):
    first = load(twins[0], 0)
    write_table(first, tmp_path / "split.csv")
    second = load(twins[1], 1, classes=first.classes, table=tmp_path / "split.csv")
    assert same(first, second)
    options = {"batch_size": 5, "image_size": 8, "fit": "squash", "augment": knobs(**AUGMENT), "seed": 3}
    fresh = dataclasses.replace(second, images=pickle.loads(pickle.dumps(second.images)))
    batches = train_batches(fresh, workers=workers, **options)
    for left, right in zip(itertools.islice(train_batches(first, **options), 6), batches, strict=False):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    assert batches.get_state() == {"next_batch": 6}
    batches.close()


def test_the_table_of_a_run_decides(original, of, tmp_path):
    dataset = load(of(original), 0)
    write_table(dataset, tmp_path / "split.csv")
    assert same(dataset, load(of(original), 9, classes=dataset.classes, table=tmp_path / "split.csv"))
    lines = (tmp_path / "split.csv").read_text().splitlines()
    (tmp_path / "split.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    turned = load(of(original), 9, classes=dataset.classes, table=tmp_path / "split.csv")
    assert turned.names == dataset.names[::-1]
    assert turned.splits == dataset.splits[::-1]
    np.testing.assert_array_equal(turned.labels, dataset.labels[::-1])
    for left, right in zip(turned.images, reversed(dataset.images), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_table_of_another_dataset(original, of, tmp_path):
    write_table(load(of(original), 0), tmp_path / "split.csv")
    other = build(tmp_path, {"train": scans()[:20]})
    with pytest.raises(InputError, match=r"split\.csv: 4 of 24 examples are not in .*1\.0\.0:\n  row \d+: scan 2\d\n"):
        load(of(other), 0, classes=CLASSES, table=tmp_path / "split.csv")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "validation", "test"), {"train": "train", "validation": "val", "test": "test"}),
        (("train", "val", "test", "extra"), {"train": "train", "val": "val", "test": "test"}),
        (("train", "test"), None),  # val comes from train
        (("train", "validation"), None),
        (("left", "right"), None),
    ],
)
def test_splits(of, tmp_path, names, expected):
    examples = without("name", scans())
    parts = {name: examples[i :: len(names)] for i, name in enumerate(names)}
    for name, part in parts.items():
        parts[name] = [example | {"group": f"{name}{i // 2}"} for i, example in enumerate(part)]
    dataset = load(of(build(tmp_path, parts)), 0)
    origins = [name.split("/")[0] for name in dataset.names]
    if expected:
        assert [expected[origin] for origin in origins] == list(dataset.splits)
        assert set(origins) == set(expected)
    elif names == ("train", "test"):
        assert [split == "test" for split in dataset.splits] == [origin == "test" for origin in origins]
        assert "val" in dataset.splits
    else:
        assert len(dataset) == 24
        for split in ("train", "val", "test"):
            assert len({dataset.groups[i] for i in dataset.indices(split)}) > 1


BINARY = {"mass": tfds.features.Scalar(np.uint8), "calc": tfds.features.Scalar(np.bool_)}


def binary(mass=lambda i: i % 2):
    return [example | {"mass": mass(i), "calc": i % 3 == 0} for i, example in enumerate(scans())]


def test_multilabel(of, tmp_path):
    config = of(build(tmp_path, {"train": binary()}, FEATURES | BINARY), labels=("calc", "mass"))
    dataset = load(config, 0)
    assert dataset.multilabel
    assert dataset.classes == ("calc", "mass")
    assert dataset.labels.dtype == np.float32
    numbers = [int(name.split()[1]) for name in dataset.names]
    np.testing.assert_array_equal(dataset.labels, [[i % 3 == 0, i % 2] for i in numbers])
    write_table(dataset, tmp_path / "split.csv")
    assert same(dataset, load(config, 1, dataset.classes, table=tmp_path / "split.csv"))


def test_groups_may_be_numbers_and_other_kinds_of_group_and_name_mean_nothing(of, tmp_path):
    numbered = [example | {"group": i // 2} for i, example in enumerate(scans())]
    dataset = load(of(build(tmp_path / "a", {"train": numbered}, FEATURES | {"group": np.int64})), 0)
    assert dict(zip(dataset.names, dataset.groups, strict=True)) == {f"scan {i}": str(i // 2) for i in range(24)}
    features = {
        "group": tfds.features.Tensor(shape=(2,), dtype=np.int64),
        "name": tfds.features.ClassLabel(num_classes=9),
    }
    other = [example | {"group": np.zeros(2, np.int64), "name": 1} for example in scans()]
    path = build(tmp_path / "b", {"train": other}, FEATURES | features, supervised_keys=("image", "label"))
    dataset = load(of(path), 0)
    assert dataset.names == dataset.groups == tuple(f"train/{i}" for i in range(24))


def test_one_of_several_class_labels_and_images(of, tmp_path):
    features = FEATURES | {"view": tfds.features.ClassLabel(num_classes=3), "mask": tfds.features.Image()}
    examples = [example | {"view": i % 3, "mask": png(100 + i)} for i, example in enumerate(scans())]
    path = build(tmp_path, {"train": examples}, features, supervised_keys=("image", "label"))
    assert load(of(path), 0).classes == CLASSES
    dataset = load(of(path, labels=("view",)), 0)
    assert dataset.classes == ("0", "1", "2")
    assert not dataset.multilabel
    assert [int(name.split()[1]) % 3 for name in dataset.names] == dataset.labels.tolist()
    np.testing.assert_array_equal(dataset.images[0], decode(png(int(dataset.names[0].split()[1]))))
    path = build(tmp_path / "unsupervised", {"train": examples}, features)
    with pytest.raises(InputError, match=r"image \(Image\).*mask \(Image\).*; one Image is needed"):
        load(of(path), 0)


@pytest.mark.parametrize(
    ("drop", "labels", "message"),
    [
        ("image", (), r"has the features .*label \(ClassLabel\).*; one Image is needed"),
        ("label", (), r"has the features .*mass \(Scalar\).*; set data\.labels to one ClassLabel"),
        ("", ("mas",), "has no feature 'mas'; did you mean 'mass'"),
        ("", ("mass", "name"), "'name' is no scalar that can be 0 or 1"),
        ("", ("mass", "image"), "'image' is no scalar that can be 0 or 1"),
        ("", ("mass", "mass"), "'mass' cannot be a label column"),
        ("", ("mass", "group"), "'group' cannot be a label column"),
    ],
)
def test_features_that_do_not_fit(of, tmp_path, drop, labels, message):
    path = build(tmp_path, {"train": without(drop, binary())}, FEATURES | BINARY)
    with pytest.raises(InputError, match=message):
        load(of(path, labels=labels), 0)


def test_float_images_are_refused(of, tmp_path):
    path = build(tmp_path, {"train": scans()})
    edit("features.json", '"dtype": "uint8"', '"dtype": "float32"')(path)  # TFDS needs TensorFlow to write such
    with pytest.raises(InputError, match="'image' is of float32"):
        load(of(path), 0)


def test_values_that_do_not_fit(of, tmp_path):
    unknown = [example | {"label": -1 if i == 3 else 0} for i, example in enumerate(scans())]
    with pytest.raises(InputError, match=r"scan 3 \(train/\d+\): its label is -1"):
        load(of(build(tmp_path / "a", {"train": unknown})), 0)
    path = build(tmp_path / "b", {"train": binary(lambda i: 2 if i == 5 else 0)}, FEATURES | BINARY)
    with pytest.raises(InputError, match=r"scan 5 \(train/\d+\): mass is 2; .* 0 or 1"):
        load(of(path, labels=("mass", "calc")), 0)
    twice = [example | {"name": "x"} if i in (3, 5) else example for i, example in enumerate(scans())]
    with pytest.raises(InputError, match=r"example \d+ of train: its name 'x' is that of example \d+ of train too"):
        load(of(build(tmp_path / "c", {"train": twice})), 0)


def test_an_image_that_is_none_is_found_by_the_check(of, tmp_path):
    examples = scans()
    examples[7]["image"] = b"no image"
    dataset = load(of(build(tmp_path, {"train": examples})), 0)  # labels are read without decoding
    with pytest.raises(InputError, match=r"1 of 24 images in .*\n.*scan 7 \(train/\d+\): not an image"):
        dataset.images.check()


def shard(path):
    return next(path.glob("*.array_record*"))


def edit(name, old, new):
    def damage(path):
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new))

    return damage


def flip(path):
    contents = bytearray(shard(path).read_bytes())
    contents[1500] ^= 255  # within a record
    shard(path).write_bytes(contents)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shard(path).unlink(), r"array_record-00000-of-00001: missing or damaged"),
        (lambda path: shard(path).write_bytes(b""), r"array_record-00000-of-00001: missing or damaged"),
        (lambda path: shard(path).write_bytes(shard(path).read_bytes()[:-5000]), "missing or damaged"),
        (flip, r"1\.0\.0, example \d+ of train cannot be read"),
        (edit("dataset_info.json", '"24"', '"30"'), "has 24 examples and should have 30"),
        (edit("dataset_info.json", '"24"', '"20"'), "has 24 examples and should have 20"),
        (edit("dataset_info.json", '"24"', '"0"'), "holds no examples"),
        (edit("dataset_info.json", '"shardLengths"', ""), r"1\.0\.0 is no whole TFDS dataset"),
        (lambda path: (path / "dataset_info.json").write_text(""), r"1\.0\.0 is no whole TFDS dataset"),
        (lambda path: (path / "dataset_info.json").unlink(), r"1\.0\.0 holds no dataset_info\.json"),
        (lambda path: (path / "features.json").write_text("{"), r"1\.0\.0 is no whole TFDS dataset"),
        (lambda path: (path / "features.json").unlink(), r"1\.0\.0 is no whole TFDS dataset"),
        (
            edit("dataset_info.json", '"array_record"', '"tfrecord"'),
            r"prepared as tfrecord, which cannot .* tfds convert_format --dataset_version_dir=.*1\.0\.0 .*array_record",
        ),
    ],
)
def test_damaged_directories(prepared, of, damage, message):
    load(of(prepared), 0)
    damage(prepared)
    with pytest.raises(InputError, match=message):
        load(of(prepared), 0)


def test_array_record_beside_another_format(prepared, of):
    expected = load(of(prepared), 0)
    beside = '"tfrecord", "alternativeFileFormats": ["array_record"]'
    edit("dataset_info.json", '"array_record"', beside)(prepared)
    assert same(load(of(prepared), 0), expected)


def test_files_that_are_damaged_after_loading_are_named(prepared, of):
    dataset = load(of(prepared), 0)
    shard(prepared).write_bytes(b"")
    with pytest.raises(InputError, match=r"Cannot read image scan \d+ \(train/3\)"):
        dataset.images[3]


def test_a_dataset_by_name_is_prepared_once(by_name, capsys):
    first = load(by_name("vitft_tiny_scan"), 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("preparing vitft_tiny_scan/1.0.0 in ")
    assert captured.err.count("\n") == 1
    assert VitftTinyScan.prepared == 1
    for name in ("vitft_tiny_scan", "vitft_tiny_scan:1.0.0"):
        assert same(load(by_name(name), 0), first)
    assert capsys.readouterr() == ("", "")
    assert VitftTinyScan.prepared == 1


def test_a_prepared_dataset_by_name_needs_no_code(prepared, of):
    expected = load(of(prepared), 0)
    for name in ("scans", "scans:1.0.0"):
        assert same(load(of(prepared.parents[1], name=name), 0), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1", "there is no dataset 'cifar1'; did you mean 'cifar10'"),
        ("vitft_tiny_scam", "there is no dataset 'vitft_tiny_scam'; did you mean 'vitft_tiny_scan'"),
        ("zzzzzzzz", "there is no dataset 'zzzzzzzz'; Nothing of that name .* must be imported"),
        ("scans:9.0.0", r"there is no dataset 'scans:9\.0\.0'; .* has scans/1\.0\.0"),
        ("scans/large", r"there is no dataset 'scans/large'; .* has scans/1\.0\.0"),
        ("vitft_tiny_scan:9.0.0", r"data\.name = 'vitft_tiny_scan:9\.0\.0' in .*cannot be loaded at version 9"),
        ("two words", "data.name = 'two words' in .*Parsing"),
        ("kaggle:scans", "data.name = 'kaggle:scans' in .*community"),
    ],
)
def test_names_that_are_not_there(prepared, of, name, message):
    with pytest.raises(InputError, match=message):
        load(of(prepared.parents[1], name=name), 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            ConnectionError("no route to host"),
            r"could not be prepared: ConnectionError: no route.*If it needs a download",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), "preparing it needs the package x; install it"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing_behind(by_name, monkeypatch, fault, message):
    config = by_name("vitft_tiny_scan")
    monkeypatch.setattr(VitftTinyScan, "fault", fault)
    with pytest.raises(InputError, match=message):
        load(config, 0)
    assert not list(Path(config.path).rglob("*.json"))
    monkeypatch.setattr(VitftTinyScan, "fault", None)
    assert len(load(config, 0)) == 24


def test_half_prepared_datasets_by_name(by_name):
    config = by_name("vitft_tiny_scan")
    load(config, 0)
    info = Path(config.path) / "vitft_tiny_scan" / "1.0.0" / "dataset_info.json"
    for contents, message in ((b"{", "Failed to load JSON.*delete a damaged copy"), (None, "is not whole; delete it")):
        info.write_bytes(contents) if contents else info.unlink()
        with pytest.raises(InputError, match=message):
            load(config, 0)


def test_keys_that_do_not_go_together(prepared, of):
    with pytest.raises(InputError, match=r"is one prepared dataset; leave out data\.name='x'"):
        load(of(prepared, name="x"), 0)
    with pytest.raises(InputError, match=r"data\.table = 't\.csv': data\.source='tfds' has no use for it, only folder"):
        load(of(prepared, name="", table="t.csv"), 0)
    with pytest.raises(
        InputError, match=r"data\.name = 'x': data\.source='npz' has no use for it, only tfds and phantom"
    ):
        load(of(prepared, name="x", table="", source="npz"), 0)
    with pytest.raises(InputError, match=r"data\.name and data\.path are empty"):
        load(of("", name="", source="tfds"), 0)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        load(of(prepared / "nowhere"), 0)


def test_builders_can_be_given(tmp_path, of):
    """What a source that generates its dataset needs."""
    path = build(tmp_path, {"train": scans()})
    builder = tfds.builder_from_directory(path)
    examples, images, classes = tfds_source.from_builder(builder, of("elsewhere"))
    assert classes == CLASSES
    assert examples.splits is None
    assert len(images) == len(examples.names) == 24


def test_no_tensorflow_no_noise_and_no_tfds_for_folders(original, folder):
    script = """
import json, sys
from ml_collections import ConfigDict
from vitft_jax.data.sources import load
tfds, folder = (ConfigDict(group) for group in json.loads(sys.argv[1]))
load(folder, 0).images.check()
assert "tensorflow_datasets" not in sys.modules
load(tfds, 0).images.check()
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
    group = {"table": "", "labels": (), "name": "", "val_fraction": 0.2, "test_fraction": 0.2, "image_size": 16}
    groups = [{"source": "tfds", "path": str(original)} | group, {"source": "folder", "path": str(folder)} | group]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(groups)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
