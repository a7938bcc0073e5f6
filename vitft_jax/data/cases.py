"""The generated sets: which patients and videos they have, and the image of each. Example i depends on i alone.

`source` and `target` show breasts (normal, benign, malignant), by two scanners; `video` shows amniotic fluid in short
clips, each frame with three labels.
"""

import io
import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitft_jax.data.anatomy import CLASSES, View, breast, pocket
from vitft_jax.data.ultrasound import Domain, scan

SEED = 20240  # of all that is generated; another one makes other sets of the same kind
LABELS = ("bad_quality", "cord", "fluid")

# A probe for the breast, as in most public sets; and one that sees the same anatomy worse: longer waves, a sector,
# more gain, less range of grey and more noise.
DOMAINS = {
    "source": Domain(),
    "target": Domain(
        geometry="convex",
        frequency_mhz=6.0,
        focus_cm=3.0,
        aperture_cm=1.5,
        depth_cm=4.2,
        width_cm=2.6,
        radius_cm=4.0,
        gain_db=8.0,
        dynamic_range_db=50.0,
        tgc_error_db=3.0,
        contact_db=5.0,
        smoothing=0.7,
        noise_db=-76.0,
    ),
    "video": Domain(
        geometry="convex",
        frequency_mhz=3.5,
        focus_cm=6.0,
        aperture_cm=3.0,
        depth_cm=12.0,
        width_cm=6.0,
        radius_cm=5.0,
        gain_db=2.0,
        dynamic_range_db=56.0,
        contact_db=3.0,
        noise_db=-90.0,
    ),
}

PATIENTS = {
    "source": 1500,  # about 3,000 images: enough to learn the task from noise in minutes on a CPU
    "target": 450,  # about 900: a specialised set as small as the public ones, once split in three
}
MOST_IMAGES = 3  # of a patient, at least 1
VIDEOS, FRAMES = 60, 12  # enough videos for a split by video; frames enough that a split by frame leaks plainly
_PATIENT, _EXAMPLE = 0, 1  # streams of random numbers


class Case(NamedTuple):
    """What is known of an example before it is made.

    Attributes:
      group: patient or video.
      name: unique within the set.
      labels: (class,), or the three of LABELS.
      patient: number of the patient or video.
      position: number of the image or frame within it.
    """

    group: str
    name: str
    labels: tuple[int, ...]
    patient: int
    position: int


@lru_cache(maxsize=8)
def cases(config: str) -> tuple[Case, ...]:
    """All examples of a set, in order."""
    rng = np.random.default_rng((SEED, *config.encode()))
    found = []
    if config == "video":
        for video in range(VIDEOS):
            fluid, cord, bad = rng.random() < 0.5, rng.random() < 0.45, rng.random() < 0.4
            # The cord drifts into the plane or out of it, and the probe loses contact for a while.
            seen, poor = (np.sort(rng.choice(FRAMES + 1, 2, replace=False)) for _ in range(2))
            for frame in range(FRAMES):
                labels = (bad and poor[0] <= frame < poor[1], cord and seen[0] <= frame < seen[1], fluid)
                group = f"video_{video:03}"
                found.append(Case(group, f"{group}_frame_{frame:02}", tuple(map(int, labels)), video, frame))
        return tuple(found)
    for patient in range(PATIENTS[config]):
        group = f"{config}_{patient:04}"
        for image in range(rng.integers(1, MOST_IMAGES + 1)):
            found.append(Case(group, f"{group}_{image}", (patient % len(CLASSES),), patient, image))
    return tuple(found)


def image(config: str, index: int) -> np.ndarray:
    """Image of an example: uint8 (128, 128). It depends on the arguments alone."""
    case = cases(config)[index]
    domain, stream = DOMAINS[config], (SEED, *config.encode())
    rng = np.random.default_rng((*stream, _EXAMPLE, index))
    patient = (*stream, _PATIENT, case.patient)
    habits = np.random.default_rng((*patient, 1))  # of the one who held the probe
    domain = replace(domain, gain_db=domain.gain_db + habits.normal(0, 3))
    size = extent(domain)
    if config == "video":
        bad, cord, fluid = case.labels
        view = _move(habits, case.position, (*stream, _PATIENT, case.patient, 2))
        if bad:
            worse = habits.uniform(0.5, 1.2, 3)
            domain = replace(
                domain,
                contact_db=domain.contact_db + 30 * worse[0],
                gain_db=domain.gain_db - 9 * worse[1],
                noise_db=domain.noise_db + 22 * worse[2],
            )
        return scan(pocket(patient, bool(fluid), bool(cord), view, *size), domain, rng)
    shift = (rng.uniform(-4, 4), rng.uniform(0, 2))
    view = View(rng.uniform(0, 0.6), shift, (*stream, _EXAMPLE, index, 1))
    return scan(breast(patient, CLASSES[case.labels[0]], view, *size), domain, rng)


def png(config: str, index: int) -> bytes:
    """`image` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image(config, index)).save(file, "PNG", compress_level=1)  # speckle does not compress further
    return file.getvalue()


def _move(rng: np.random.Generator, frame: int, seed: tuple[int, ...]) -> View:
    """A probe that slides and tilts slowly: a few mm and some tenths of a radian over a video."""
    time = 2 * math.pi * frame / FRAMES
    rates, phases = rng.uniform(0.3, 1, 3), rng.uniform(0, 2 * math.pi, 3)
    x, z, plane = np.array((5, 1.5, 0.3)) * np.sin(time * rates + phases)
    return View(float(plane), (float(x), float(z)), seed)


def extent(domain: Domain) -> tuple[float, float]:
    """Width and depth in mm that a probe sees."""
    if domain.geometry == "linear":
        return 10 * domain.width_cm, 10 * domain.depth_cm
    reach = 10 * (domain.radius_cm + domain.depth_cm)
    return 2 * reach * math.sin(domain.width_cm / domain.radius_cm / 2), 10 * domain.depth_cm
