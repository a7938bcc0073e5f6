"""Balanced sampling: every class equally often, every example in its turn, and the same from any place on."""

import itertools
import pickle

import numpy as np
import pytest

from vitft_jax.data.balance import Balanced
from vitft_jax.data.batches import train_batches
from vitft_jax.data.sources import Dataset, load


def made(labels, multilabel=False, classes=("a", "b", "c")):
    """A dataset of these labels, every seventh image of which is in another split."""
    names = tuple(f"{i}.png" for i in range(len(labels)))
    splits = tuple("val" if i % 7 == 6 else "train" for i in range(len(labels)))
    return Dataset(classes, multilabel, names, np.array(labels), names, splits, None)


LABELS = [0] * 70 + [1] * 14 + [2] * 7  # 60, 12 and 6 in train


def test_classes_come_equally_often_in_every_round_and_examples_in_turn():
    dataset, order = made(LABELS), Balanced(made(LABELS), 0)
    each = 26  # a third of 78
    for start in (0, 3 * each, 6 * each):
        drawn = np.array([order[i] for i in range(start, start + 3 * each)])
        np.testing.assert_array_equal(np.bincount(dataset.labels[drawn]), [each] * 3)
        assert {dataset.splits[i] for i in drawn} == {"train"}
    drawn = np.array([order[i] for i in range(6 * 3 * each)])
    for c, count in enumerate((60, 12, 6)):
        times = np.bincount(drawn, minlength=91)[(np.arange(91) % 7 < 6) & (dataset.labels == c)]
        assert len(times) == count
        assert times.max() - times.min() <= 1  # nobody comes again before all had their turn
        assert times.sum() == 6 * each


def test_the_order_is_mixed_anew_in_each_round_and_by_seed():
    dataset, each = made(LABELS), 26
    order = Balanced(dataset, 0)
    rounds = [[order[i] for i in range(start, start + 3 * each)] for start in (0, 3 * each)]
    assert rounds[0] != rounds[1]
    assert rounds[0] != [Balanced(dataset, 1)[i] for i in range(3 * each)]
    neighbours = dataset.labels[np.array(rounds)].reshape(-1, 2)  # as mixup pairs them
    assert 0.1 < (neighbours[:, 0] == neighbours[:, 1]).mean() < 0.6


def test_a_place_is_a_function_of_its_number():
    order = Balanced(made(LABELS), 0)
    forward = [order[i] for i in range(500)]
    again = pickle.loads(pickle.dumps(Balanced(made(LABELS), 0)))
    assert [again[i] for i in reversed(range(500))] == forward[::-1]


def test_labels_and_their_absence_come_equally_often():
    labels = np.zeros((98, 2))
    labels[:70, 0] = 1
    labels[65:75, 1] = 1  # the first five have both
    dataset = made(labels, True, ("a", "b"))
    order = Balanced(dataset, 0)
    drawn = labels[[order[i] for i in range(28 * 3 * 20)]]
    assert (drawn.sum(axis=1) == 0).mean() == pytest.approx(1 / 3)
    only_b = drawn[:, 1] * (1 - drawn[:, 0])
    assert only_b.mean() == pytest.approx(5 / 9 / 3, abs=0.01)  # five of the nine with b in train
    assert drawn[:, 1].mean() > 1 / 3  # some of those drawn for the first label have the second


def test_a_class_that_does_not_occur_is_left_out():
    order = Balanced(made([0] * 10 + [2] * 10), 0)
    assert {made([0] * 10 + [2] * 10).labels[order[i]] for i in range(100)} == {0, 2}


class TestBatches:
    @pytest.fixture
    def dataset(self, config):
        return load(config, 0)

    @pytest.fixture
    def batches(self, dataset, knobs):
        def make(balanced=True, **options):
            on = knobs(crop=0.5, flip=0.5, mixup=0.8)
            shape = {"batch_size": 4, "image_size": 8, "fit": "squash"}
            return train_batches(dataset, augment=on, balanced=balanced, **shape, **{"seed": 0, **options})

        return make

    def test_they_go_on_where_they_were(self, batches):
        whole = list(itertools.islice(batches(), 8))
        first = batches()
        for _ in range(3):
            next(first)
        later = batches()
        later.set_state(first.get_state())
        for expected, found in zip(whole[3:], later, strict=False):
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key], value)

    def test_they_are_the_same_in_several_processes(self, batches):
        whole = next(batches())
        parts = [next(batches(process_index=i, process_count=2)) for i in range(2)]
        np.testing.assert_array_equal(np.concatenate([part["index"] for part in parts]), whole["index"])

    def test_they_are_balanced(self, batches, dataset):
        count = len(dataset.classes)
        drawn = np.concatenate([b["index"] for b in itertools.islice(batches(), 60)])
        shares = np.bincount(dataset.labels[drawn], minlength=count) / len(drawn)
        np.testing.assert_allclose(shares, 1 / count, atol=0.06)
        assert not np.array_equal(drawn[:4], next(batches(balanced=False))["index"])
