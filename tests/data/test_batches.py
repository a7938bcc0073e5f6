import dataclasses
import functools
import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from vitft_jax.data.augment import augment
from vitft_jax.data.batches import eval_batches, steps_per_epoch, train_batches
from vitft_jax.data.images import ImageFiles, resize
from vitft_jax.data.sources import load
from vitft_jax.errors import InputError, MachineError

ALL = {"crop": 0.5, "flip": 0.5, "rotate": 10.0, "gain": 0.2, "contrast": 0.2, "speckle": 0.3, "tgc": 0.3}
MIXED = ALL | {"mixup": 0.8, "cutmix": 1.0}
SHAPE = {"image_size": 8, "fit": "squash"}


@pytest.fixture
def dataset(config):
    return load(config, 0)  # 14 or 15 train examples of 24


@pytest.fixture
def train(dataset, knobs):
    def make(batch_size=4, seed=0, on=ALL, **options):
        return train_batches(dataset, batch_size=batch_size, seed=seed, augment=knobs(**on), **SHAPE, **options)

    return make


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(first, second):
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
            assert left[key].dtype == right[key].dtype
    return True


def joined(parts):
    """Puts the batches of several processes together, in the order of the processes."""
    return [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


def test_train_batch(train, dataset):
    batch = next(train(on={}))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert [batch[key].dtype for key in ("image", "label", "index")] == [np.uint8, np.int32, np.int32]
    for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
        assert dataset.splits[index] == "train"
        assert label == dataset.labels[index]
        np.testing.assert_array_equal(image, resize(dataset.images[int(index)], 8, "squash"))


def test_without_mixing_a_batch_is_its_augmented_examples(train, dataset, knobs):
    """As before there was mixing: shuffled by the seed, drawn for by the place in the order, then batched."""

    def example(index, rng):
        image = augment(dataset.images[index], rng, knobs(**ALL), 8, "squash")
        return {"image": image, "label": dataset.labels[index], "index": np.int32(index)}

    source = grain.MapDataset.source(dataset.indices("train")).seed(5)
    expected = source.shuffle().repeat(3).random_map(example).batch(4)
    assert same([expected[i] for i in range(8)], take(train(seed=5), 8))


@pytest.mark.parametrize("on", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixing_changes_images_and_labels_only(train, dataset, on):
    """Neither the order nor the augmentation: so the mixed images are made of the very images of the plain batch."""
    for plain, mixed in zip(take(train(), 6), take(train(on=ALL | on), 6), strict=True):
        np.testing.assert_array_equal(mixed["index"], plain["index"])
        pairs = [batch["image"].astype(int).reshape(2, 2, 8, 8, 3).sum(1) for batch in (plain, mixed)]
        np.testing.assert_array_equal(*pairs)
        own = np.eye(2)[plain["label"]]
        assert mixed["label"].dtype == np.float32
        np.testing.assert_allclose(mixed["label"].reshape(2, 2, 2).sum(1), own.reshape(2, 2, 2).sum(1), atol=1e-6)


def test_multilabel_batch_mixes_to_fractions(table, config, knobs):
    table("path,a,b", [f"{'cyst' if i < 10 else 'solid'}/{i:02}.png,{i % 2},1" for i in range(24)])
    config.labels = ("a", "b")
    batches = train_batches(load(config, 0), batch_size=4, augment=knobs(mixup=50.0), seed=0, **SHAPE)
    labels = np.concatenate([batch["label"] for batch in take(batches, 10)])
    assert labels.dtype == np.float32
    np.testing.assert_allclose(labels[:, 1], 1, atol=1e-6)  # all examples have b
    assert ((labels[:, 0] > 0.1) & (labels[:, 0] < 0.9)).any()


def test_evaluation_batches_are_never_mixed(dataset):
    batch = next(eval_batches(dataset, "train", batch_size=4, **SHAPE))
    np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
    assert batch["label"].dtype == np.int32


def test_multilabel_batch(table, config, knobs):
    table("path,a,b", [f"{'cyst' if i < 10 else 'solid'}/{i:02}.png,{i % 2},1" for i in range(24)])
    config.labels = ("a", "b")
    dataset = load(config, 0)
    batch = next(train_batches(dataset, batch_size=3, augment=knobs(), seed=0, **SHAPE))
    assert batch["label"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
    assert next(eval_batches(dataset, "val", batch_size=50, **SHAPE))["label"].shape == (50, 2)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_epochs_cover_each_example_once_and_differ(train, dataset, batch_size):
    expected = dataset.indices("train")
    n = len(expected)
    seen = np.concatenate([batch["index"] for batch in take(train(batch_size), -(-3 * n // batch_size))])
    epochs = [seen[k * n : (k + 1) * n] for k in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), expected)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], expected)


def test_the_seed_decides_order_and_augmentation(train):
    first = take(train(seed=3), 2)
    assert same(first, take(train(seed=3), 2))
    assert not np.array_equal(first[0]["index"], next(train(seed=4))["index"])


def test_an_example_is_augmented_anew_each_epoch(train, dataset):
    n = len(dataset.indices("train"))
    batch = take(train(2 * n), 1)[0]
    twice = [batch["image"][batch["index"] == index] for index in dataset.indices("train")]
    assert all(len(images) == 2 for images in twice)
    assert not any(np.array_equal(*images) for images in twice)


@pytest.mark.parametrize("on", [ALL, MIXED])
@pytest.mark.parametrize("count", [0, 3, 5])
def test_state_resumes_to_the_bit(train, count, on):
    batches = train(on=on)
    take(batches, count)
    state = json.loads(json.dumps(batches.get_state()))
    ahead = take(batches, 3)
    fresh = train(on=on)
    fresh.set_state(state)
    assert same(ahead, take(fresh, 3))
    batches.set_state(state)
    assert same(ahead, take(batches, 3))
    assert fresh.get_state() == batches.get_state()


@pytest.mark.parametrize("on", [ALL, MIXED])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batch_of_one(train, process_count, on):
    parts = [take(train(8, on=on, process_index=p, process_count=process_count), 6) for p in range(process_count)]
    assert parts[0][0]["image"].shape[0] == 8 // process_count
    assert same(joined(parts), take(train(8, on=on), 6))


@pytest.mark.parametrize("threads", [1, 7])
def test_the_number_of_threads_does_not_matter(train, monkeypatch, threads):
    expected = take(train(on=MIXED), 8)
    monkeypatch.setattr("vitft_jax.data.batches._THREADS", threads)
    assert same(expected, take(train(on=MIXED), 8))


def test_worker_processes_give_the_same_batches_and_errors(train, dataset, folder):
    train = functools.partial(train, on=MIXED)
    here = take(train(), 4)  # from now on this process has the images in memory, the workers will not
    earlier = {index for batch in here[:3] for index in batch["index"]}
    victim = dataset.names[next(index for index in here[3]["index"] if index not in earlier)]
    (folder / victim).write_bytes(b"no image")
    there = train(workers=2)
    try:
        assert same(here[:3], take(there, 3))
        with pytest.raises(InputError, match=victim):
            next(there)
    finally:
        there.close()
    fresh = train()
    fresh.set_state(there.get_state())  # a run may go on with another number of workers
    assert same(here[3:], take(fresh, 1))


def test_a_worker_that_is_killed_is_reported(train):
    batches = train(workers=1)
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(MachineError, match=r"a process that reads images died .*data\.workers=1"):
        take(batches, 10)  # some were read ahead
    batches.close()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux which processes there are")
def test_workers_end_with_their_parent_and_outlive_a_signal_to_both(config, knobs):
    program = """
import json, multiprocessing, os, sys
from ml_collections import ConfigDict
from vitft_jax.data import load, train_batches

config, augment = (ConfigDict(group) for group in json.loads(sys.argv[1]))
batches = train_batches(load(config, 0), batch_size=2, image_size=16, fit="squash", augment=augment, seed=0, workers=1)
next(batches)
reader = multiprocessing.active_children()[0]
os.kill(reader.pid, 15)
for _ in range(9):
    next(batches)
print(reader.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    groups = json.dumps([config.to_dict(), knobs().to_dict()])
    parent = subprocess.run([sys.executable, "-c", program, groups], stdout=subprocess.PIPE, text=True, check=False)
    assert parent.returncode == -9
    stat = Path(f"/proc/{int(parent.stdout)}/stat")
    for _ in range(100):
        if not stat.exists() or ") Z" in stat.read_text():
            return
        time.sleep(0.1)
    pytest.fail("it lives on")


@pytest.mark.parametrize("batch_size", [1, 3, 24])
def test_eval_has_each_example_once_in_order(dataset, batch_size):
    for split in ("train", "val"):
        batches = list(eval_batches(dataset, split, batch_size=batch_size, **SHAPE))
        assert {batch["image"].shape for batch in batches} == {(batch_size, 8, 8, 3)}
        whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        assert whole["mask"].dtype == np.float32
        assert whole["index"].dtype == np.int32
        n = len(dataset.indices(split))
        assert len(whole["mask"]) - n < batch_size
        np.testing.assert_array_equal(whole["mask"], np.arange(len(whole["mask"])) < n)
        np.testing.assert_array_equal(whole["index"][:n], dataset.indices(split))
        np.testing.assert_array_equal(whole["label"][:n], dataset.labels[dataset.indices(split)])
        for image, index in zip(whole["image"][:n], whole["index"], strict=False):
            np.testing.assert_array_equal(image, resize(dataset.images[int(index)], 8, "squash"))
        assert (whole["index"][n:] == -1).all()
        assert not whole["image"][n:].any()
        assert not whole["label"][n:].any()


@pytest.mark.parametrize("process_count", [2, 3])
def test_eval_over_processes(dataset, process_count):
    parts = [
        list(eval_batches(dataset, "train", batch_size=6, process_index=p, process_count=process_count, **SHAPE))
        for p in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1
    assert same(joined(parts), list(eval_batches(dataset, "train", batch_size=6, **SHAPE)))


def test_eval_can_be_closed_and_resumed(dataset):
    batches = eval_batches(dataset, "train", batch_size=4, **SHAPE)
    whole = list(batches)
    assert batches._reader is None  # threads and processes end with the data
    with pytest.raises(StopIteration):
        next(batches)
    batches.set_state({"next_batch": 1})
    assert same(whole[1:], list(batches))
    batches.set_state({"next_batch": len(whole)})
    assert list(batches) == []


def test_steps_per_epoch(dataset):
    n = len(dataset.indices("train"))
    assert [steps_per_epoch(dataset, size) for size in (1, n - 1, n, n + 1)] == [n, 2, 1, 1]


def test_image_damaged_after_the_check(dataset, folder):
    dataset.images.check()
    fresh = dataclasses.replace(dataset, images=ImageFiles(folder, dataset.names))
    victim = dataset.names[dataset.indices("val")[0]]
    (folder / victim).write_bytes(b"no image")
    list(eval_batches(dataset, "val", batch_size=2, **SHAPE))  # in memory already
    with pytest.raises(InputError, match=f"Cannot read image {victim}"):
        list(eval_batches(fresh, "val", batch_size=2, **SHAPE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"train\.batch_size = 0"),
        ({"batch_size": 4, "process_count": 3}, r"train\.batch_size = 4: .* multiple of .* 3"),
        ({"workers": -1}, r"data\.workers = -1"),
        ({"on": {"flip": 7.0}}, r"augment\.flip"),
        ({"batch_size": 5, "on": {"mixup": 0.2}}, r"train\.batch_size = 5: .* multiple of 2 "),
        ({"batch_size": 6, "on": {"cutmix": 1.0}, "process_count": 2}, r"train\.batch_size = 6: .* multiple of 4 "),
    ],
)
def test_bad_options(train, options, message):
    with pytest.raises(InputError, match=message):
        train(**options)


def test_bad_size_and_fit(dataset):
    with pytest.raises(InputError, match=r"data\.image_size = 0"):
        eval_batches(dataset, "val", batch_size=2, image_size=0, fit="crop")
    with pytest.raises(InputError, match=r"data\.fit = 'zoom'"):
        eval_batches(dataset, "val", batch_size=2, image_size=8, fit="zoom")
