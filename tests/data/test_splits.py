import numpy as np
import pytest

from vitft_jax.data.splits import SPLITS, check_splits, hold_out, split_by_group
from vitft_jax.errors import InputError


def patients(count=120, seed=0):
    """Labels and groups of patients with 1 to 4 images each; classes in proportions 6 : 3 : 1."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, count)
    labels = rng.choice(3, count, p=[0.6, 0.3, 0.1])
    return np.repeat(labels, sizes), [f"p{i}" for i in np.repeat(np.arange(count), sizes)]


def test_every_example_is_in_one_split_and_every_group_too():
    labels, groups = patients()
    splits = split_by_group(labels, groups, 0.1, 0.2, seed=0)
    assert len(splits) == len(labels)
    assert set(splits) == set(SPLITS)
    for group in set(groups):
        assert len({split for split, other in zip(splits, groups, strict=True) if other == group}) == 1


@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0.15, 0.15), (0.25, 0.5)])
def test_sizes_and_class_proportions(fractions):
    labels, groups = patients(400)
    splits = np.array(split_by_group(labels, groups, *fractions, seed=1))
    for split, fraction in zip(("val", "test"), fractions, strict=True):
        for label in range(3):
            total = (labels == label).sum()
            share = ((labels == label) & (splits == split)).sum() / total
            # Groups are whole, at most 4 images; greedy folds leave each fold within about one group of even, and a
            # split joins at most 10 folds whose errors partly cancel: allow 4 groups, plus 1 % for the rounding of
            # fractions to twentieths.
            assert abs(share - fraction) < 4 * 4 / total + 0.01, (split, label)


def test_single_images_split_nearly_exactly():
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    splits = np.array(split_by_group(labels, [str(i) for i in range(200)], 0.1, 0.2, seed=0))
    for label, total in enumerate((100, 60, 40)):
        assert ((splits == "test") & (labels == label)).sum() == total * 0.2
        assert ((splits == "val") & (labels == label)).sum() == total * 0.1


def test_the_seed_decides():
    labels, groups = patients()
    first, again, other = (split_by_group(labels, groups, 0.1, 0.2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_order_of_rows_does_not_matter():
    labels, groups = patients()
    splits = split_by_group(labels, groups, 0.1, 0.2, seed=0)
    order = np.random.default_rng(1).permutation(len(labels))
    permuted = split_by_group(labels[order], [groups[i] for i in order], 0.1, 0.2, seed=0)
    assert permuted == tuple(splits[i] for i in order)


def test_multilabel_is_stratified_by_combination():
    rng = np.random.default_rng(0)
    labels = rng.choice(2, (400, 3), p=[0.7, 0.3]).astype(np.float32)
    splits = np.array(split_by_group(labels, [str(i) for i in range(400)], 0.2, 0.25, seed=0))
    for combination in np.unique(labels, axis=0):
        here = (labels == combination).all(1)
        assert abs((here & (splits == "test")).sum() - 0.25 * here.sum()) <= 2


def test_combinations_that_occur_once():
    labels = np.unpackbits(np.arange(30, dtype=np.uint8)[:, None], axis=1).astype(np.float32)
    splits = split_by_group(labels, [str(i) for i in range(30)], 0.2, 0.2, seed=0)
    assert [splits.count(split) for split in SPLITS] == [18, 6, 6]


@pytest.mark.parametrize("classes", [3, 8])
def test_classes_of_one_or_two_images(classes):
    """A pilot: nothing can be stratified, and what cannot be trained on is told by `check_splits`."""
    for each in (1, 2):
        labels = np.repeat(np.arange(classes), each)
        splits = split_by_group(labels, [str(i) for i in range(len(labels))], 0.2, 0.2, seed=0)
        assert set(splits) == set(SPLITS)
    assert len(hold_out(np.arange(2), ["a", "b"], 0.1, 0)) == 1


def test_three_groups_are_enough_two_are_not():
    labels, groups = np.array([0, 1] * 6), list("aaaabbbbcccc")
    assert set(split_by_group(labels, groups, 0.1, 0.2, 0)) == set(SPLITS)
    with pytest.raises(InputError, match="2 groups"):
        split_by_group(labels, list("aaaaaabbbbbb"), 0.1, 0.2, 0)


@pytest.mark.parametrize("fractions", [(0.0, 0.2), (0.1, 1.0), (0.5, 0.5)])
def test_fractions_out_of_range(fractions):
    with pytest.raises(InputError, match="_fraction"):
        split_by_group(*patients(), *fractions, seed=0)


def test_hold_out_takes_whole_groups():
    labels, groups = patients()
    held = hold_out(labels, groups, 0.3, seed=0)
    assert not {groups[i] for i in held} & {groups[i] for i in range(len(groups)) if i not in set(held)}
    assert abs(len(held) / len(groups) - 0.3) < 0.05


GOOD = {
    "classes": ("a", "b"),
    "labels": np.array([0, 1, 0, 1]),
    "groups": list("wxyz"),
    "splits": ["train", "train", "val", "test"],
    "places": ["one", "two", "three (t.csv, row 4)", "four"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("Cyst", "cyst")}, "Classes 'Cyst' and 'cyst' differ in capital letters alone"),
        ({"splits": ["train", "train", "test", "test"]}, "val split is empty"),
        ({"splits": ["val", "train", "val", "test"]}, "Class 'a' has no example in train"),
        ({"groups": list("xxwx")}, r"Group 'x' is in two splits: one in train and four in test"),
        ({"groups": list("wxwz")}, r"Group 'w' .* one in train and three \(t\.csv, row 4\) in val"),
        ({"labels": np.array([[1, 0], [1, 0], [0, 1], [0, 1]])}, "Class 'b' has no example in train"),
    ],
)
def test_check_splits(change, message):
    check_splits(**GOOD)
    with pytest.raises(InputError, match=message):
        check_splits(**GOOD | change)
