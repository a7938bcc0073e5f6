"""Datasets of TensorFlow Datasets (TFDS), without TensorFlow: read at random from array_record files, decoded by us.

`config.path` and `config.name` say which: a directory that holds a prepared dataset (its `dataset_info.json`), or a TFDS
data_dir and the name of a dataset in it, which is prepared there if it is not yet.

The dataset needs one Image feature, and either one ClassLabel or the 0/1 features that `config.labels` names (several
labels an image). Where there are several Image or ClassLabel features, TFDS's `supervised_keys` choose, or
`config.labels` names the ClassLabel. A scalar feature `group` is the patient or video, a text `name` the name of the
example; without it, the name is split and position, such as 'train/17'.

Splits named train and test, with or without val (or validation), are kept, and others beside them left out. Any other set
of splits is put together, to be split by group.
"""

import contextlib
import difflib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from vitft_jax.data.images import EncodedImages, side_to_keep
from vitft_jax.data.tables import SPLIT_NAMES, Examples, check_label_columns, read_run_table
from vitft_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo, SplitInfo

_FORMAT = "array_record"
_INFO = "dataset_info.json"  # TFDS writes it last, so what lacks it is not whole


def read(config: ConfigDict, table: str | Path | None) -> tuple[Examples, "TfdsImages", tuple[str, ...]]:
    """Reads the dataset of `config.path` and `config.name`; see `from_builder` and the module.

    Raises:
      InputError: there is no such dataset, it is damaged or cannot be prepared, or as `from_builder`.
    """
    path = Path(config.path).expanduser().resolve() if config.path else None
    if path and not path.is_dir():
        raise InputError(f"data.path: there is no folder {path}; correct it, or create it for TFDS to prepare data in.")
    if path and (path / _INFO).is_file():
        if config.name:
            raise InputError(f"data.path: {path} is one prepared dataset; leave out data.name={config.name!r}.")
        return from_builder(_from_directory(path), config, table)
    if not config.name:
        raise InputError(
            f"data.path: {path} holds no {_INFO}, so it is no prepared dataset, or not a whole one; correct it, or set "
            "data.name to a dataset in it."
            if path
            else "data.name and data.path are empty; name a TFDS dataset, or set data.path to a prepared one."
        )
    return from_builder(_by_name(config.name, path), config, table)


def from_builder(
    builder: "DatasetBuilder", config: ConfigDict, table: str | Path | None = None
) -> tuple[Examples, "TfdsImages", tuple[str, ...]]:
    """Reads the names, labels, groups and splits of a prepared dataset, every record once; decodes no image.

    Args:
      builder: a builder whose data are prepared as array_record.
      config: the `data` group; `labels` and `image_size` are used.
      table: a table by `write_table`, instead of the labels, groups and splits in the dataset.

    Returns:
      Examples, their images and the class names.

    Raises:
      InputError: the features do not fit, an example has no valid label, a file is missing or damaged, or is not
        array_record.
    """
    info = builder.info
    where = Path(builder.data_dir)
    image, labels, classes = _features(info, config.labels, where)
    named = "name" in info.features and isinstance(info.features["name"], _tfds().features.Text)
    grouped = "group" in info.features and info.features["group"].shape == ()
    splits = _splits(info, where)
    sources = _sources(builder, list(splits))
    for split in splits:
        _check_files(info.splits[split])
    names: list[str] = []
    values: list[Any] = []
    groups: list[str] = []
    places: list[str] = []
    rows: dict[str, tuple[str, int]] = {}  # of an example: TFDS split and position in it
    for split, source in sources.items():
        for row in range(len(source)):
            place = f"{where}, example {row} of {split}"
            try:
                example = source[row]
                name = (_text(example["name"]) if named else "") or f"{split}/{row}"
                groups.append((_text(example["group"]) if grouped else "") or name)
                values.append([example[label] for label in labels])
            except Exception as error:  # array_record, protobuf and TFDS raise many kinds on damaged bytes
                raise InputError(f"{place} cannot be read; prepare the dataset anew: {_reason(error)}") from error
            if name in rows:
                raise InputError(
                    f"{place}: its name {name!r} is that of example {rows[name][1]} of {rows[name][0]} too."
                )
            rows[name] = (split, row)
            names.append(name)
            places.append(name if name == f"{split}/{row}" else f"{name} ({split}/{row})")
    if table is not None:
        examples = read_run_table(Path(table), rows, where, () if classes else labels)
    else:
        mapped = [splits[split] for split, _ in rows.values()]
        examples = Examples(
            names=tuple(names),
            labels=_class_names(values, classes, places) if classes else _binary(values, labels, places),
            groups=tuple(groups),
            splits=None if None in mapped else tuple(mapped),
            places=tuple(places),
        )
    images = TfdsImages(
        where,
        image,
        [rows[name] for name in examples.names],
        places=examples.places,
        max_side=side_to_keep(config.image_size),
    )
    return examples, images, classes or labels


