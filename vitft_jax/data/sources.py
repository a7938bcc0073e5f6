"""Datasets: where examples come from, and which class, group and split each one has."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vitft_jax.data import npz_source, tfds_source
from vitft_jax.data.images import ImageFiles, find_images, side_to_keep
from vitft_jax.data.splits import SPLITS, check_splits, hold_out, split_by_group
from vitft_jax.data.tables import Examples, read_table
from vitft_jax.errors import InputError, nearest


class Images(Protocol):
    """What a dataset needs of its images: random access, and a check before training starts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image: ...

    def check(self) -> None:
        """Raises InputError if some images cannot be read."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples with their classes, groups and splits; the images are read when asked for.

    Attributes:
      classes: class names; the index is the label, or the label's column if multi-label.
      multilabel: whether an example can have several classes, or none.
      names: name of each example as the user knows it: its path relative to the image folder, '/' between parts.
      labels: int32 (n,), or float32 (n, C) of 0/1 when multi-label.
      groups: patient or video of each example; its own name where none is given.
      splits: 'train', 'val' or 'test' for each example.
      images: image i (mode 'L' or 'RGB') of example i.
    """

    classes: tuple[str, ...]
    multilabel: bool
    names: tuple[str, ...]
    labels: np.ndarray
    groups: tuple[str, ...]
    splits: tuple[str, ...]
    images: Images

    def __len__(self) -> int:
        return len(self.names)

    @property
    def grouped(self) -> bool:
        """Whether patients or videos were given."""
        return self.groups != self.names

    def indices(self, split: str) -> np.ndarray:
        """Returns the positions (int64, ascending) of a split's examples; raises InputError for an unknown split."""
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; {nearest(split, SPLITS)}")
        return np.flatnonzero(np.array(self.splits) == split)


def load(
    config: ConfigDict, seed: int, classes: Sequence[str] | None = None, *, table: str | Path | None = None
) -> Dataset:
    """Finds the examples of a dataset and gives each a class, a group and a split.

    Splits come from the table or the dataset. If it has none, they are made by group, stratified, from the seed; if it
    has train and test only, val is `val_fraction` of train, chosen the same way.

    Args:
      config: the `data` group: `val_fraction`, `test_fraction`, `image_size` (pixels; 0 if not known yet; from it
        follows how far very large images are reduced when read), and `source` with what it reads:
        - 'phantom': `name`, see `phantom.prepare` ('' is 'target');
        - 'folder': `path` (the image folder), `table` (CSV file, relative to `path` or absolute; '' for one sub-folder
          per class), `labels` (names of 0/1 columns for multi-label, else ()), `links` (whether images may be links that
          lead out of the folder);
        - 'tfds': `name`, `path` and `labels`, see `tfds_source`;
        - 'npz': `path` and `labels`, see `npz_source`;
        - '': what `path` is; 'phantom' without one.
      seed: of the split, 0 .. 2**32 - 1.
      classes: if given, exactly these classes, in this order (those of a trained model); other labels are errors.
      table: a table that `write_table` wrote of this dataset (a run's own split), instead of `config.table` or of the
        labels, groups and splits in the dataset.

    Raises:
      InputError: anything in the data, the table or the config that cannot be trained on.
    """
    dataset, places = read(config, seed, classes, table=table)
    check_splits(dataset.classes, dataset.labels, dataset.groups, dataset.splits, places)
    return dataset


def read(
    config: ConfigDict, seed: int, classes: Sequence[str] | None = None, *, table: str | Path | None = None
) -> tuple[Dataset, tuple[str, ...]]:
    """As `load`, but whether its splits can be trained on is not checked; also returns how the user knows each example."""
    kind = config.source or _kind(config)
    if kind not in SOURCES:
        raise InputError(f"data.source = {kind!r} is unknown; {nearest(kind, SOURCES)}")
    for key, kinds in _USED_BY.items():
        if config.get(key) and kind not in kinds:
            raise InputError(
                f"data.{key} = {config[key]!r}: data.source={kind!r} has no use for it, only {' and '.join(kinds)}; "
                "leave one of them out."
            )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed}: must lie in 0..2**32 - 1.")
    examples, images, found = SOURCES[kind](config, table)
    class_names = tuple(classes) if classes is not None else found
    labels = _encode(examples, found, class_names)
    splits = _complete_splits(examples, labels, config, seed)
    dataset = Dataset(
        classes=class_names,
        multilabel=labels.ndim == 2,
        names=examples.names,
        labels=labels,
        groups=examples.groups,
        splits=splits,
        images=images,
    )
    return dataset, examples.places


def _folder(config: ConfigDict, table: str | Path | None) -> tuple[Examples, Images, tuple[str, ...]]:
    """Reads a folder of images with a table, or with one sub-folder per class; returns its class names last."""
    if not config.path:
        raise InputError("data.path is empty; set it to the folder that holds the images.")
    root = Path(config.path).expanduser().resolve()
    if not root.is_dir():
        raise InputError(f"data.path: there is no folder {root}.")
    if table is not None:
        examples = read_table(Path(table), root, root, config.labels)
    elif config.table:
        file = root / Path(config.table).expanduser()
        # A table outside the image folder can only mean paths relative to the image folder.
        folder = file.parent.resolve()
        base = folder if folder.is_relative_to(root) else root
        examples = read_table(file, root, base, config.labels)
    elif config.labels:
        raise InputError("data.labels names columns, so data.table must name the table that has them.")
    else:
        examples = _scan(root)
    if not config.get("links"):
        _check_links(root, examples)
    found = tuple(config.labels) if config.labels else tuple(sorted(set(examples.labels)))
    max_side = side_to_keep(config.image_size)
    return examples, ImageFiles(root, examples.names, places=examples.places, max_side=max_side), found


