"""Trees of arrays by the names of their leaves: rules, splitting and joining, counting.

A tree is a nested dict; the name of a leaf is its path joined by '/', such as ``params/blocks_0/attn/query/kernel``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import traverse_util

Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns ``{name: leaf}`` in the order of the tree."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def map_named(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Applies ``function(name, leaf)`` to every leaf and keeps the structure."""
    return unflatten({name: function(name, leaf) for name, leaf in flatten(tree).items()})


def first_match(rules: Iterable[tuple[str, Any]], name: str, default: Any = None) -> Any:
    """Returns the value of the first rule ``(regex, value)`` whose regex is found in `name` (`re.search`)."""
    for pattern, value in rules:
        if re.search(pattern, name):
            return value
    return default


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree by name into ``(chosen, rest)``; `join` puts them together again."""
    leaves = flatten(tree)
    return (
        unflatten({name: leaf for name, leaf in leaves.items() if chosen(name)}),
        unflatten({name: leaf for name, leaf in leaves.items() if not chosen(name)}),
    )


def join(*trees: Tree) -> dict[str, Any]:
    """Joins trees with disjoint leaves into one.

    Raises:
        ValueError: A name occurs in two of the trees.
    """
    leaves: dict[str, Any] = {}
    for tree in trees:
        more = flatten(tree)
        if twice := leaves.keys() & more.keys():
            raise ValueError(f"leaves in more than one tree: {sorted(twice)[:5]}")
        leaves.update(more)
    return unflatten(leaves)


def count(tree: Any) -> int:
    """Number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, from shapes and dtypes, so abstract trees count too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