class TfdsImages(EncodedImages):
    """The images of a dataset prepared as array_record. Worker processes open its files anew."""

    def __init__(
        self, directory: Path, key: str, rows: Sequence[tuple[str, int]], *, places: Sequence[str], max_side: int = 0
    ) -> None:
        """Describes the images; reads nothing.

        Args:
          directory: of the prepared dataset.
          key: name of the image feature.
          rows: TFDS split of each image, and position in it.
          places: see `EncodedImages`.
          max_side: see `decode`.
        """
        super().__init__(directory, places, max_side)
        self._directory = directory
        self._key = key
        self._rows = tuple(rows)
        self._sources: Mapping[str, Sequence[Mapping[str, Any]]] | None = None

    def _source(self, index: int) -> bytes:
        split, row = self._rows[index]
        try:
            return self._open()[split][row][self._key]
        except Exception as error:
            raise InputError(f"Cannot read image {self._places[index]}: {_reason(error)}.") from error

    def _open(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        with self._lock:
            if self._sources is None:
                self._sources = _sources(_from_directory(self._directory), sorted({split for split, _ in self._rows}))
            return self._sources

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_sources": None}


def _from_directory(path: Path) -> "DatasetBuilder":
    try:
        return _tfds().builder_from_directory(path)
    except Exception as error:
        raise InputError(
            f"{path} is no whole TFDS dataset ({_INFO} or features.json is missing or damaged): {_reason(error)}. "
            "Prepare it anew, or correct data.path."
        ) from error


def _by_name(name: str, path: Path | None) -> "DatasetBuilder":
    """Finds a dataset, and prepares it if need be, in `path`, or in TFDS's own folder where None."""
    tfds = _tfds()
    where = f"data.name = {name!r} in {path or tfds.core.constants.DATA_DIR}"
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=path)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(f"data.name: there is no dataset {name!r}; {_known(name, path)}") from error
    except Exception as error:
        raise InputError(f"{where}: {_reason(error)}. Correct the name, or delete a damaged copy.") from error
    directory = Path(builder.data_dir)
    if not directory.exists():
        _prepare(builder, where)
    elif not (directory / _INFO).is_file():
        raise InputError(f"{where}: {directory} holds no {_INFO}, so it is not whole; delete it and run again.")
    return _from_directory(directory)


def _prepare(builder: "DatasetBuilder", where: str) -> None:
    tfds = _tfds()
    print(f"preparing {builder.info.full_name} in {builder.data_dir}, once", file=sys.stderr, flush=True)
    try:
        with _quiet():
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(file_format=_FORMAT, download_config=config)
    except ImportError as error:
        raise InputError(
            f"{where}: preparing it needs the package {error.name}; install it, or set data.path to a copy that was "
            f"prepared elsewhere with file_format='{_FORMAT}'."
        ) from error
    except Exception as error:  # whatever a builder's own code, the network or the disk raises
        raise InputError(
            f"{where} could not be prepared: {type(error).__name__}: {_reason(error)}. If it needs a download that cannot "
            f"happen here, set data.path to a copy that was prepared elsewhere with file_format='{_FORMAT}'."
        ) from error