def _check_links(root: Path, examples: Examples) -> None:
    """Refuses images that are not in the folder but linked to: who made the folder may not be who may read them."""
    for name, place in zip(examples.names, examples.places, strict=True):
        real = Path(os.path.realpath(root / name))
        if not real.is_relative_to(root):
            raise InputError(
                f"{place}: is linked to {real}, outside the image folder {root}; copy it in, or set data.links=True "
                "if you trust this folder"
            )


def _phantom(config: ConfigDict, table: str | Path | None) -> tuple[Examples, Images, tuple[str, ...]]:
    """Reads a set of generated ultrasound images, which is made at first use; returns its class names last."""
    from vitft_jax.data import cases, phantom  # TFDS takes a while to import

    name = config.name or "target"
    builder = phantom.prepare(name, cache_folder())
    labels = cases.LABELS if name == "video" else ()
    return tfds_source.from_builder(builder, ConfigDict({"labels": labels, "image_size": config.image_size}), table)


# A new source is one entry: config, overriding table -> examples, images, class names.
SOURCES: dict[str, Callable[[ConfigDict, str | Path | None], tuple[Examples, Images, tuple[str, ...]]]] = {
    "phantom": _phantom,
    "folder": _folder,
    "tfds": tfds_source.read,
    "npz": npz_source.read,
}
_USED_BY = {  # keys that other sources have no use for
    "path": ("folder", "tfds", "npz"),
    "table": ("folder",),
    "labels": ("folder", "tfds", "npz"),
    "name": ("tfds", "phantom"),
}


def cache_folder() -> Path:
    """The folder that generated images are kept in: $VITFT_JAX_CACHE, or vitft_jax in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("VITFT_JAX_CACHE") or Path(base) / "vitft_jax").expanduser()


def _kind(config: ConfigDict) -> str:
    """The source that `path` is."""
    if not config.path:
        return "phantom"
    path = Path(config.path).expanduser()
    if path.suffix == ".npz":
        return "npz"
    return "tfds" if config.name or (path / "dataset_info.json").is_file() else "folder"


def _scan(root: Path) -> Examples:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    tables = sorted(file.name for file in root.glob("*.csv"))
    hint = f" Or, if {tables[0]} holds the labels, set data.table={tables[0]}." if tables else ""
    if not folders:
        raise InputError(f"{root} has no sub-folders; put the images into one sub-folder per class.{hint}")
    if {"train", "test"} <= set(folders) or {"train", "val"} <= set(folders):
        raise InputError(
            f"{root}: the sub-folders {', '.join(folders)} look like splits, not classes; list the images in a table "
            f"with columns path, label and split, and set data.table.{hint}"
        )
    names, labels = [], []
    for folder in folders:
        if folder != folder.strip():  # the table of the split, from which a run is read again, has it without
            raise InputError(f"{root}: the class folder {folder!r} begins or ends with a space; rename it without")
        files = find_images(root / folder)
        if not files:
            raise InputError(f"{root / folder} holds no images; fill or remove this class folder.{hint}")
        names += [f"{folder}/{file}" for file in files]
        labels += [folder] * len(files)
    for name in names:
        if (
            not name.isascii() and name.encode(errors="replace").decode() != name
        ):  # it could not be written to any table
            raise InputError(f"{root}: {name!r} is not a name in UTF-8; rename the file or folder")
    return Examples(tuple(names), tuple(labels), tuple(names), None, tuple(names))


def _encode(examples: Examples, found: tuple[str, ...], classes: tuple[str, ...]) -> np.ndarray:
    if isinstance(examples.labels, np.ndarray):
        if classes != found:
            raise InputError(f"data.labels is {', '.join(found)}, but the model's classes are {', '.join(classes)}.")
        return examples.labels
    if len(classes) < 2:
        raise InputError(f"There is only one class, {classes[0]!r}; a classifier needs at least two.")
    for label, place in zip(examples.labels, examples.places, strict=True):
        if label not in classes:
            raise InputError(
                f"{place}: label {label!r} is none of the classes {', '.join(classes)}; {nearest(label, classes)}"
            )
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[label] for label in examples.labels], np.int32)


def _complete_splits(examples: Examples, labels: np.ndarray, config: ConfigDict, seed: int) -> tuple[str, ...]:
    if examples.splits is None:
        return split_by_group(labels, examples.groups, config.val_fraction, config.test_fraction, seed)
    if set(examples.splits) != {"train", "test"}:
        return examples.splits
    if not 0 < config.val_fraction < 1:
        raise InputError(f"data.val_fraction = {config.val_fraction}: must lie between 0 and 1.")
    splits = np.array(examples.splits, dtype=object)
    train = np.flatnonzero(splits == "train")
    val = hold_out(labels[train], [examples.groups[i] for i in train], config.val_fraction, seed)
    splits[train[val]] = "val"
    return tuple(splits)
