"""MedMNIST-style .npz files: one file with the images and labels of every split as arrays.

For each split (train, and val and test where there are such) the file `config.path` holds

- `<split>_images`: uint8 (N, H, W) or (N, H, W, 3);
- `<split>_labels`: integer classes (N, 1) or (N,); or 0/1 (N, C) with C > 1, several labels an image;
- `<split>_groups`, if wanted: integers or strings (N,), the patient or video of each image.

A file with train alone is split by group. Classes are called '0', '1', ... unless `config.labels` names them in the order
of their numbers: such files do not hold their names. Examples are called 'train/0', 'train/1', ...
"""

import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vitft_jax.data.images import side_to_keep, to_8_bit
from vitft_jax.data.splits import SPLITS
from vitft_jax.data.tables import Examples, check_label_columns, read_run_table
from vitft_jax.errors import InputError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read(config: ConfigDict, table: str | Path | None) -> tuple[Examples, "NpzImages", tuple[str, ...]]:
    """Reads labels and groups, and of the images their shapes alone; returns examples, images and class names.

    Args:
      config: the `data` group; `path`, `labels` and `image_size` are used.
      table: a table by `write_table`, instead of the labels, groups and splits in the file.

    Raises:
      InputError: there is no such file, it is damaged or holds pickled objects; an array is missing, or has a wrong
        type, shape, length or value; `labels` does not name each class.
    """
    if not config.path:
        raise InputError("data.path is empty; set it to an .npz file.")
    path = Path(config.path).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"data.path: there is no file {path}.")
    headers = _headers(path)
    splits = [split for split in SPLITS if f"{split}_images" in headers or f"{split}_labels" in headers]
    if "train" not in splits:
        raise InputError(f"{path}: there is no array train_images; it has {', '.join(sorted(headers)) or 'no arrays'}.")
    names: list[str] = []
    groups: list[str] = []
    owners: list[str] = []
    labels: list[np.ndarray] = []
    for split in splits:
        _check_images(headers, f"{split}_images", path)
        count = headers[f"{split}_images"][0][0]
        labels.append(_labels(path, f"{split}_labels", headers, count))
        here = [f"{split}/{i}" for i in range(count)]
        names += here
        groups += _groups(path, f"{split}_groups", headers, here)
        owners += [split] * count
    if len({array.shape[1:] for array in labels}) > 1:
        shapes = ", ".join(str(array.shape) for array in labels)
        raise InputError(f"{path}: the labels of {', '.join(splits)} have shapes {shapes}; give all the same columns.")
    numbers = np.concatenate(labels)
    multilabel = numbers.ndim == 2
    classes = _classes(path, numbers, config.labels)
    if table is not None:
        examples = read_run_table(Path(table), set(names), path, classes if multilabel else ())
    else:
        examples = Examples(
            names=tuple(names),
            labels=numbers.astype(np.float32) if multilabel else tuple(classes[number] for number in numbers),
            groups=tuple(groups),
            splits=tuple(owners) if len(splits) > 1 else None,
            places=tuple(names),
        )
    rows = [(split, int(row)) for split, _, row in (name.partition("/") for name in examples.names)]
    return examples, NpzImages(path, rows, max_side=side_to_keep(config.image_size)), classes


