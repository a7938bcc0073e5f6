"""A small physical model of a B-mode ultrasound image: NumPy and SciPy, pure functions.

The echo signal is linear in the tissue: the complex (IQ) signal is a field of scatterers convolved with a point-spread
function that changes with depth (Ng et al. 2007; Dantas et al. 2005 for the separable Gaussian form). Many scatterers per
resolution cell have independent phases, so the complex scatterers are Gaussian and their envelope is Rayleigh speckle
(Wagner et al. 1983). Beam, pulse, attenuation, time-gain compensation and scan conversion follow Szabo, Diagnostic
Ultrasound Imaging (2nd ed. 2014), chapters 4, 8, 10 and 12. Elevation, refraction, multiple scattering and
non-linear propagation are left out.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from scipy import fft, ndimage

SPEED_MM_PER_US = 1.54  # of sound, the mean of soft tissue, which every scanner assumes
SIDE = 128  # pixels of a displayed image: nine tokens a side at patch 14, and quick to make by the thousand
RANGES, LINES = 384, 192  # samples of the signal: fewer would undersample the pulse and the beam at 7.5 MHz
COMPENSATED = 0.7  # dB/cm/MHz that time-gain compensation assumes (Szabo, appendix B: soft tissue 0.5-1)
NEPER = 20 / math.log(10)  # decibels of a factor e


@dataclass(frozen=True)
class Domain:
    """A probe and its settings.

    Attributes:
      geometry: 'linear' (parallel lines, the image is filled) or 'convex' (a sector, black outside).
      frequency_mhz: centre of the pulse.
      bandwidth: -6 dB width of the pulse's spectrum, relative to its centre.
      f_number: depth over aperture, of transmission at the focus and of reception.
      focus_cm: depth of the transmit focus.
      aperture_cm: the largest receiving aperture; deeper than f_number * aperture_cm the beam widens.
      depth_cm: range of the image.
      width_cm: of the probe's face.
      radius_cm: of the face's curvature; convex only.
      gain_db: overall receive gain.
      dynamic_range_db: from black to white.
      tgc_error_db: standard deviation of what is wrong with the time-gain compensation, which varies with depth.
      contact_db: standard deviation of the loss between probe and skin, which varies along the face.
      smoothing: of grey across scan lines, as scanners do against speckle: standard deviation in lines; half as much
        along depth, in pixels.
      noise_db: electronic noise before amplification; 0 dB is an echo that would be white at the surface.
    """

    geometry: str = "linear"
    frequency_mhz: float = 7.5
    bandwidth: float = 0.6
    f_number: float = 3.0
    focus_cm: float = 1.8
    aperture_cm: float = 1.2
    depth_cm: float = 4.0
    width_cm: float = 4.0
    radius_cm: float = 5.0
    gain_db: float = 6.0
    dynamic_range_db: float = 50.0
    tgc_error_db: float = 2.0
    contact_db: float = 4.0
    smoothing: float = 0.9
    noise_db: float = -85.0


class Tissue(NamedTuple):
    """Acoustic properties at some points; arrays of one shape.

    Attributes:
      scatter: standard deviation of the echo of diffuse scatterers; 1 is white at the surface with no gain.
      mirror: amplitude of the coherent echo of smooth interfaces.
      attenuation: dB/cm/MHz, one way.
    """

    scatter: np.ndarray
    mirror: np.ndarray
    attenuation: np.ndarray


class Scene(Protocol):
    """What can be scanned: tissue as a function of place."""

    def sample(self, x_mm: np.ndarray, z_mm: np.ndarray, /) -> Tissue:
        """Tissue at lateral positions (0 is the probe's middle) and depths below the probe's face; they broadcast."""
        ...


def axial_sigma_mm(domain: Domain) -> float:
    """Standard deviation of the pulse's envelope along depth, in mm.

    The amplitude spectrum is a Gaussian of full width B f at half its height (-6 dB), so the envelope has
    sigma_t = sqrt(2 ln 2) / (pi B f); echoes from z arrive at t = 2 z / c.
    """
    sigma_us = math.sqrt(2 * math.log(2)) / (math.pi * domain.bandwidth * domain.frequency_mhz)
    return SPEED_MM_PER_US * sigma_us / 2


def lateral_sigma_mm(domain: Domain, depth_mm: np.ndarray) -> np.ndarray:
    """Standard deviation of the two-way beam across its axis, in mm, at each depth.

    Transmission is a beam of waist lambda F at its fixed focus, whose half depth of field is 3.5 lambda F^2. Reception
    is focused everywhere, with an aperture that grows with depth up to its limit. Both are taken as Gaussian, of full
    width lambda F at half height, and multiply.
    """
    wavelength = SPEED_MM_PER_US / domain.frequency_mhz
    to_sigma = wavelength / math.sqrt(8 * math.log(2))
    reach = 3.5 * wavelength * domain.f_number**2
    transmit = to_sigma * domain.f_number * np.hypot(1, (depth_mm - 10 * domain.focus_cm) / reach)
    receive = to_sigma * np.maximum(domain.f_number, depth_mm / (10 * domain.aperture_cm))
    return transmit * receive / np.hypot(transmit, receive)


class Lines(NamedTuple):
    """Where the signal is sampled: depth (RANGES, 1), its step; lateral position; angle step; line spacing (mm)."""

    depth: np.ndarray
    step: float
    x: np.ndarray  # (1, LINES) or (RANGES, LINES)
    z: np.ndarray  # (RANGES, 1) or (RANGES, LINES)
    spacing: np.ndarray  # (RANGES, 1)


@lru_cache(maxsize=64)
def scan_lines(domain: Domain) -> Lines:
    """Places of the samples of all scan lines."""
    step = 10 * domain.depth_cm / RANGES
    depth = (np.arange(RANGES, dtype=np.float32)[:, None] + 0.5) * np.float32(step)
    across = ((np.arange(LINES, dtype=np.float32)[None] + 0.5) / LINES - 0.5) * np.float32(10 * domain.width_cm)
    spacing = np.full_like(depth, 10 * domain.width_cm / LINES)
    if domain.geometry == "linear":
        return Lines(depth, step, across, depth, spacing)
    radius = np.float32(10 * domain.radius_cm)
    angle = across / radius
    distance = radius + depth
    x, z = distance * np.sin(angle), distance * np.cos(angle) - radius
    # A curved face presses into the skin: layers follow it near by and lie flat a centimetre deeper.
    z += radius * (1 - np.cos(angle)) * np.exp(-depth / 10)
    return Lines(depth, step, x, z, spacing * distance / radius)


def white(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Circular complex Gaussian numbers of variance 1 (complex64): many scatterers with independent phases."""
    pairs = rng.standard_normal((*shape, 2), np.float32)
    pairs *= np.float32(math.sqrt(0.5))
    return pairs.view(np.complex64)[..., 0]


def convolve(sources: np.ndarray, domain: Domain) -> np.ndarray:
    """The IQ signal of complex sources (RANGES, LINES): convolution with the pulse and the depth-dependent beam.

    Both are scaled so that white noise keeps its variance, so a uniform tissue is equally bright at every depth.
    """
    lines = scan_lines(domain)
    frequency = fft.fftfreq(LINES).astype(np.float32)
    sigma = (lateral_sigma_mm(domain, lines.depth) / lines.spacing).astype(np.float32)
    beam = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    beam /= np.sqrt(np.mean(beam**2, axis=1, keepdims=True))
    signal = fft.ifft(fft.fft(sources, axis=1) * beam, axis=1)
    sigma = axial_sigma_mm(domain) / lines.step
    reach = math.ceil(3 * sigma)
    pulse = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    pulse /= np.sqrt(np.sum(pulse**2))
    pulse = pulse.astype(np.float32)
    out = np.empty_like(signal)
    out.real = ndimage.correlate1d(signal.real, pulse, axis=0, mode="reflect")
    out.imag = ndimage.correlate1d(signal.imag, pulse, axis=0, mode="reflect")
    return out


def drift(rng: np.random.Generator, count: int, knots: int, sigma: float) -> np.ndarray:
    """A smooth random curve (count,): Gaussian values at knots, interpolated; standard deviation about `sigma`."""
    values = rng.normal(0, sigma, knots)
    return ndimage.zoom(values, count / knots, order=3, mode="nearest", grid_mode=True).astype(np.float32)


def acquire(scene: Scene, domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """The compensated IQ signal of a scene, complex64 (RANGES, LINES); 1 is white at 0 dB gain."""
    lines = scan_lines(domain)
    tissue = scene.sample(lines.x, lines.z)
    # Two ways through the tissue above each sample.
    loss_db = np.cumsum(tissue.attenuation, axis=0)
    loss_db *= np.float32(2 * domain.frequency_mhz * lines.step / 10)
    loss_db += np.maximum(drift(rng, LINES, 10, domain.contact_db), 0)
    sources = white(rng, (RANGES, LINES))
    # Numbers from half an image away are independent of a sample's neighbourhood, and to draw as many again is slow.
    noise = np.roll(sources, (RANGES // 2, LINES // 2), axis=(0, 1)) * np.float32(10 ** (domain.noise_db / 20))
    sources *= tissue.scatter
    sources.real += tissue.mirror
    sources *= np.exp(loss_db / np.float32(-NEPER))
    signal = convolve(sources, domain)
    signal += noise
    tgc_db = 2 * domain.frequency_mhz * COMPENSATED * lines.depth / 10
    tgc_db = tgc_db + drift(rng, RANGES, 6, domain.tgc_error_db)[:, None]
    signal *= np.exp(tgc_db / np.float32(NEPER))
    return signal


def compress(envelope: np.ndarray, domain: Domain) -> np.ndarray:
    """Logarithmic compression of an envelope to grey in 0..1; 0 dB is white, -dynamic_range_db is black."""
    grey = np.log(np.maximum(envelope, np.float32(1e-9)))
    grey *= np.float32(NEPER / domain.dynamic_range_db)
    grey += np.float32(1 + domain.gain_db / domain.dynamic_range_db)
    return np.clip(grey, 0, 1, out=grey)


def display(grey: np.ndarray, domain: Domain) -> np.ndarray:
    """Brings grey (RANGES, LINES) to the screen: uint8 (SIDE, SIDE), for a sector with black outside."""
    grey = grey.reshape(SIDE, RANGES // SIDE, LINES).mean(1)
    grey = ndimage.gaussian_filter(grey, (domain.smoothing / 2, domain.smoothing), mode="nearest", truncate=2.5)
    if domain.geometry == "linear":
        shown = _averaged(grey)
    else:
        rows, columns, inside = _sector(domain)
        shown = ndimage.map_coordinates(grey, (rows, columns), order=1, mode="nearest")
        shown *= inside
    return np.rint(255 * shown).astype(np.uint8)


def _averaged(grey: np.ndarray) -> np.ndarray:
    """(SIDE, LINES) to (SIDE, SIDE): three lines become two pixels, by area."""
    thirds = grey.reshape(SIDE, SIDE // 2, 3)
    pixels = np.stack([2 * thirds[..., 0] + thirds[..., 1], thirds[..., 1] + 2 * thirds[..., 2]], axis=-1)
    return pixels.reshape(SIDE, SIDE) / 3


@lru_cache(maxsize=64)
def _sector(domain: Domain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates in a (SIDE, LINES) image for each pixel of the screen, and which pixels lie in the sector."""
    radius, depth = 10 * domain.radius_cm, 10 * domain.depth_cm
    half = 5 * domain.width_cm / radius
    top = radius * math.cos(half)  # the sector's highest points are the ends of the face
    side = max(radius + depth - top, 2 * (radius + depth) * math.sin(half))
    pixel = side / SIDE
    z = top + (radius + depth - top - side) / 2 + (np.arange(SIDE)[:, None] + 0.5) * pixel
    x = (np.arange(SIDE)[None] + 0.5) * pixel - side / 2
    distance, angle = np.hypot(x, z) - radius, np.arctan2(x, z)
    inside = (distance >= 0) & (distance < depth) & (np.abs(angle) < half)
    rows = distance / depth * SIDE - 0.5
    columns = (angle / half + 1) / 2 * LINES - 0.5
    return rows.astype(np.float32), columns.astype(np.float32), inside.astype(np.float32)


def scan(scene: Scene, domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """A B-mode image of a scene: uint8 (SIDE, SIDE)."""
    return display(compress(np.abs(acquire(scene, domain, rng)), domain), domain)
