"""Fixtures: tiny image sets and runs, and the real material where it is at hand."""

import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # on a GPU, where each worker would take most of its memory
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # there float32 would be TF32

import numpy as np
import pytest
from PIL import Image
from support import TINY

from vitft_jax import config as configs
from vitft_jax import metrics, runtime, vit
from vitft_jax.report import page

runtime.start()
SHARED = Path(__file__).parent.parent.parent / "shared"


def shared(name: str) -> Path:
    """A path of the real material; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} beside the repository, which only its developers have")
    return path


@pytest.fixture
def busi() -> Path:
    return shared("data/busi")


@pytest.fixture
def focus() -> Path:
    return shared("weights/vit_s14_focus")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap intervals of a tiny run need no precision."""
    monkeypatch.setattr(metrics, "RESAMPLES", 20)


@pytest.fixture
def reports():
    """For tests in which commands write their report: elsewhere it would take longer than the tiny training before it."""


@pytest.fixture(autouse=True)
def no_reports(request, monkeypatch):
    if "reports" not in request.fixturenames:
        monkeypatch.setattr(page, "after", lambda *_: None)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Three classes of ten 20x20 images that differ in brightness, one sub-folder per class."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for level, name in enumerate(("dark", "grey", "light")):
        (root / name).mkdir()
        for i in range(10):
            pixels = rng.normal(50 + 70 * level, 15, (20, 20)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def tiny_config(image_folder, monkeypatch) -> configs.Config:
    """A run of a few steps on `image_folder` with a random tiny model."""
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", TINY)
    config = configs.default()
    config.model.name, config.model.pretrained = "tiny_test", ""
    config.data.path = str(image_folder)
    config.data.image_size = 16
    config.data.val_fraction = config.data.test_fraction = 0.2
    config.train.batch_size = 6
    config.train.epochs = 2.0
    config.train.lr = 1e-2
    return config