class NpzImages(Sequence[Image.Image]):
    """The images of an .npz file. The images of a split are read when the first is asked for, and stay in memory.

    Threads may read it together. Worker processes get it without the arrays and each read those that they need.
    """

    def __init__(self, path: Path, rows: Sequence[tuple[str, int]], *, max_side: int = 0) -> None:
        """Describes the images; reads nothing.

        Args:
          path: the file.
          rows: split of each image, and its position there.
          max_side: see `decode`.
        """
        self._path = path
        self._rows = tuple(rows)
        self._max_side = max_side
        self._start()

    def _start(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Image.Image:
        """Returns image `index` (mode 'L' or 'RGB'); raises InputError, naming the file, if it cannot be read."""
        split, row = self._rows[index]
        return to_8_bit(Image.fromarray(self._array(split)[row]), self._max_side)

    def check(self) -> None:
        """Reads the images of every split; raises InputError if some cannot be read."""
        for split in sorted({split for split, _ in self._rows}):
            self._array(split)

    def _array(self, split: str) -> np.ndarray:
        with self._lock:
            if split not in self._arrays:
                self._arrays[split] = _array(self._path, f"{split}_images")
            return self._arrays[split]

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_arrays", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array of the file, without its values."""
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as file:
                        shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
                    headers[member.removesuffix(".npy")] = (shape, dtype)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen classes on damaged bytes
        raise InputError(f"{path}: damaged, or not an .npz file ({error}).") from error
    for key, (_, dtype) in headers.items():
        if dtype.hasobject:
            raise InputError(f"{path}: {key} holds pickled objects; save plain arrays of numbers.")
    return headers


def _array(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except Exception as error:
        raise InputError(f"{path}: {key} cannot be read, the file is damaged ({error}).") from error


def _check_images(headers: dict[str, tuple[tuple[int, ...], np.dtype]], key: str, path: Path) -> None:
    if key not in headers:
        raise InputError(f"{path}: there is no array {key}; it has {', '.join(sorted(headers))}.")
    shape, dtype = headers[key]
    if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
        raise InputError(f"{path}: {key} is {dtype} {shape}; uint8 (N, H, W) or (N, H, W, 3) is needed.")


def _labels(path: Path, key: str, headers: dict[str, tuple[tuple[int, ...], np.dtype]], count: int) -> np.ndarray:
    """Integer classes (count,), or 0/1 (count, C) if there are several columns."""
    if key not in headers:
        raise InputError(f"{path}: there is no array {key}; it has {', '.join(sorted(headers))}.")
    shape, dtype = headers[key]
    if dtype.kind not in "biu" or len(shape) not in (1, 2) or shape[1:] == (0,):
        raise InputError(f"{path}: {key} is {dtype} {shape}; integers (N, 1), or 0/1 (N, C), are needed.")
    if shape[0] != count:
        raise InputError(f"{path}: {key} has {shape[0]} rows for {count} images; give one for each.")
    labels = _array(path, key)
    labels = labels.astype(np.int64) if dtype.kind == "b" else labels
    labels = labels[:, 0] if shape[1:] == (1,) else labels
    multilabel = labels.ndim == 2
    wrong = np.argwhere((labels < 0) | ((labels > 1) if multilabel else np.zeros_like(labels, bool)))
    if len(wrong):
        need = "0 or 1" if multilabel else "0 or more"
        raise InputError(f"{path}: {key} is {labels[tuple(wrong[0])]} in row {wrong[0][0]}; it must be {need}.")
    return labels


def _groups(path: Path, key: str, headers: dict[str, tuple[tuple[int, ...], np.dtype]], names: list[str]) -> list[str]:
    """The group of each example; its name where there is none."""
    if key not in headers:
        return names
    shape, dtype = headers[key]
    if dtype.kind not in "iuU" or shape != (len(names),):
        raise InputError(f"{path}: {key} is {dtype} {shape}; integers or strings ({len(names)},) are needed.")
    return [str(group).strip() or name for group, name in zip(_array(path, key), names, strict=True)]


def _classes(path: Path, labels: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    if labels.ndim == 1 and count > len(labels):
        raise InputError(f"{path}: there are classes up to {count - 1} and {len(labels)} images; number them from 0.")
    if not names:
        return tuple(str(i) for i in range(count))
    names = [name.strip() for name in names]
    if len(names) != count or len(set(names)) < count or "" in names:
        raise InputError(
            f"data.labels = {', '.join(names)}: {path} has {count} classes; give each a name of its own, in the order of "
            "their numbers."
        )
    if labels.ndim == 2:
        check_label_columns(names)
    return tuple(names)
