"""The log of a training, `metrics.jsonl`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitft_jax import processes
from vitft_jax.report.files import finite, write_text


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, ``{step, split, ...values}``."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log to go on after `step`; later lines of an interrupted run are dropped."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    at = json.loads(line)["step"]
                except (ValueError, TypeError, KeyError):  # being written when the run was killed, or damaged since
                    continue
                if isinstance(at, int) and at <= step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._path = path

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if not processes.first():
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite({"step": step, "split": split, **values})) + "\n")
