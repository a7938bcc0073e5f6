"""Charts: pictures of a method as PNG, and SVG for pages, which takes its colours from the page and so suits light and dark.

Matplotlib is slow to import and few commands draw, so it is imported where it draws. No text from outside enters a chart of a
page: lines are named in a legend beside it, which is HTML.
"""

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitft_jax import metrics
from vitft_jax.report.files import write_figure
from vitft_jax.report.markup import Html, join, tag
from vitft_jax.report.style import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _RULE = "#010203", "#010204", "#010205"  # stand for colours of the page until the SVG is written
_LINES = [f"#01021{i}" for i in range(SERIES)]
_COLOURS = {_INK: "currentColor", _SOFT: "var(--soft)", _RULE: "var(--rule)"} | {
    line: f"var(--s{i})" for i, line in enumerate(_LINES)
}
_DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2))  # so that lines differ without colours too
_WIDTH = 5.0  # inches of 72 points: 360 units of the SVG, as wide as a telephone
_FONT = 12  # points
_MOST_POINTS = 400  # of a line


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: For the legend.
        x: `(n,)`.
        y: `(n,)`, NaN where there is nothing.
        mark: A point on it or near it, such as where a model decides.
        points: Whether its points are marked.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    mark: tuple[float, float] | None = None
    points: bool = False


def lines(
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    described: str,
    *,
    square: bool = False,
    diagonal: bool = False,
    vertical: float | None = None,
) -> Html:
    """A chart of lines with its legend.

    Args:
        drawn: SERIES of them at most.
        x_label: Of the axis.
        y_label: Of the axis.
        described: What the chart shows, for those who cannot see it.
        square: Whether both axes go from 0 to 1.
        diagonal: Draws the diagonal.
        vertical: Draws a vertical line at this x.
    """
    with _styled():
        figure, axes = _axes(5.0 if square else 3.4)
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, dashes=(3, 3))
        if vertical is not None:
            axes.axvline(vertical, color=_SOFT, linewidth=1, dashes=(3, 3))
        for i, line in enumerate(drawn):
            axes.plot(
                line.x,
                line.y,
                color=_LINES[i],
                linewidth=1.8,
                dashes=_DASHES[i % len(_DASHES)] or (None, None),
                marker="o" if line.points else None,
                markersize=4,
            )
            if line.mark is not None:
                axes.plot(*line.mark, "o", color=_LINES[i], markersize=8, markeredgecolor=_INK, clip_on=False)
        axes.set(xlabel=x_label, ylabel=y_label)
        if square:
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        return join(_svg(figure, described), legend([line.label for line in drawn]))


def legend(labels: Sequence[str | Html]) -> Html:
    """Names of lines, each with a piece of it."""
    items = []
    for i, label in enumerate(labels):
        dashes = " ".join(map(str, _DASHES[i % len(_DASHES)])) or None
        line = tag("line", x1=0, y1=5, x2=34, y2=5, stroke=f"var(--s{i})", stroke_width=2.5, stroke_dasharray=dashes)
        items.append(tag("li", tag("svg", line, viewBox="0 0 34 10", aria_hidden="true"), tag("span", label)))
    return tag("ul", items, class_="legend")


def roc(score: np.ndarray, truth: np.ndarray, decided: np.ndarray, label: str) -> Line | None:
    """The receiver operating characteristic of scores `(n,)` for a 0/1 truth `(n,)`, with the point of the decisions `(n,)`.

    None where the truth is all 0 or all 1: there is none then.
    """
    truth, decided = truth > 0, decided > 0
    positives, negatives = truth.sum(), (~truth).sum()
    if not positives or not negatives:
        return None
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=np.inf))  # images of equal score count together
    hits, alarms = truth[order].cumsum()[last] / positives, (~truth[order]).cumsum()[last] / negatives
    x, y = np.concatenate([[0], alarms]), np.concatenate([[0], hits])
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
    mark = (decided & ~truth).sum() / negatives, (decided & truth).sum() / positives
    return Line(label, x[kept], y[kept], mark=mark)


@dataclass(frozen=True)
class Bins:
    """Reliability: images by what the model gave its decisions.

    Attributes:
        confidence: Mean probability in each bin that has images, `(b,)`.
        right: Share of right decisions there, `(b,)`.
        low: Of the 95 % interval (Wilson) of `right`, `(b,)`.
        high: Of it.
        images: How many, `(b,)`.
    """

    confidence: np.ndarray
    right: np.ndarray
    low: np.ndarray
    high: np.ndarray
    images: np.ndarray


