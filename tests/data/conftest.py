"""Tiny image folders and tables for the tests of vitft_jax.data."""

import csv
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

OFF = {"crop": 1.0, "flip": 0.0, "rotate": 0.0, "gain": 0.0, "contrast": 0.0}
OFF |= {"speckle": 0.0, "tgc": 0.0, "mixup": 0.0, "cutmix": 0.0}


@pytest.fixture
def write_image():
    """Writes a 16 x 16 grey PNG whose content depends on its number."""

    def write(path: Path, number: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(values).save(path)

    return write


@pytest.fixture
def folder(tmp_path, write_image):
    """A folder with 10 + 14 images in class folders, and the config that reads it."""
    root = tmp_path / "images"
    for i in range(24):
        write_image(root / ("cyst" if i < 10 else "solid") / f"{i:02}.png", i)
    return root


@pytest.fixture
def config(folder):
    """The `data` group for `folder`."""
    return ConfigDict(
        {
            "source": "folder",
            "path": str(folder),
            "table": "",
            "name": "",
            "labels": (),
            "val_fraction": 0.2,
            "test_fraction": 0.2,
            "image_size": 16,
        }
    )


@pytest.fixture
def table(folder, config):
    """Writes a table into `folder` (or another folder) and points the config to it."""

    def write(header: str, rows: list, name: str = "labels.csv", **options):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", **options) as file:
            csv.writer(file).writerows([header.split(","), *(row.split(",") for row in rows)])
        config.table = name
        return path

    return write


@pytest.fixture
def knobs():
    """The `augment` group with everything off but what is given."""

    def make(**on):
        return ConfigDict(OFF | on)

    return make
