"""The generated ultrasound sets as a TFDS builder. Importing this imports TFDS (0.4 s), but never TensorFlow."""

import contextlib
import io
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging

from vitft_jax.data import cases
from vitft_jax.data.anatomy import CLASSES
from vitft_jax.data.ultrasound import SIDE
from vitft_jax.errors import InputError, nearest

SPLIT = "images"  # one, because the program itself splits, by group; TFDS reserves the name "all"
_THREADS = max(1, min(8, os.cpu_count() or 1))  # NumPy and SciPy release the GIL for most of an image's making
_AHEAD = 64  # images made before they are written


class _Info(tfds.core.DatasetInfo):
    """Dataset information that is not looked for in TFDS's own storage on the network."""

    def initialize_from_bucket(self) -> None:
        pass


class Phantom(tfds.core.GeneratorBasedBuilder):
    """Ultrasound images made by a physical model: `source` and `target` (multi-class), `video` (multi-label)."""

    url_infos: ClassVar = (
        None  # nothing is downloaded; TFDS would look for checksums, with a package it does not declare
    )
    # To be raised with every change of the images, or folders prepared before would be taken for the new ones.
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="source", description="Breast: normal, benign, malignant; linear probe."),
        tfds.core.BuilderConfig(name="target", description="The same task by a worse scanner with a convex probe."),
        tfds.core.BuilderConfig(name="video", description="Clips of amniotic fluid; three 0/1 labels a frame."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIDE, SIDE, 1), encoding_format="png"),
            "group": tfds.features.Text(),
            "name": tfds.features.Text(),
        }
        if self.builder_config.name == "video":
            features |= {label: tfds.features.ClassLabel(names=["0", "1"]) for label in cases.LABELS}
        else:
            features["label"] = tfds.features.ClassLabel(names=list(CLASSES))
        # Generated in order, so shuffling would only make it harder to follow.
        return _Info(
            builder=self,
            description="Generated B-mode ultrasound images with classes, and groups (patients or videos).",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config.name
        keys = cases.LABELS if config == "video" else ("label",)
        for index, (case, image) in enumerate(zip(cases.cases(config), _images(config), strict=True)):
            labels = dict(zip(keys, case.labels, strict=True))
            yield index, {"image": image, "group": case.group, "name": case.name, **labels}


def prepare(config: str, folder: Path) -> Phantom:
    """Makes a generated set in a folder, or opens it where it has been made.

    It is made in a scratch folder beside its place and then moved there, so it is there as a whole or not at all.

    Args:
      config: 'source', 'target' or 'video'.
      folder: data folder in the layout of TFDS; made if missing. The set comes to `phantom/<config>/<version>` in it.

    Returns:
      The builder; `as_data_source(SPLIT)` reads it: image uint8 (128, 128, 1), group and name (bytes), and label, or
      one 0/1 integer for each of `cases.LABELS`.

    Raises:
      InputError: there is no such set, what is in its place is not whole, or the folder cannot be written.
    """
    names = [known.name for known in Phantom.BUILDER_CONFIGS]
    if config not in names:
        raise InputError(
            f"there is no generated set {config!r}; {nearest(config, names)} (a TFDS dataset needs data.source=tfds)"
        )
    folder = Path(folder).expanduser().absolute()
    place = folder / Phantom.name / config / str(Phantom.VERSION)
    with _quiet():
        if not place.exists():
            _make(config, folder, place)
        return _open(config, folder, place)


def _make(config: str, folder: Path, place: Path) -> None:
    missing = [path for path in (place.parent, *place.parent.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".phantom-", dir=folder, ignore_cleanup_errors=True) as scratch:
            builder = Phantom(config=config, data_dir=scratch)
            options = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(file_format="array_record", download_config=options)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                Path(builder.data_dir).rename(place)
            except OSError:
                if not place.exists():  # else another process was first, and its set is the same
                    raise
    except BaseException as error:  # an interrupt must leave nothing behind either
        for path in missing:  # deepest first
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        if not isinstance(error, OSError | RuntimeError):  # the record writer reports a full disk as the latter
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: the generated set {config!r} could not be written there ({reason}); it needs up to 40 MB. "
            "Make room, or choose another folder."
        ) from error


def _open(config: str, folder: Path, place: Path) -> Phantom:
    """Raises InputError if examples or files are missing, or a file was cut off (its index is at its end)."""
    count = len(cases.cases(config))
    try:
        builder = Phantom(config=config, data_dir=folder)
        found = builder.info.splits[SPLIT].num_examples if SPLIT in builder.info.splits else 0
        if found == count:
            builder.as_data_source(SPLIT)[count - 1]
            return builder
        reason = f"{found} of {count} examples"
    except Exception as error:  # readers of damaged files raise nearly anything; all of it means the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(f"{place}: this generated set is not whole ({reason}). Delete that folder; it is made anew.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from progress bars, advice, and announcing its scratch folder on standard output."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _images(config: str) -> Iterator[bytes]:
    """PNG files of all examples in order, made by a few threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: deque = deque()
        try:
            for index in range(len(cases.cases(config))):
                ahead.append(pool.submit(cases.png, config, index))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