def bins(confidence: np.ndarray, right: np.ndarray) -> Bins:
    """Reliability in the bins of the calibration error, from probabilities `(n,)` and 0/1 `(n,)`."""
    place = np.minimum(np.floor(confidence * metrics.ECE_BINS), metrics.ECE_BINS - 1).astype(int)
    images = np.bincount(place, minlength=metrics.ECE_BINS)
    used = images > 0
    n = images[used]
    mean, share = (
        np.bincount(place, values, metrics.ECE_BINS)[used] / n for values in (confidence, right.astype(float))
    )
    z2 = 1.959964**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return Bins(mean, share, centre - half, centre + half, n)


def reliability(found: Bins, described: str, y_label: str) -> Html:
    """A reliability diagram; the area of a point is the number of its images."""
    with _styled():
        figure, axes = _axes(5.0)
        axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, dashes=(3, 3))
        axes.vlines(found.confidence, found.low, found.high, color=_LINES[0], linewidth=1.2)
        size = 12 + 240 * found.images / found.images.sum()
        axes.scatter(found.confidence, found.right, s=size, color=_LINES[0], zorder=3, clip_on=False)
        axes.set(xlabel="probability given", ylabel=y_label, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        return _svg(figure, described)


def forest(rows: Sequence[tuple[str, float, float, float]], described: str, zero: bool = False) -> Html:
    """Values with their intervals, one below the other.

    Args:
        rows: Short label, value, low and high of each; NaN where undefined.
        described: What the chart shows, for those who cannot see it.
        zero: Draws a line at 0: the values are differences of one pair.
    """
    with _styled():
        figure, axes = _axes(0.6 + 0.34 * len(rows))
        for i, (_, value, low, high) in enumerate(rows):
            colour = _LINES[0 if zero else i % SERIES]
            axes.plot([low, high], [i, i], color=colour, linewidth=2)
            axes.plot([value], [i], "o", color=colour, markersize=7)
        if zero:
            axes.axvline(0, color=_SOFT, linewidth=1, dashes=(3, 3))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.grid(visible=False, axis="y")
        return _svg(figure, described)


def _styled() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "a",  # the same chart has the same names each time
            "font.size": _FONT,
            "text.parse_math": False,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _SOFT,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": _RULE,
            "grid.linewidth": 0.8,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "xtick.color": _SOFT,
            "ytick.color": _SOFT,
            "xtick.labelcolor": _INK,
            "ytick.labelcolor": _INK,
            "axes.formatter.use_mathtext": False,
            "axes.formatter.useoffset": False,
        }
    )


def _axes(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: "Figure", described: str) -> Html:
    """A figure as an element of a page: no fonts, sizes, colours or names of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    content = re.search(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>(.*)</svg>", file.getvalue(), re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", content[2], flags=re.DOTALL)
    body = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", body)
    body = _own_names(body, f"c{zlib.crc32((described + body).encode()):x}")
    for stand_in, colour in _COLOURS.items():
        body = body.replace(stand_in, colour)
    body = re.sub(r"(\d+\.\d{2})\d+", r"\1", re.sub(r"\s*\n\s*", "\n", body))
    return tag("svg", Html(body), viewBox=content[1], role="img", aria_label=described)


def _own_names(body: str, prefix: str) -> str:
    """Names within the chart that no other chart of the page has; those that nothing refers to are left out."""
    referred = dict.fromkeys(re.findall(r'(?:"|url\()#([^")]+)', body))
    names = {name: f"{prefix}-{i}" for i, name in enumerate(referred)}

    def named(match: re.Match[str]) -> str:
        return f' id="{names[match[1]]}"' if match[1] in names else ""

    body = re.sub(r' id="([^"]*)"', named, body)
    for old, new in names.items():
        body = body.replace(f'"#{old}"', f'"#{new}"').replace(f"url(#{old})", f"url(#{new})")
    return body


def heat_map(path: Path, values: Mapping[str, float], title: str) -> None:
    """Draws a number per layer as a PNG: a row per block, a column per matrix; `values` is by path of a layer.

    A layer outside the blocks that is one matrix, such as the head, has a column without a name.
    """
    from matplotlib.figure import Figure

    cells = {(row, column): value for name, value in values.items() for row, _, column in (name.partition("/"),)}
    number = re.compile(r"\d+")
    rows = sorted({row for row, _ in cells}, key=lambda row: ([int(n) for n in number.findall(row)], row))
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
    write_figure(path, figure)
