"""What to predict: the images of a file, a folder or a table, with their true labels where these are known."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitft_jax import data
from vitft_jax.data import dicom
from vitft_jax.data.images import EXTENSIONS
from vitft_jax.data.tables import read_rows
from vitft_jax.errors import InputError, nearest

UNKNOWN = -1


@dataclass(frozen=True)
class Item:
    """An image: its name in the output, its file, and the frame of a DICOM file (None: it is none)."""

    name: str
    path: Path
    frame: int | None = None

    def read(self, max_side: int) -> Image.Image:
        """The image, mode 'L' or 'RGB'; `max_side` as in `data.decode`.

        Raises:
            InputError: It cannot be read.
        """
        if self.frame is None:
            return data.decode(self.path, max_side=max_side)
        return dicom.read(self.path, self.frame, max_side)


@dataclass(frozen=True)
class Inputs:
    """Images and what is known of them.

    Attributes:
        items: The images, in the order of the table, or sorted.
        labels: int32: true class `(n,)`, or 0/1 for each label `(n, C)`; UNKNOWN where not known. None: of no image.
    """

    items: tuple[Item, ...]
    labels: np.ndarray | None


def find(images: Path, classes: Sequence[str], multilabel: bool) -> Inputs:
    """Finds the images that a path stands for.

    A folder is searched recursively; if each of its images lies in a sub-folder that bears the name of a class, that is its
    true label. A table (CSV) has a column `path`, relative to the table or absolute, and if wanted `label` (multi-label: a 0/1
    column for each label), blank where not known. A DICOM file with several frames is as many images, named `file.dcm#0`, ...

    Args:
        images: A file, a folder or a table.
        classes: Of the model.
        multilabel: Whether an image has several labels.

    Raises:
        InputError: There is nothing there, no image in it, a name is not UTF-8, or the table cannot be understood.
    """
    if images.is_dir():
        paths = list(_walk(images))
        if not paths:
            raise InputError(f"--images {images}: no images in this folder")
        names = [path.relative_to(images).as_posix() for path in paths]
        labels = None if multilabel else _by_folder(names, classes)
    elif not images.is_file():
        raise InputError(f"--images {images}: there is no such file or folder")
    elif images.suffix.lower() == ".csv":
        names, labels = _table(images, classes, multilabel)
        paths = [images.parent / name for name in names]
    else:
        paths, names, labels = [images], [images.name], None
    if odd := [name for name in names if any("\ud800" <= c <= "\udfff" for c in name)]:
        raise InputError(
            f"--images {images}: the name of {odd[0]!a} is not UTF-8, so no table can hold it; rename the file"
        )
    items, rows = [], []
    for i, (name, path) in enumerate(zip(names, paths, strict=True)):
        found = _items(name, path)
        items += found
        rows += [i] * len(found)
    return Inputs(tuple(items), None if labels is None else labels[rows])


def _walk(folder: Path) -> Iterator[Path]:
    """Image files below a folder, sorted; hidden ones are left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in files if not name.startswith(".")]
    for path in sorted(found):
        if path.suffix.lower() in EXTENSIONS or dicom.is_dicom(path):
            yield path


def _items(name: str, path: Path) -> list[Item]:
    if not dicom.is_dicom(path):
        return [Item(name, path)]
    count = dicom.frames(path)
    return [Item(f"{name}#{i}" if count > 1 else name, path, i) for i in range(count)]


def _by_folder(names: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    parents = [name.split("/")[0] if "/" in name else "" for name in names]
    return np.array([classes.index(p) for p in parents], np.int32) if set(parents) <= set(classes) else None


def _table(table: Path, classes: Sequence[str], multilabel: bool) -> tuple[list[str], np.ndarray | None]:
    header, rows = read_rows(table)
    if "path" not in header:
        raise InputError(f"{table}: there is no column 'path'; {nearest('path', header)}")
    columns = [name for name in (classes if multilabel else ("label",)) if name in header]
    if multilabel and columns and len(columns) < len(classes):
        missing = next(name for name in classes if name not in header)
        raise InputError(
            f"{table}: there is no column {missing!r}, though there is {columns[0]!r}; give all labels or none"
        )
    names, labels = [], []
    for number, cells in rows:
        row = dict(zip(header, cells, strict=True))
        if not row["path"]:
            raise InputError(f"{table}, row {number}: the path is blank; give an image or take the row out.")
        names.append(row["path"])
        if columns:
            labels.append([_label(row[name], name, classes, multilabel, f"{table}, row {number}") for name in columns])
    if not columns:
        return names, None
    return names, np.array(labels, np.int32) if multilabel else np.array(labels, np.int32)[:, 0]


def _label(value: str, column: str, classes: Sequence[str], multilabel: bool, where: str) -> int:
    if not value:
        return UNKNOWN
    if not multilabel:
        if value not in classes:
            raise InputError(f"{where}: label {value!r} is none of the model's classes; {nearest(value, classes)}")
        return list(classes).index(value)
    if value not in ("0", "1", "0.0", "1.0"):
        raise InputError(f"{where}: {column} is {value!r}; the column of a label must hold 0, 1 or nothing.")
    return int(float(value))
