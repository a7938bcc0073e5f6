"""An endless order of train examples in which every class comes equally often."""

from functools import lru_cache

import numpy as np

from vitft_jax.data.sources import Dataset

_ENDLESS = 10**9  # rounds


class Balanced:
    """Positions in a dataset, by place in the order: class-aware sampling (Shen et al. 2016, arXiv:1512.05830).

    The order is made of rounds, about as long as an epoch, in which every class that occurs has equally many places, at random.
    A class fills its places with its examples, shuffled anew whenever all have had their turn: so the examples of a rare
    class come several times in a round, and those of a frequent one not in each. Where an image has several labels, the
    classes are the labels, and the images without any.

    Every position is a function of its place, the dataset and the seed alone.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        """Takes the train split of a dataset; `seed` >= 0."""
        train = dataset.indices("train")
        labels = dataset.labels[train]
        member = labels[:, None] == np.arange(len(dataset.classes))
        if dataset.multilabel:
            member = np.column_stack([labels > 0, (labels == 0).all(axis=1)])
        self._classes = [train[column] for column in member.T if column.any()]
        self._each = -(-len(train) // len(self._classes))  # places of a class in a round
        self._seed = seed

    def __len__(self) -> int:
        return self._each * len(self._classes) * _ENDLESS

    def __getitem__(self, place: int) -> int:
        turn, place = divmod(int(place), self._each * len(self._classes))
        which, number = divmod(int(_shuffled(self._each * len(self._classes), self._seed, 0, turn)[place]), self._each)
        examples = self._classes[which]
        again, number = divmod(turn * self._each + number, len(examples))
        return int(examples[_shuffled(len(examples), self._seed, 1 + which, again)[number]])


@lru_cache(maxsize=256)
def _shuffled(count: int, seed: int, which: int, turn: int) -> np.ndarray:
    return np.random.default_rng((seed, which, turn)).permutation(count)
