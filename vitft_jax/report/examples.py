"""Pictures on a page: images of the split with what was said of them, and the figures that a run has."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitft_jax.data import Dataset
from vitft_jax.errors import InputError
from vitft_jax.report.markup import Html, join, outside, tag
from vitft_jax.report.predictions import Predictions

WRONG, RIGHT = 12, 6
_SIDE = 176  # of a thumbnail, pixels
_FIGURE = 1100  # widest figure, pixels
_SMALL = 120_000  # bytes of a PNG that goes in as it is
CAPTIONS = {
    "patches": "Patches that go on after the blocks that skip; the dark red ones take no further part.",
    "attention": "Attention roll-out, in multiples of its mean; it explains no decision, see docs/look.md.",
    "saliency": "Slope of the highest logit by pixel, in multiples of its mean; it explains no decision, see docs/look.md.",
    "active_rank": "AdaLoRA: the rank that each matrix was left with.",
}


def confidence(p: Predictions) -> np.ndarray:
    """How sure each decision is, `(n,)`: the probability of the class that was decided.

    Of labels, where some are wrong, how far the probability of one of these is from the truth, at most; else the probability
    that was left for the truth of the label of which the model was least sure.
    """
    if not p.multilabel:
        return p.probabilities[np.arange(len(p.decided)), p.decided]
    off = np.abs(p.probabilities - p.labels)
    wrong = p.decided != p.labels
    return np.where(wrong.any(axis=1), np.where(wrong, off, 0).max(axis=1), (1 - off).min(axis=1))


def chosen(p: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Positions of images to show: the mistakes, the surest first; and right ones, evenly from the surest to the least sure."""
    right = (p.decided == p.labels).all(axis=1) if p.multilabel else p.decided == p.labels
    order = np.argsort(-confidence(p), kind="stable")
    wrong, good = order[~right[order]], order[right[order]]
    return wrong[:WRONG], good[np.linspace(0, len(good) - 1, min(RIGHT, len(good))).round().astype(int)]


def gallery(p: Predictions, positions: Sequence[int], dataset: Dataset) -> Html:
    """Images with the truth, the decision and its probability."""
    place = {name: i for i, name in enumerate(dataset.names)}
    sure = confidence(p)
    return tag("div", [_example(p, i, sure[i], dataset, place) for i in positions], class_="examples")


def _example(p: Predictions, i: int, sure: float, dataset: Dataset, place: dict[str, int]) -> Html:
    truth, decided = (_names(p, row) for row in (p.labels[i], p.decided[i]))
    right = truth == decided
    described = f"{p.names[i]}: truth {truth}, decided {decided}"
    group = join("group ", outside(p.groups[i]), tag("br")) if p.groups[i] != p.names[i] else None
    return tag(
        "figure",
        _thumbnail(dataset, place.get(p.names[i]), described),
        tag(
            "figcaption",
            tag("span", "right: " if right else "wrong: ", outside(decided), class_="right" if right else "wrong"),
            f" {sure:.2f}" if right or not p.multilabel else None,
            None if right else join(tag("br"), "truth: ", outside(truth)),
            [join(tag("br"), line) for line in _faults(p, i)],
            tag("br"),
            group,
            tag("small", outside(p.names[i].rsplit("/", 1)[-1]), title=p.names[i]),
        ),
    )


def _faults(p: Predictions, i: int) -> list[Html]:
    """Of labels, those that are wrong of an image, each with its probability."""
    wrong = np.flatnonzero(p.decided[i] != p.labels[i]) if p.multilabel else []
    kinds = ("false alarm", "missed")
    return [join(f"{kinds[p.labels[i, c]]}: ", outside(p.classes[c]), f" {p.probabilities[i, c]:.2f}") for c in wrong]


def _names(p: Predictions, row: np.ndarray) -> str:
    if not p.multilabel:
        return p.classes[row]
    return ", ".join(c for c, on in zip(p.classes, row, strict=True) if on) or "no label"


def _thumbnail(dataset: Dataset, position: int | None, described: str) -> Html:
    try:
        if position is None:
            raise InputError("it is not in the data any more")
        image = dataset.images[position].convert("RGB")
    except (InputError, OSError) as error:
        return tag("div", f"cannot be shown: {error}", class_="missing")
    image.thumbnail((_SIDE, _SIDE))
    return tag("img", src=_data(_encoded(image, "JPEG", quality=72)), alt=described)


def figure(path: Path) -> Html:
    """A figure of a run, with a caption by its name."""
    title = path.stem.replace("_", " ")
    caption = CAPTIONS.get(path.stem, title)
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            if len(content) > _SMALL:
                image = image.convert("RGB")
                image.thumbnail((_FIGURE, 10 * _FIGURE))
                content = min(_encoded(image, "JPEG", quality=80), content, key=len)
    except (OSError, Image.DecompressionBombError) as error:
        return tag("p", "The figure ", outside(path.name), f" cannot be read: {error}")
    shown = tag("img", src=_data(content), alt=f"{title}: {caption}", width=size[0], height=size[1])
    return tag("figure", tag("h3", title), shown, tag("figcaption", caption), class_="wide")


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _data(content: bytes) -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
