"""Maps over images, such as those of attention and saliency: each image as it is, and beside it under its map."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from vitft_jax import report
from vitft_jax.sheets import COLOURS

_INCH = 2.6  # side of one image
_PAIRS = 2  # a row
_HUE = (1.0, 0.1, 0.8)  # neither of grey tissue, of Doppler's reds and blues, nor of yellow callipers
_OPAQUE = 0.7  # at the top of the scale: tissue shows through
_TOP = 0.99  # the quantile of all values that is the top of the scale
_LONGEST = 66  # characters of a line of a caption


@dataclass(frozen=True)
class Overlay:
    """One image and its map.

    Attributes:
        picture: uint8 `(S, S, 3)`, as the model sees it.
        values: Of its pixels, or of squares of them, `(n, n)`, none negative.
        caption: Lines of text above it.
        aspect: Height over width of what is shown: that of the image before it was squashed.
        right: Colours the caption: green, red, or black for None.
    """

    picture: np.ndarray
    values: np.ndarray
    caption: str
    aspect: float = 1.0
    right: bool | None = None


def relative(values: np.ndarray) -> np.ndarray:
    """Values, none negative, as multiples of their mean; all 1 where they are all 0."""
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)


def top(maps: Sequence[np.ndarray]) -> float:
    """The top of the scale that maps of `relative` values share: single spots would leave all else pale."""
    return max(1.1, float(np.quantile(np.concatenate([values.ravel() for values in maps]), _TOP)))


def draw(path: Path, overlays: Sequence[Overlay], title: str) -> None:
    """Writes a PNG, whole or not at all.

    All maps have one scale, in multiples of the mean of their image, so that a flat map looks flat: clear up to 1, and from
    there ever more coloured.

    Args:
        path: Of the PNG; its folder is there.
        overlays: At least one.
        title: Says what is drawn.
    """
    maps = [relative(overlay.values) for overlay in overlays]
    norm = Normalize(1, top(maps))
    cmap = LinearSegmentedColormap.from_list("overlay", [(*_HUE, 0), (*_HUE, _OPAQUE)])
    pairs = min(_PAIRS, len(overlays))
    rows = -(-len(overlays) // pairs)
    tallest = max(overlay.aspect for overlay in overlays)
    size = (2 * _INCH * pairs + 1, (_INCH * min(tallest, 2) + 0.5) * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    figure.suptitle(textwrap.fill(title, _LONGEST * pairs), fontsize=9)
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for (plain, covered), overlay, values in zip(axes.reshape(-1, 2), overlays, maps, strict=False):
        side = overlay.picture.shape[0]
        how = {"extent": (0, side, side, 0), "aspect": overlay.aspect}
        plain.imshow(overlay.picture, **how)
        covered.imshow(overlay.picture, **how)
        covered.imshow(values, cmap=cmap, norm=norm, interpolation="nearest", **how)
        text = "\n".join(map(_shortened, overlay.caption.split("\n")))
        plain.set_title(text, fontsize=7, color=COLOURS[overlay.right], loc="left", parse_math=False)
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, shrink=0.5, aspect=30)
    bar.ax.set_facecolor("black")
    bar.set_label("times the mean of the image (the top: or more)", fontsize=8)
    report.write_figure(path, figure)


def _shortened(line: str) -> str:
    """A line as wide as two images: its end, which tells more of a path than its beginning."""
    return line if len(line) <= _LONGEST else f"...{line[3 - _LONGEST :]}"
