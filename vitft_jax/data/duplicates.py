"""Finds images that are the same, nearly the same, or mirrored: pixels alone, no network.

Two frames of one scan, or a scan with and without the marks of a measurement, differ little; two patients often differ little
too, as every scan is bright above and dark below. What tells them apart is detail. So of a thumbnail of 32 x 32 only what is
finer than a Gaussian of one pixel is kept, scaled to unit length; what the whole set has in common (such as the frame of a
scanner's screen) is subtracted, and the cosine is taken between all pairs.

Measured on BUSI (780 breast scans, 303,810 pairs), on which NEAR was chosen: 223 pairs reach it, and all of them show one
scene. 149 of the 150 pairs within the groups of its table are among them, and 74 that these groups miss, all looked at.
Unrelated pairs stay below 0.35. With the frame of a screen drawn around every image 55 unrelated pairs are found too. Of
886 generated scans of 450 patients (see `phantom`) 164 pairs are found, all of them views of one patient. Changes of
brightness, contrast, size and compression are seen through, and shifts by a sixtieth of the width; of shifts by a thirtieth
most are found, by a twentieth few. A crop of a fiftieth on every side is seen through, one of twice that is not.
"""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

if TYPE_CHECKING:
    from vitft_jax.data.sources import Dataset

SIDE = 32  # of a thumbnail, pixels
NEAR = 0.4  # cosine from which two images are near duplicates
MIRRORED = 0.6  # the same with one of them mirrored, which nobody does by hand: unrelated pairs reach 0.45 on BUSI
FEWEST = 16  # images; what fewer have in common says little of what they would have in common with others
MOST = 1_000_000  # pairs to collect
AT_START = 10_000  # images to compare when training starts
_BLOCK = 1024  # rows of the table of all pairs at a time
_THREADS = 4


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image: the SHA-256 of its size and pixels, and its thumbnail, float32 `(SIDE, SIDE)`."""

    digest: bytes
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two images that are alike, by position.

    Attributes:
        first: Position of one; of exact copies, the first of them.
        second: Position of the other, larger.
        kind: 'exact', 'near' or 'mirrored'.
        similarity: Cosine; 1 if exact.
    """

    first: int
    second: int
    kind: str
    similarity: float


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an image of mode 'L' or 'RGB'."""
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("L")
    return Fingerprint(digest.digest(), np.asarray(small, np.float32))


def fingerprints(images: Sequence[Image.Image]) -> list[Fingerprint]:
    """Fingerprints of all images, which must be readable, by a few threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda i: fingerprint(images[i]), range(len(images))))


def pairs(prints: Sequence[Fingerprint]) -> list[Pair]:
    """Pairs that are alike, by kind and falling similarity.

    Each exact copy of an image is paired with the first, which alone is compared with others. Of more than MOST near pairs
    those of the later images are left out.
    """
    first: dict[bytes, int] = {}
    found = []
    for i, print_ in enumerate(prints):
        if (j := first.setdefault(print_.digest, i)) != i:
            found.append(Pair(j, i, "exact", 1.0))
    if not first:
        return []
    distinct = np.array(list(first.values()))
    vectors = _vectors(np.stack([prints[i].thumbnail for i in distinct]))
    alike = sorted(_alike(vectors), key=lambda pair: -pair[2])
    for kind in (False, True):
        found += [
            Pair(int(distinct[i]), int(distinct[j]), "mirrored" if mirrored else "near", similarity)
            for i, j, similarity, mirrored in alike
            if mirrored == kind
        ]
    return found


def _vectors(thumbnails: np.ndarray) -> np.ndarray:
    """Detail of thumbnails `(n, SIDE, SIDE)`, of unit length each; zeros where there is none or no more than all have."""
    detail = _unit(thumbnails - ndimage.gaussian_filter(thumbnails, (0, 1, 1)))
    return _unit(detail - detail.mean(axis=0)) if len(detail) >= FEWEST else detail


def _unit(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(length > 1e-3, flat / np.maximum(length, 1e-3), 0).reshape(values.shape).astype(np.float32)


def _alike(vectors: np.ndarray) -> Iterable[tuple[int, int, float, bool]]:
    """Pairs (i, j, cosine, mirrored) with i < j of vectors `(n, SIDE, SIDE)`."""
    plain, turned = vectors.reshape(len(vectors), -1), vectors[:, :, ::-1].reshape(len(vectors), -1)
    count = 0
    for start in range(0, len(plain), _BLOCK):
        rows = plain[start : start + _BLOCK]
        same, mirror = rows @ plain[start:].T, rows @ turned[start:].T
        mirrored = (mirror >= MIRRORED) & (mirror > same)
        for i, j in np.argwhere(np.triu((same >= NEAR) | mirrored, 1)):
            if (count := count + 1) > MOST:
                return
            cosine = mirror[i, j] if mirrored[i, j] else same[i, j]
            yield start + int(i), start + int(j), float(cosine), bool(mirrored[i, j])


def across(dataset: "Dataset") -> list[Pair] | None:
    """Pairs that lie in different splits; None where nothing is compared, as there are more images than AT_START.

    The images must be readable.
    """
    if len(dataset) > AT_START:
        return None
    found = pairs(fingerprints(dataset.images))
    return [pair for pair in found if dataset.splits[pair.first] != dataset.splits[pair.second]]


def counts(found: Sequence[Pair]) -> dict[str, int]:
    """How many pairs are the same, and how many nearly so."""
    exact = sum(pair.kind == "exact" for pair in found)
    return {"exact": exact, "near": len(found) - exact}


def warning(dataset: "Dataset", found: Sequence[Pair] | None) -> str:
    """What to say at the start of training of what `across` found; '' if there is nothing to say."""
    if not found:
        return ""
    count = counts(found)
    listed = "; ".join(
        f"{dataset.names[p.first]} ({dataset.splits[p.first]}) = {dataset.names[p.second]} ({dataset.splits[p.second]})"
        for p in found[:3]
    )
    return (
        f"warning: {len(found)} pairs of images are the same ({count['exact']}) or nearly the same ({count['near']}) and lie "
        f"in different splits, so results may look better than they are: {listed}{' ...' if len(found) > 3 else ''}. "
        "python -m vitft_jax.check_data with the same --config shows them"
    )