def _known(name: str, path: Path | None) -> str:
    """The end of a message about an unknown dataset."""
    tfds = _tfds()
    root = path or Path(tfds.core.constants.DATA_DIR)
    base = re.split("[/:]", name)[0]
    if here := sorted(info.parent.relative_to(root).as_posix() for info in root.glob(f"{base}/**/{_INFO}")):
        return f"{root} has {', '.join(here)}."
    known = {*tfds.list_builders(with_community_datasets=False), *(entry.parts[-1] for entry in root.glob("*/"))}
    close = difflib.get_close_matches(base, sorted(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Nothing of that name is in {root}; a builder of your own must be imported, say by the config file."


def _check_files(split: "SplitInfo") -> None:
    """Every file must hold as many records as it should: TFDS reads what there is."""
    from array_record.python.array_record_module import ArrayRecordReader

    for part in split.file_instructions:
        try:
            reader = ArrayRecordReader(part.filename)
            count = reader.num_records()
            reader.close()
        except Exception as error:
            raise InputError(
                f"{part.filename}: missing or damaged; prepare the dataset anew: {_reason(error)}"
            ) from error
        if count != part.examples_in_shard:
            raise InputError(
                f"{part.filename} has {count} examples and should have {part.examples_in_shard}; prepare the dataset anew."
            )


def _features(info: "DatasetInfo", labels: Sequence[str], where: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Returns the image feature, the label features, and the class names of a ClassLabel (none if multi-label)."""
    kinds = _tfds().features
    features = dict(sorted(info.features.items())) if isinstance(info.features, kinds.FeaturesDict) else {}
    listed = f"{where} has the features " + (", ".join(f"{key} ({type(features[key]).__name__})" for key in features))
    supervised = info.supervised_keys or ()

    def only(kind: type, excluded: tuple[type, ...] = ()) -> str | None:
        keys = [key for key, value in features.items() if isinstance(value, kind) and not isinstance(value, excluded)]
        chosen = [key for key in keys if key in supervised] if len(keys) > 1 else keys
        return chosen[0] if len(chosen) == 1 else None

    image = only(kinds.Image, (kinds.LabeledImage,))
    if image is None:
        raise InputError(f"{listed}; one Image is needed, or supervised_keys that name one.")
    if features[image].np_dtype == np.float32:
        raise InputError(f"{where}: image feature {image!r} is of float32; prepare it as uint8 or uint16.")
    if not labels:
        label = only(kinds.ClassLabel)
        if label is None:
            raise InputError(f"{listed}; set data.labels to one ClassLabel, or to 0/1 features for several labels.")
        return image, (label,), tuple(features[label].names)
    for name in labels:
        if name not in features:
            raise InputError(f"data.labels: {where} has no feature {name!r}; {nearest(name, features)}")
    if len(labels) == 1 and isinstance(features[labels[0]], kinds.ClassLabel):
        return image, tuple(labels), tuple(features[labels[0]].names)
    check_label_columns(labels)
    for name in labels:
        if features[name].shape != () or np.dtype(features[name].np_dtype).kind not in "biu":
            raise InputError(f"{listed}; data.labels: {name!r} is no scalar that can be 0 or 1.")
    return image, tuple(labels), ()


def _splits(info: "DatasetInfo", where: Path) -> dict[str, str | None]:
    """The TFDS splits that are used, each with our name for it, or None for all where they are to be split anew."""
    filled = [name for name, split in info.splits.items() if split.num_examples]
    if not filled:
        raise InputError(f"{where} holds no examples; prepare the dataset anew.")
    mapped = {name: SPLIT_NAMES[name.lower()] for name in filled if name.lower() in SPLIT_NAMES}
    return dict(mapped) if {"train", "test"} <= set(mapped.values()) else dict.fromkeys(filled)


def _sources(builder: "DatasetBuilder", splits: Sequence[str]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Opens splits for random access; images come as the bytes of their files."""
    tfds = _tfds()
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if _FORMAT not in formats:
        raise InputError(
            f"{builder.data_dir} is prepared as {', '.join(formats)}, which cannot be read at random. Convert it once, "
            f"with TensorFlow installed: tfds convert_format --dataset_version_dir={builder.data_dir} "
            f"--out_file_format={_FORMAT} --out_dir=NEW; then set data.path=NEW and leave data.name out."
        )
    images = [key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    return {split: builder.as_data_source(split, decoders=decoders, file_format=_FORMAT) for split in splits}


def _text(value: Any) -> str:
    """A scalar as text without spaces around it, as a table would hold it."""
    return (value.decode() if isinstance(value, bytes) else str(value)).strip()


def _class_names(values: list[Any], classes: tuple[str, ...], places: Sequence[str]) -> tuple[str, ...]:
    for (value,), place in zip(values, places, strict=True):
        if not 0 <= value < len(classes):
            raise InputError(f"{place}: its label is {value}, which is no class; leave examples without a label out.")
    return tuple(classes[value] for (value,) in values)


def _binary(values: list[Any], labels: tuple[str, ...], places: Sequence[str]) -> np.ndarray:
    array = np.array(values)
    if wrong := np.argwhere((array != 0) & (array != 1)).tolist():
        i, j = wrong[0]
        raise InputError(f"{places[i]}: {labels[j]} is {array[i, j]}; a feature of data.labels must be 0 or 1.")
    return array.astype(np.float32)


def _reason(error: Exception) -> str:
    """The start of an exception's message; those of TFDS can be long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")


def _tfds() -> ModuleType:
    import tensorflow_datasets as tfds  # takes a third of a second, and other sources do without

    return tfds


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing, and from looking for community datasets in the network."""
    tfds = _tfds()
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    public = [tfds.core.visibility.DatasetType.TFDS_PUBLIC]
    try:
        with tfds.core.visibility.set_availables_tmp(public), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
