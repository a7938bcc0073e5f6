"""Charts.

Matplotlib is slow to import and few commands draw, so each function imports it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vitft_jax import processes


def heat_map(path: Path, values: Mapping[str, float], title: str) -> None:
    """Draws a number per layer as a PNG: a row per block, a column per matrix; `values` is by path of a layer."""
    if not processes.first():
        return
    from matplotlib.figure import Figure

    cells = {tuple(name.split("/", 1)): value for name, value in values.items()}
    number = re.compile(r"\d+")
    rows = sorted({row for row, _ in cells}, key=lambda row: [int(n) for n in number.findall(row)])
    columns = list(dict.fromkeys(column for _, column in cells))
    grid = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows], float)
    figure = Figure(figsize=(2 + 0.9 * len(columns), 1.5 + 0.35 * len(rows)), layout="constrained", dpi=150)
    axes = figure.subplots()
    top = np.nanmax(grid)
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            axes.text(j, i, f"{value:g}", ha="center", va="center", color="white" if value > 0.6 * top else "black")
    figure.colorbar(image)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
