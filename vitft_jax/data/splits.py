"""Splits into train, val and test: by group, stratified, from the seed. And the checks that every split must pass."""

import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vitft_jax.errors import InputError

SPLITS = ("train", "val", "test")
_MAX_FOLDS = 20  # fractions are reached in steps of 5 % or finer; more folds only cost time


def split_by_group(
    labels: np.ndarray, groups: Sequence[str], val_fraction: float, test_fraction: float, seed: int
) -> tuple[str, ...]:
    """Assigns each example to train, val or test so that no group is in two of them.

    Each split has about the same proportions of classes (multi-label: of combinations of labels). The result depends on
    the examples and the seed, not on the order of the examples.

    Args:
      labels: integer classes (n,), or 0/1 (n, C) when multi-label.
      groups: patient or video of each example.
      val_fraction: part of all examples for val, in (0, 1). Reached to the nearest fraction of at most 20 equal folds.
      test_fraction: the same for test.
      seed: 0 .. 2**32 - 1.

    Raises:
      InputError: a fraction out of range, or too few groups.
    """
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            raise InputError(f"data.{key} = {value}: must lie between 0 and 1.")
    if val_fraction + test_fraction >= 1:
        raise InputError(
            f"data.val_fraction + data.test_fraction = {val_fraction + test_fraction:g} leaves nothing to train on."
        )
    _need_groups(groups, 3, "train, val and test")
    result = np.full(len(groups), "train", dtype=object)
    test = hold_out(labels, groups, test_fraction, seed)
    result[test] = "test"
    rest = np.setdiff1d(np.arange(len(groups)), test)
    val = hold_out(labels[rest], [groups[i] for i in rest], val_fraction / (1 - test_fraction), seed)
    result[rest[val]] = "val"
    return tuple(result)


def hold_out(labels: np.ndarray, groups: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Chooses whole groups with about `fraction` of the examples, stratified; arguments as in `split_by_group`.

    Returns:
      Positions of the chosen examples, ascending. At least one group is chosen and one is left.

    Raises:
      InputError: there are fewer than two groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second, and worker processes never come here

    count = _need_groups(groups, 2, "a split in two")
    strata = _strata(labels)
    if np.bincount(strata).max() < 2:  # every class once: there is nothing to stratify by
        strata = np.zeros_like(strata)
    folds = max(2, min(_MAX_FOLDS, count, int(np.bincount(strata).max())))
    share = Fraction(fraction).limit_denominator(folds)
    share = min(max(share, Fraction(1, folds)), Fraction(folds - 1, folds))
    # scikit-learn promises nothing about the order of rows, so give it one that depends on the examples alone.
    order = np.lexsort((strata, np.array(groups)))
    splitter = StratifiedGroupKFold(share.denominator, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = list(splitter.split(order, strata[order], np.array(groups)[order]))
    return np.sort(order[np.concatenate([held for _, held in parts[: share.numerator]])])


def check_splits(
    classes: Sequence[str],
    labels: np.ndarray,
    groups: Sequence[str],
    splits: Sequence[str],
    places: Sequence[str],
) -> None:
    """Checks that a split can be trained on and trusted.

    Args:
      classes: class names.
      labels: integer classes (n,), or 0/1 (n, C) when multi-label.
      groups: patient or video of each example.
      splits: 'train', 'val' or 'test' for each.
      places: how the user knows each example, for messages.

    Raises:
      InputError: two classes differ in capital letters alone, a split is empty, a group is in two splits, or a class has no
        example in train.
    """
    if alike := alike_but_for_case(classes):
        raise InputError(
            f"Classes {' and '.join(map(repr, alike[0]))} differ in capital letters alone; spell them alike."
        )
    for split in SPLITS:
        if split not in splits:
            raise InputError(f"The {split} split is empty; each of train, val and test needs images.")
    first: dict[str, int] = {}
    for i, group in enumerate(groups):
        j = first.setdefault(group, i)
        if splits[i] != splits[j]:
            raise InputError(
                f"Group {group!r} is in two splits: {places[j]} in {splits[j]} and {places[i]} in {splits[i]}. "
                "Put a group (patient, video) into one split, or results look better than they are."
            )
    train = labels[np.array(splits) == "train"]
    counts = train.sum(0) if train.ndim == 2 else np.bincount(train, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise InputError(
                f"Class {name!r} has no example in train; add images of more groups, correct column split, "
                "or leave the class out."
            )


def alike_but_for_case(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names that differ in capital letters alone, together."""
    found: dict[str, dict[str, None]] = {}
    for name in names:
        found.setdefault(name.casefold(), {})[name] = None
    return [tuple(group) for group in found.values() if len(group) > 1]


def _need_groups(groups: Sequence[str], least: int, purpose: str) -> int:
    count = len(set(groups))
    if count < least:
        raise InputError(
            f"There are {count} groups and {purpose} need at least {least}, because a group (patient, video) must not "
            "be in two splits; add images of other groups."
        )
    return count


def _strata(labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 1:
        return np.unique(labels, return_inverse=True)[1]
    strata = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    # A combination that occurs once cannot be spread over splits; together such ones can.
    return np.where(np.bincount(strata)[strata] == 1, -1, strata) + 1
