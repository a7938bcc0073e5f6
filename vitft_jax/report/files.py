"""Files that a reader never sees half of, and JSON without NaN."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitft_jax import processes


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a reader never sees half of it."""
    if not processes.first():
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
