"""From a folder of images to batches: source -> decode -> augment -> batch. Nothing here knows of models or of JAX."""

from vitft_jax.data.augment import augment, check_augment
from vitft_jax.data.batches import Batches, eval_batches, steps_per_epoch, train_batches
from vitft_jax.data.images import FITS, ImageFiles, decode, find_images, resize, side_to_keep, to_8_bit
from vitft_jax.data.sources import Dataset, cache_folder, load
from vitft_jax.data.splits import SPLITS, split_by_group
from vitft_jax.data.tables import write_table

__all__ = [
    "FITS",
    "SPLITS",
    "Batches",
    "Dataset",
    "ImageFiles",
    "augment",
    "cache_folder",
    "check_augment",
    "decode",
    "eval_batches",
    "find_images",
    "load",
    "resize",
    "side_to_keep",
    "split_by_group",
    "steps_per_epoch",
    "to_8_bit",
    "train_batches",
    "write_table",
]
