"""Batches for training and evaluation, read by grain in threads or worker processes.

Every batch is a function of its number, the dataset and the seed alone. So the same batches come from any number of
threads, workers or processes, and the state of an iterator is one number.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vitft_jax.data.augment import augment as augment_image
from vitft_jax.data.augment import check_augment
from vitft_jax.data.balance import Balanced
from vitft_jax.data.images import check_fit, resize
from vitft_jax.data.mix import mix, mixes
from vitft_jax.data.sources import Dataset
from vitft_jax.errors import InputError, MachineError

Batch = dict[str, np.ndarray]

_THREADS = 4  # each reads a whole batch; the GIL bounds what more would gain, and the train step needs the cores too
_AHEAD = 4  # batches read ahead in-process, one for each thread
_AHEAD_WORKER = 2  # batches read ahead by each worker process
_GRACE = 30.0  # seconds that a worker goes on after SIGTERM
_ENDLESS = 10**9  # epochs; grain's own endless repeat overflows where a batch has one row


class Batches(Iterator[Batch]):
    """Iterator over batches, whose place can be saved and restored exactly.

    The state does not depend on `workers`: a run may go on with another number of them.
    """

    def __init__(self, batches: grain.MapDataset, workers: int) -> None:
        """Wraps a dataset of batches; reading starts at the first `next`."""
        self._batches = batches
        self._workers = workers
        self._next = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            InputError: An image cannot be read; names the file.
            MachineError: A worker process died.
        """
        if self._reader is None:
            self._reader = self._open()
        try:
            batch = next(self._reader)
        except StopIteration:
            self.close()  # worker processes would otherwise stay until the iterator is collected
            raise
        except RuntimeError as error:
            if not self._workers or "Worker process was terminated" not in str(error):
                raise
            raise MachineError(
                f"a process that reads images died ({str(error).split('. ')[0]}), as when memory runs out; the same command "
                f"goes on from the last checkpoint. Fewer than data.workers={self._workers}, or 0, need less memory"
            ) from error
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns what `set_state` needs to go on from here: the number of the next batch (JSON-serialisable)."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where `get_state` was called, on this or on an equally made iterator."""
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Stops the threads or worker processes. The iterator can be used again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> grain.DatasetIterator:
        batches = self._batches[self._next :]
        if self._workers == 0:
            return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks absl for flags, which fails in a notebook or a test
        read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_AHEAD_WORKER)
        return iter(read.mp_prefetch(options, worker_init_fn=_start_worker))


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int,
    fit: str,
    augment: ConfigDict,
    seed: int,
    balanced: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless batches of the train split, shuffled anew each epoch, augmented, and mixed if `augment` says so.

    Every epoch has each example exactly once (`balanced`: see `Balanced`); batches run across the borders of epochs. With
    several processes, process p gets the rows p * b .. (p + 1) * b of exactly the batch that a single process would get.

    Args:
      dataset: the dataset.
      batch_size: over all processes; each process yields b = batch_size // process_count.
      image_size: side S of the images in pixels.
      fit: how images are fitted into the square; see `resize`.
      augment: the `augment` group; see `augment` and `mix`.
      seed: of the order and the augmentation, >= 0.
      balanced: draw every class, or label, equally often.
      workers: reading processes; 0 reads with a few threads in this one. The batches are the same. Each worker keeps
        its own cache of decoded images.
      process_index: number of this process among `process_count`.
      process_count: processes that train together.

    Returns:
      Iterator of dicts: image uint8 (b, S, S, 3), label int32 (b,) or float32 (b, C), index int32 (b,): position in the
      dataset. With mixing, label is always float32 (b, C), and index that of a row's own image.

    Raises:
      InputError: `batch_size` is not a positive multiple of `process_count` (with mixing, of twice that), or another
        value is out of range.
    """
    check_augment(augment)
    rows = _local_batch(batch_size, workers, process_count, image_size, fit)
    draw = _Augmented(dataset, image_size, fit, augment)
    if balanced:
        order = grain.MapDataset.source(Balanced(dataset, seed)).seed(seed)
    else:
        order = grain.MapDataset.source(dataset.indices("train")).seed(seed).shuffle().repeat(_ENDLESS)
    examples = order.random_map(draw)
    batches = examples.batch(rows)[process_index::process_count]
    if mixes(augment):
        if rows % 2:
            raise InputError(
                f"train.batch_size = {batch_size}: augment.mixup and augment.cutmix mix images in pairs, so it must be a "
                f"multiple of {2 * process_count} (two for each process)."
            )
        # After the split by process, so that the number of a batch, from which its draws come, is the same in all.
        batches = batches.random_map(_Mixed(augment, len(dataset.classes)))
    return Batches(batches, workers)


def eval_batches(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    image_size: int,
    fit: str,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches with each example of a split exactly once, in order, not augmented.

    Every process yields the same number of batches, all of the same shape; what is missing to whole batches is padded
    with black images, label 0, index -1 and mask 0. With several processes, process p gets the rows
    p * b .. (p + 1) * b of the batch that a single process would get.

    Args:
      dataset: the dataset.
      split: 'train', 'val' or 'test'.
      batch_size: over all processes; each process yields b = batch_size // process_count.
      image_size: side S of the images in pixels.
      fit: how images are fitted into the square; see `resize`.
      workers: reading processes; 0 reads with a few threads in this one.
      process_index: number of this process among `process_count`.
      process_count: processes that evaluate together.

    Returns:
      Iterator of dicts as of `train_batches`, and mask float32 (b,): 1 for an example, 0 for padding.

    Raises:
      InputError: as `train_batches`, or there is no such split.
    """
    rows = _local_batch(batch_size, workers, process_count, image_size, fit)
    positions = dataset.indices(split)
    padding = np.full(-len(positions) % batch_size, -1)
    source = grain.MapDataset.source(np.concatenate([positions, padding]))
    examples = source.map(_Resized(dataset, image_size, fit))
    return Batches(examples.batch(rows)[process_index::process_count], workers)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Returns how many train batches of `batch_size` (over all processes) hold an epoch, rounded up."""
    return -(-len(dataset.indices("train")) // batch_size)


def _start_worker(index: int, count: int) -> None:
    """Makes a worker end when its parent is killed, and outlive a SIGTERM to both that lets the parent save its state."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE, os._exit, (1,)).start())


