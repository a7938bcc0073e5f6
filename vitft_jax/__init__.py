"""Fine-tune pretrained Vision Transformers on small, specialised image sets, and make the result small and fast."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitft_jax.predictor import Predictor

IMPORTED = time.perf_counter()  # before JAX and all else is imported, to tell how long a command takes to get going


def load(workdir: str | Path) -> "Predictor":
    """A trained run or an export, ready to predict: ``vitft_jax.load("runs/lora").predict(images)``; see `predictor.load`."""
    from vitft_jax import predictor

    return predictor.load(Path(workdir))
