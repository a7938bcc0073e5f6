import numpy as np
import pytest

from vitft_jax import tree

T = {"params": {"head": {"kernel": np.ones((2, 3), np.float32)}, "body": {"bias": np.ones(4, np.float16)}}}


def test_flatten_names_leaves_by_path_and_unflatten_inverts():
    assert set(tree.flatten(T)) == {"params/head/kernel", "params/body/bias"}
    assert tree.unflatten(tree.flatten(T)) == T


def test_first_match_wins():
    rules = (("attn/query", 1), ("attn", 2))
    assert tree.first_match(rules, "blocks_0/attn/query") == 1
    assert tree.first_match(rules, "blocks_0/attn/key") == 2
    assert tree.first_match(rules, "blocks_0/mlp/fc1", 7) == 7


def test_split_and_join_are_inverse():
    chosen, rest = tree.split(T, lambda name: "head" in name)
    assert list(tree.flatten(chosen)) == ["params/head/kernel"]
    assert tree.join(chosen, rest) == T
    with pytest.raises(ValueError, match="params/head/kernel"):
        tree.join(T, chosen)


def test_counts_and_bytes():
    assert tree.count(T) == 10
    assert tree.nbytes(T) == 6 * 4 + 4 * 2