@dataclass(frozen=True, repr=False)  # grain puts the repr into names, and it would list the whole dataset
class _Augmented:
    dataset: Dataset
    size: int
    fit: str
    config: ConfigDict

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        image = augment_image(self.dataset.images[index], rng, self.config, self.size, self.fit)
        return {"image": image, "label": self.dataset.labels[index], "index": np.int32(index)}


@dataclass(frozen=True, repr=False)
class _Mixed:
    config: ConfigDict
    classes: int

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        return mix(batch, rng, self.config, self.classes)


@dataclass(frozen=True, repr=False)
class _Resized:
    dataset: Dataset
    size: int
    fit: str

    def __call__(self, index: int) -> Batch:
        if index < 0:
            image = np.zeros((self.size, self.size, 3), np.uint8)
            label = np.zeros_like(self.dataset.labels[0])
        else:
            image = resize(self.dataset.images[index], self.size, self.fit)
            label = self.dataset.labels[index]
        return {"image": image, "label": label, "index": np.int32(index), "mask": np.float32(index >= 0)}


def _local_batch(batch_size: int, workers: int, process_count: int, image_size: int, fit: str) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"train.batch_size = {batch_size}: must be a positive multiple of the number of processes, {process_count}."
        )
    if workers < 0:
        raise InputError(f"data.workers = {workers}: must be 0 (threads) or a number of processes.")
    if image_size < 1:
        raise InputError(f"data.image_size = {image_size}: must be a positive number of pixels.")
    check_fit(fit)
    return batch_size // process_count
