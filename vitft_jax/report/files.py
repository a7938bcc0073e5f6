"""Files that a reader never sees half of, JSON without NaN, and pictures without which a run is whole."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitft_jax import processes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def write_figure(path: Path, figure: "Figure") -> None:
    """Writes a figure as a PNG, whole or not at all; its folder is made."""
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    os.replace(part, path)


@contextmanager
def optional(what: str, hint: str) -> Iterator[None]:
    """What fails in here is told, with a hint, and ends nothing: the results are safe, and worth more than their pictures."""
    try:
        yield
    except Exception as error:
        if processes.first():
            print(f"warning: {what} could not be written ({type(error).__name__}: {error}); {hint}", flush=True)


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
