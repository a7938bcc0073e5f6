"""Tables of labels (CSV), read strictly: a row that is not understood stops the program, with its number."""

import csv
import posixpath
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np

from vitft_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from vitft_jax.data.sources import Dataset

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
FAULTS = 20  # rows to name in one message
_BINARY = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}
_RESERVED = ("path", "label", "group", "split")
_OF_GROUPS = re.compile(r"(patient|subject|case|study|exam|video)[ _-]?(id|no|nr|number|name)?", re.IGNORECASE)


@dataclass(frozen=True)
class Examples:
    """Examples as the user listed them, in his order. All fields have one entry for each example.

    Attributes:
      names: path relative to the image folder, '/' between parts; without a folder, any names, each once.
      labels: class name of each example; or, when multi-label, float32 (n, C) of 0/1.
      groups: patient or video; the name of the example where none is given.
      splits: 'train', 'val' or 'test'; None where the table has no such column.
      places: how the user knows each example (its name, and the table row if there is one), for messages.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] | np.ndarray
    groups: tuple[str, ...]
    splits: tuple[str, ...] | None
    places: tuple[str, ...]


def read_table(table: Path, root: Path, base: Path, label_columns: Sequence[str]) -> Examples:
    """Reads a table with columns `path`, `label` (or several 0/1 columns), and optionally `group` and `split`.

    Args:
      table: the CSV file, UTF-8 with or without a byte-order mark. Blank lines and other columns are passed over, but for
        those that were meant to be read, by their names.
      root: the image folder; every image must lie in it.
      base: the folder that column `path` is relative to; `root` or a folder below it.
      label_columns: names of the 0/1 columns of a multi-label table; empty for a table with one class a row.

    Raises:
      InputError: the table is missing, not UTF-8 or malformed, lacks a column, has no rows, or a row has a bad value, a
        path outside `root`, the path of an earlier row or an image that does not exist.
    """
    prefix = base.relative_to(root).as_posix()
    examples, numbers = _read(table, label_columns, lambda path, where: _inside(path, prefix, where, root))
    missing = [i for i, name in enumerate(examples.names) if not (root / name).is_file()]
    if missing:
        slash = "\nPut '/' between folders, not '\\'." if any("\\" in examples.names[i] for i in missing) else ""
        raise InputError(
            f"{table}: {len(missing)} of {len(examples.names)} images are not in {root}:"
            f"{_rows(examples, numbers, missing)}{slash}\n"
            f"Correct the paths, which are relative to {base}, or take the rows out; if this is the split.csv of a run, "
            "restore the images instead, or start a new run."
        )
    return examples


def read_run_table(table: Path, known: Container[str], where: str | Path, label_columns: Sequence[str]) -> Examples:
    """Reads what `write_table` wrote of a dataset that is no folder: column `path` holds the names of examples.

    Args:
      table: as in `read_table`.
      known: the names in the dataset now.
      where: the dataset, for messages.
      label_columns: as in `read_table`.

    Raises:
      InputError: as `read_table`, or examples are not in the dataset any more.
    """
    examples, numbers = _read(table, label_columns, lambda name, _: name)
    missing = [i for i, name in enumerate(examples.names) if name not in known]
    if missing:
        raise InputError(
            f"{table}: {len(missing)} of {len(examples.names)} examples are not in {where}:"
            f"{_rows(examples, numbers, missing)}\n"
            "The dataset has changed since the table was written; restore it, or start a new run."
        )
    return examples


def check_label_columns(label_columns: Sequence[str]) -> None:
    """Raises InputError if these cannot be the columns of a multi-label table."""
    for column in label_columns:
        if column in _RESERVED or list(label_columns).count(column) > 1:
            raise InputError(f"data.labels: {column!r} cannot be a label column; name 0/1 columns, each once.")


def _read(
    table: Path, label_columns: Sequence[str], to_name: Callable[[str, str], str]
) -> tuple[Examples, tuple[int, ...]]:
    """Returns the rows as examples, and the number of each row; `to_name` takes a path and its place."""
    header, rows = read_rows(table)
    _check_columns(header, table, label_columns)
    names: list[str] = []
    labels: list[str] = []
    binary: list[list[float]] = []
    groups: list[str] = []
    splits: list[str] = []
    first_row: dict[str, int] = {}
    faults: list[str] = []
    for number, cells in rows:
        row = dict(zip(header, cells, strict=True))
        where = f"{table}, row {number}"
        try:
            name = to_name(row["path"], where)
            if name in first_row:
                raise InputError(
                    f"{where}: {row['path']!r} is listed in row {first_row[name]} already; keep one of the two."
                )
            first_row[name] = number
            if label_columns:
                binary.append([_binary(row[column], column, where) for column in label_columns])
            elif row["label"]:
                labels.append(row["label"])
            else:
                raise InputError(f"{where}: the label is blank; give a class or take the row out.")
            if "split" in header:
                splits.append(_split(row["split"], where))
        except InputError as error:
            faults.append(str(error))
        else:
            names.append(name)
            groups.append(row.get("group") or name)
    if faults:
        raise InputError(_together(faults, f"{table}: {len(faults)} rows cannot be used:"))
    examples = Examples(
        names=tuple(names),
        labels=np.array(binary, np.float32) if label_columns else tuple(labels),
        groups=tuple(groups),
        splits=tuple(splits) if "split" in header else None,
        places=tuple(f"{name} ({table.name}, row {number})" for name, number in first_row.items()),
    )
    return examples, tuple(first_row.values())


def write_table(dataset: "Dataset", path: str | Path) -> None:
    """Writes the examples, labels, groups and splits of a dataset as a CSV table.

    Its paths are relative to the image folder, wherever the table lies (without a folder they are the names):
    `load(config, seed, classes=dataset.classes, table=path)` gives the same dataset again.
    """
    columns = dataset.classes if dataset.multilabel else ("label",)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", *columns, "group", "split"])
        for i, name in enumerate(dataset.names):
            label = dataset.labels[i]
            cells = [int(value) for value in label] if dataset.multilabel else [dataset.classes[label]]
            writer.writerow([name, *cells, dataset.groups[i], dataset.splits[i]])


def read_rows(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header and, for each row, its line number in the file and its cells, stripped."""
    if not table.is_file():
        raise InputError(f"There is no table {table}; correct data.table.")
    rows: list[tuple[int, list[str]]] = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            start = 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    rows.append((start, [cell.strip() for cell in cells]))
                start = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is not UTF-8 text; save it as 'CSV UTF-8'.") from error
    except csv.Error as error:
        raise InputError(f"{table}, row {start}: not valid CSV ({error}); correct the quotes.") from error
    if len(rows) < 2:
        raise InputError(f"{table} has no rows; it needs a header and one row for each image.")
    header, examples = rows[0][1], rows[1:]
    if len(header) == 1 and (mark := next((mark for mark in ";\t" if mark in header[0]), "")):
        name = {";": "';'", "\t": "tabs"}[mark]
        raise InputError(
            f"{table}: its columns are separated by {name}; save it with commas between them ('CSV UTF-8')."
        )
    while header and not header[-1] and all(not any(cells[len(header) - 1 :]) for _, cells in examples):
        header = header[:-1]  # columns without a name and without values, as spreadsheets leave them behind
    examples = [(n, cells if any(cells[len(header) :]) else cells[: len(header)]) for n, cells in examples]
    for number, cells in examples:
        if len(cells) != len(header):
            raise InputError(
                f"{table}, row {number}: {len(cells)} values for {len(header)} columns ({', '.join(header)}); "
                "a value that contains a comma needs quotes."
            )
    return header, examples


