"""What a program needs to know of its data: classes, steps, and weights of the loss."""

import math
from dataclasses import dataclass

import numpy as np

from vitft_jax import config as configs
from vitft_jax import data


@dataclass(frozen=True)
class Task:
    """What a program needs to know of its data.

    Attributes:
        classes: Names.
        multilabel: Whether an image has several labels.
        total_steps: Optimiser steps of the run.
        class_weights: Of the loss; () = all 1.
    """

    classes: tuple[str, ...]
    multilabel: bool
    total_steps: int
    class_weights: tuple[float, ...] = ()


def task_of(config: configs.Config, dataset: data.Dataset) -> Task:
    """The task of a run that trains on `dataset`."""
    weights = class_weights(dataset) if config.train.class_weights else ()
    return Task(dataset.classes, dataset.multilabel, total_steps(config, len(dataset.indices("train"))), weights)


def total_steps(config: configs.Config, train_images: int) -> int:
    """Optimiser steps of a run on so many training images."""
    per_epoch = math.ceil(train_images / config.train.batch_size)
    # 1.1 * 50 is 55.00000000000001 in floating point: without the small term one step too many.
    return config.train.steps or math.ceil(config.train.epochs * per_epoch - 1e-9)


def class_weights(dataset: data.Dataset) -> tuple[float, ...]:
    """Loss weights from the training split.

    Classes are weighed by n / (C n_c), so the mean over the training images is 1; the positives of a label by
    negatives / positives, or 1 where every image has it.
    """
    labels = dataset.labels[dataset.indices("train")]
    if dataset.multilabel:
        positives = labels.sum(axis=0)
        negatives = len(labels) - positives
        return tuple(np.where(negatives > 0, negatives / positives, 1.0).tolist())
    counts = np.bincount(labels, minlength=len(dataset.classes))
    return tuple((len(labels) / (len(counts) * counts)).tolist())