def _check_columns(header: list[str], table: Path, label_columns: Sequence[str]) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise InputError(f"{table}: column {twice[0]!r} is there twice; rename one.")
    check_label_columns(label_columns)
    for column in ("path", *(label_columns or ("label",))):
        if column not in header:
            hint = "separate the columns by commas" if len(header) == 1 else nearest(column, header)
            multi = "" if label_columns or column == "path" else " (for several 0/1 columns set data.labels)"
            raise InputError(f"{table}: there is no column {column!r}; {hint}{multi}")
    for column in header:
        if column.lower() in ("group", "split") and column.lower() not in header:
            raise InputError(
                f"{table}: column {column!r} would not be read; write {column.lower()!r}, or give it another name."
            )
        if "group" not in header and column not in label_columns and _OF_GROUPS.fullmatch(column):
            raise InputError(
                f"{table}: column {column!r} would not be read, and images of one patient or video could lie in different "
                "splits; call it 'group', or if it is none give it another name."
            )


def _inside(path: str, prefix: str, where: str, root: Path) -> str:
    if not path:
        raise InputError(f"{where}: the path is blank; give an image or take the row out.")
    if posixpath.isabs(path) or PureWindowsPath(path).anchor:
        raise InputError(f"{where}: {path!r} is an absolute path; give it relative to the table.")
    name = posixpath.normpath(posixpath.join(prefix, path))
    if name == ".." or name.startswith("../"):
        raise InputError(f"{where}: {path!r} leads out of the image folder {root}; move the image in or set data.path.")
    return name


def _binary(value: str, column: str, where: str) -> float:
    if value not in _BINARY:
        raise InputError(f"{where}: {column} is {value!r}; a label column of data.labels must hold 0 or 1.")
    return _BINARY[value]


def _split(value: str, where: str) -> str:
    if value.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: the split is {value!r}; {nearest(value, ('train', 'val', 'test'))}")
    return SPLIT_NAMES[value.lower()]


def _together(faults: Sequence[str], title: str) -> str:
    """A message about one fault, or a title and the first of several."""
    if len(faults) == 1:
        return faults[0]
    more = [f"... and {len(faults) - FAULTS} more"] if len(faults) > FAULTS else []
    return "\n  ".join([title, *faults[:FAULTS], *more])


def _rows(examples: Examples, numbers: Sequence[int], chosen: Sequence[int]) -> str:
    listed = "".join(f"\n  row {numbers[i]}: {examples.names[i]}" for i in chosen[:5])
    return listed + (f"\n  ... and {len(chosen) - 5} more" if len(chosen) > 5 else "")
