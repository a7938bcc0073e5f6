"""Random cross-sections to scan: a breast with or without a lesion, and a pocket of amniotic fluid with a cord.

Tissue is drawn on a grid that is finer than a beam. Echo levels and attenuation are of the order that Szabo (Diagnostic
Ultrasound Imaging, appendix B) and Duck (Physical Properties of Tissue, 1990) list; lesions vary along the
descriptors of BI-RADS ultrasound (shape, orientation, margin, echo pattern, posterior features, calcifications). The
ranges of the classes overlap, as they do in life.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy import sparse

from vitft_jax.data.ultrasound import Tissue

GRID = 192  # cells a side
MARGIN_MM = 6.0  # tissue beyond what a probe of the given size sees, to move the probe into


@dataclass(frozen=True, eq=False)
class Section:
    """A cross-section on a grid, seen from a probe at `shift`, gently folded along `bends`.

    Attributes:
      width_mm: lateral extent; 0 is the middle.
      depth_mm: extent in depth.
      maps: float32 (GRID, GRID, 4): scatter, mirror and attenuation as in `Tissue`, and the share of lesion, 0..1.
      bends: (amplitude, wavelength, phase) of layers, in mm, mm and radians.
      shift: lateral and axial offset of the probe in mm.
    """

    width_mm: float
    depth_mm: float
    maps: np.ndarray
    bends: tuple[tuple[float, float, float], ...] = ()
    shift: tuple[float, float] = (0.0, 0.0)

    def sample(self, x_mm: np.ndarray, z_mm: np.ndarray) -> Tissue:
        """Tissue at the nearest cells; outside of the grid, at its edge."""
        found = self._at(x_mm, z_mm)
        return Tissue(found[..., 0], found[..., 1], found[..., 2])

    def lesion(self, x_mm: np.ndarray, z_mm: np.ndarray) -> np.ndarray:
        """Share of lesion there, 0..1."""
        return self._at(x_mm, z_mm)[..., 3]

    def _at(self, x_mm: np.ndarray, z_mm: np.ndarray) -> np.ndarray:
        x, z = x_mm + np.float32(self.shift[0]), z_mm + np.float32(self.shift[1])
        fold = sum(
            np.float32(a) * np.sin(x * np.float32(2 * math.pi / wave) + np.float32(p)) for a, wave, p in self.bends
        )
        z = z + fold * np.clip(z / np.float32(10), 0, 1)  # the skin lies flat on the probe
        column = np.clip((x / np.float32(self.width_mm) + np.float32(0.5)) * GRID, 0, GRID - 1).astype(np.int32)
        row = np.clip(z * np.float32(GRID / self.depth_mm), 0, GRID - 1).astype(np.int32)
        return self.maps.reshape(-1, self.maps.shape[-1]).take(row * GRID + column, axis=0)


@dataclass(eq=False)
class Canvas:
    """Maps while they are drawn, and the smooth random fields to draw with.

    Attributes:
      rng: draws what belongs to the patient.
      slices: draws what changes from one plane through the patient to the next.
      plane: position of the plane; the fields of planes 0 and pi/2 are independent.
    """

    rng: np.random.Generator
    slices: np.random.Generator
    plane: float
    width_mm: float
    depth_mm: float
    level_db: np.ndarray = field(init=False)
    mirror: np.ndarray = field(init=False)
    attenuation: np.ndarray = field(init=False)
    lesion: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.z = ((np.arange(GRID, dtype=np.float32) + 0.5) * (self.depth_mm / GRID))[:, None].astype(np.float32)
        self.x = (((np.arange(GRID, dtype=np.float32) + 0.5) / GRID - 0.5) * self.width_mm)[None].astype(np.float32)
        self.level_db = np.zeros((GRID, GRID), np.float32)
        self.mirror = np.zeros((GRID, GRID), np.float32)
        self.attenuation = np.zeros((GRID, GRID), np.float32)
        self.lesion = np.zeros((GRID, GRID), np.float32)

    def noise(self, along_z: float, along_x: float) -> np.ndarray:
        """A smooth Gaussian field of variance 1 with the given length scales in mm: (GRID, GRID)."""
        rows, columns = _bumps(self.depth_mm, along_z), _bumps(self.width_mm, along_x)
        shape = (rows.shape[1], columns.shape[1])
        values = np.float32(math.cos(self.plane)) * self.rng.standard_normal(shape, np.float32)
        values += np.float32(math.sin(self.plane)) * self.slices.standard_normal(shape, np.float32)
        return rows @ np.ascontiguousarray((columns @ values.T).T)

    def curve(self, along_x: float, sigma: float) -> np.ndarray:
        """A smooth random curve over x of standard deviation `sigma`: (1, GRID)."""
        columns = _bumps(self.width_mm, along_x)
        return np.float32(sigma) * (columns @ self.rng.standard_normal(columns.shape[1], np.float32))[None]

    def paint(self, where: np.ndarray, level_db: np.ndarray | float, attenuation: float) -> None:
        """Replaces the tissue where `where` (0..1) is 1, mixes it between."""
        self.level_db += where * (level_db - self.level_db)
        self.attenuation += where * (np.float32(attenuation) - self.attenuation)

    def section(self, bends: tuple, shift: tuple[float, float]) -> Section:
        """What was drawn, to be scanned."""
        scatter = np.exp(self.level_db * np.float32(math.log(10) / 20))
        maps = np.stack([scatter, self.mirror, self.attenuation, self.lesion], axis=-1)
        return Section(self.width_mm, self.depth_mm, maps, bends, shift)


@lru_cache(maxsize=256)
def _bumps(extent: float, scale: float) -> sparse.csr_array:
    """Gaussian bumps a `scale` apart over an extent, (GRID, knots), each row of length 1.

    Sparse, because few bumps reach a place; and BLAS would wake its threads for each of these small products.
    """
    knots = np.arange(-2, math.ceil(extent / scale) + 3)
    places = (np.arange(GRID) + 0.5) * (extent / GRID / scale)
    weights = np.exp(-1.5 * (places[:, None] - knots) ** 2)
    weights[weights < 1e-4] = 0
    return sparse.csr_array((weights / np.sqrt((weights**2).sum(1, keepdims=True))).astype(np.float32))


def ridges(noise: np.ndarray, width: float) -> np.ndarray:
    """Thin curved lines, 0..1, along the zeros of a field."""
    return np.exp(-((noise / np.float32(width)) ** 2))


def step(distance: np.ndarray, width: float) -> np.ndarray:
    """Goes from 0 to 1 as a distance crosses 0, over about `width` (same unit)."""
    return np.clip(0.5 + distance / np.float32(max(width, 1e-3)), 0, 1)


@dataclass(frozen=True)
class View:
    """Which plane of a patient is scanned, and from where.

    Attributes:
      plane: radians; 0 is the patient's own, pi/2 one that shares only the layout.
      shift_mm: lateral and axial offset of the probe.
      seed: of what differs between planes.
    """

    plane: float
    shift_mm: tuple[float, float]
    seed: tuple[int, ...]


_BENDS = ((2.5, (50, 110)), (0.9, (22, 45)))  # largest amplitude and range of wavelengths of folds, mm
CLASSES = ("normal", "benign", "malignant")


def breast(patient: tuple[int, ...], finding: str, view: View, width_mm: float, depth_mm: float) -> Section:
    """A breast: skin, fat with septa, gland, pectoral muscle, chest wall; with what confuses, and perhaps a lesion.

    Args:
      patient: seed of the anatomy.
      finding: one of CLASSES.
      view: plane and place.
      width_mm: width that the probe sees.
      depth_mm: depth that the probe sees.
    """
    rng = np.random.default_rng(patient)
    canvas = Canvas(rng, np.random.default_rng(view.seed), view.plane, width_mm + 2 * MARGIN_MM, depth_mm + MARGIN_MM)
    fat_end = rng.uniform(4, 13)
    gland_end = fat_end + rng.uniform(9, 22)
    bounds = _layers(canvas, fat_end, gland_end)
    _confusers(canvas, fat_end, gland_end, bounds)
    bends = tuple((rng.uniform(0, a), rng.uniform(*wave), rng.uniform(0, 2 * math.pi)) for a, wave in _BENDS)
    if finding != "normal":
        middle = rng.uniform(fat_end, min(gland_end, depth_mm * 0.62))
        _lesion(canvas, finding, rng.uniform(-0.25, 0.25) * width_mm, middle)
    return canvas.section(bends, view.shift_mm)


def _layers(c: Canvas, fat_end: float, gland_end: float) -> tuple[np.ndarray, ...]:
    """Paints the layers; returns the depth of their lower borders (1, GRID)."""
    rng = c.rng
    skin = rng.uniform(1.2, 2.4) + c.curve(15, 0.15)
    fat = fat_end + c.curve(10, rng.uniform(0.4, 1.5)) + c.curve(4, 0.4)
    gland = np.maximum(gland_end + c.curve(12, 1.5), fat + 3)
    muscle = gland + rng.uniform(5, 10) + c.curve(15, 1.0)
    density = rng.uniform(0, 1)  # from fatty to dense

    # Subcutaneous fat: dim, even, with few thin septa (Cooper's ligaments).
    coarse, fine = c.noise(3.0, 7.0), c.noise(0.7, 2.2)
    fat_db = rng.uniform(-38, -30) + 1.5 * coarse + 1.2 * fine
    c.paint(np.ones((1, 1), np.float32), fat_db, rng.uniform(0.45, 0.8))
    septa = ridges(c.noise(2.6, 14.0), 0.09) * np.clip(0.3 + c.noise(2.0, 5.0), 0, 1)
    # Gland: brighter, streaked along the layers, with dim ducts and lobules between.
    patches = c.noise(1.6, 4.0)
    holes = step(c.noise(0.9, 2.2) - rng.uniform(0.4, 2.5), 0.5)
    level = rng.uniform(-32, -26) + 3 * density + 2.0 * fine + 2.0 * coarse + 3.0 * patches - rng.uniform(4, 10) * holes
    streaks = np.clip(c.noise(0.55, 3.5) + 0.5 * patches - rng.uniform(0.2, 1.0), 0, 2) * (1 - holes)
    inside = step(c.z - fat, 0.4)
    c.paint(inside, level, rng.uniform(0.7, 1.3))
    # Muscle: dim, with bright fibre sheaths along it; then the chest wall, dim and absorbing.
    fibres = np.clip(c.noise(0.5, 8.0) - 0.5, 0, 2)
    below = step(c.z - gland, 0.4)
    c.paint(below, rng.uniform(-40, -32) + 2 * fine + 2 * coarse, 1.0)
    wall = step(c.z - muscle, 0.8)
    c.paint(wall, rng.uniform(-48, -36) + 3 * fine, 1.3)

    bright = rng.uniform(0.5, 1.3)
    c.mirror += 0.09 * bright * septa * (1 - inside)
    c.mirror += 0.035 * bright * streaks * inside * (1 - below)
    c.mirror += 0.03 * bright * fibres * below * (1 - wall)
    for border, strength in ((fat, 0.06), (gland, 0.09), (muscle, 0.12)):
        facing = np.clip(0.3 + c.curve(4, 0.8), 0, 1.5)  # an interface mirrors only where it faces the probe
        c.mirror += bright * strength * facing * np.exp(-(((c.z - border) / 0.25) ** 2))
    # Skin last: two bright lines with a middling layer between.
    c.paint(step(skin - c.z, 0.3), rng.uniform(-24, -16), 1.0)
    c.mirror *= step(c.z - skin, 0.3)
    c.mirror += 0.15 * np.exp(-(((c.z - skin) / 0.2) ** 2)) * np.clip(0.7 + c.curve(5, 0.4), 0, 1)
    c.mirror += 0.25 * np.exp(-((c.z / 0.25) ** 2))
    return fat, gland, muscle


def _confusers(c: Canvas, fat_end: float, gland_end: float, bounds: tuple[np.ndarray, ...]) -> None:
    """What every class has with the same chance and what may be taken for a lesion."""
    rng = c.rng
    lobule, duct, rib, ligament = rng.random(4)
    x, z = rng.uniform(-0.35, 0.35, 4) * c.width_mm, rng.uniform(fat_end, gland_end, 4)
    size = rng.uniform(1.5, 5, 4)
    if lobule < 0.5:  # a fat lobule in the gland: dim and oval, but it ends in a thin capsule and casts nothing
        edge = _oval(c, x[0], z[0], size[0], size[0] * rng.uniform(0.35, 0.7), rng.uniform(-0.3, 0.3))
        c.paint(step(-edge, 0.5), rng.uniform(-37, -32) + 1.5 * c.noise(1.2, 2.0), 0.5)
        c.mirror *= 1 - 0.8 * step(-edge, 0.5)
        c.mirror += 0.04 * ridges(edge, 0.18) * np.clip(0.3 + c.curve(3, 0.7), 0, 1)
    if duct < 0.3:  # a widened duct: a dark tube along the layers
        path = z[1] + c.curve(6, 0.8) + rng.uniform(-0.15, 0.15) * c.x
        width = rng.uniform(0.4, 0.9) * np.clip(1.2 - np.abs(c.x - x[1]) / (2 * size[1]), 0, 1)
        tube = step(width - np.abs(c.z - path), 0.3) * (width > 0)
        c.paint(tube, rng.uniform(-56, -42), 0.2)
        c.mirror *= 1 - tube
    if rib < 0.15:  # bright, convex, and black behind
        top = bounds[2] + (c.x - x[2]) ** 2 / 22
        across = step(6.5 - np.abs(c.x - x[2]), 1.0)
        c.attenuation += 14 * across * step(c.z - top - 0.3, 0.3)
        c.mirror += 0.25 * across * np.exp(-(((c.z - top) / 0.3) ** 2))
    if ligament < 0.4:  # a steep ligament or a fold of skin: a narrow shadow from above
        line = c.x - x[3] - 0.3 * (c.z - z[3])
        c.attenuation += rng.uniform(1, 3) * np.exp(-((line / 0.8) ** 2)) * np.exp(-(((c.z - fat_end) / 2.5) ** 2))


def _oval(c: Canvas, x: float, z: float, a: float, b: float, turn: float) -> np.ndarray:
    """About the distance in mm from an ellipse's border, negative inside."""
    u = (c.x - x) * np.float32(math.cos(turn)) + (c.z - z) * np.float32(math.sin(turn))
    v = (c.z - z) * np.float32(math.cos(turn)) - (c.x - x) * np.float32(math.sin(turn))
    return (np.hypot(u / np.float32(a), v / np.float32(b)) - 1) * np.float32(min(a, b))


def _outline(c: Canvas, harmonics: np.ndarray, spicules: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Radius of a lesion, relative to its oval, by angle.

    Args:
      c: gives the change from plane to plane.
      harmonics: amplitude of 2, 3, ... bulges around the border.
      spicules: (count, 3): angle, length and width (radians) of spikes.
      angle: where, in radians.
    """
    turns = np.linspace(-math.pi, math.pi, 361)
    order = np.arange(2, 2 + len(harmonics))[:, None]
    phase = c.rng.uniform(0, 2 * math.pi, order.shape) + math.sin(c.plane) * c.slices.normal(0, 0.8, order.shape)
    radius = 1 + (harmonics[:, None] * np.cos(order * turns + phase)).sum(0)
    for where, length, width in spicules:
        away = np.abs((turns - where + math.pi) % (2 * math.pi) - math.pi)
        radius += length * np.exp(-away / width)
    table = np.maximum(radius, 0.3).astype(np.float32)
    return table[((angle + np.float32(math.pi)) * np.float32(180 / math.pi)).astype(np.int32)]


def _lesion(c: Canvas, finding: str, x: float, z: float) -> None:
    """Paints a mass. The classes draw from overlapping ranges of the same descriptors."""
    rng = c.rng
    malignant = finding == "malignant"
    typical = rng.random() < 0.7  # the rest is drawn halfway towards the other class

    def between(benign: tuple[float, float], other: tuple[float, float]) -> float:
        low, high = other if malignant else benign
        if not typical:
            low, high = (benign[0] + other[0]) / 2, (benign[1] + other[1]) / 2
        return rng.uniform(low, high)

    width = between((2.5, 8.0), (3.0, 8.0)) * (1 - 0.25 * math.sin(c.plane) ** 2)
    height = width * between((0.45, 0.85), (0.65, 1.3))
    roughness = between((0.01, 0.07), (0.05, 0.14))
    harmonics = roughness * rng.uniform(0.3, 1.3, 9) / np.arange(1, 10) ** (0.4 if malignant else 1.0)
    spikes = rng.integers(4, 12) if rng.random() < between((0.0, 0.1), (0.4, 0.8)) else 0
    spicules = rng.uniform((-math.pi, 0.1, 0.03), (math.pi, between((0.1, 0.3), (0.3, 0.9)), 0.12), (spikes, 3))
    turn = rng.uniform(-0.25, 0.25)
    blur = between((0.2, 0.8), (0.4, 2.0))
    cyst = rng.random() < between((0.45, 0.45), (0.0, 0.04))
    level = rng.uniform(-70, -50) if cyst else between((-42, -34), (-46, -36))
    texture = 0.5 if cyst else between((0.5, 2.5), (1.5, 4.5))
    attenuation = 0.05 if cyst else between((0.2, 0.9), (0.5, 2.4))
    rim = between((0.02, 0.12), (0.0, 0.05))
    halo = max(0.0, between((-4.0, 2.0), (-2.0, 7.0)))
    calcifications = rng.integers(3, 12) if rng.random() < between((0.05, 0.1), (0.2, 0.4)) else 0

    u = (c.x - x) * np.float32(math.cos(turn)) + (c.z - z) * np.float32(math.sin(turn))
    v = (c.z - z) * np.float32(math.cos(turn)) - (c.x - x) * np.float32(math.sin(turn))
    u, v = u / np.float32(width), v / np.float32(height)
    radius = _outline(c, harmonics, spicules, np.arctan2(v, u))
    distance = (radius - np.hypot(u, v)) * np.float32(min(width, height))  # mm inside of the border
    inside = step(distance, blur)
    c.lesion = inside
    c.level_db += np.float32(halo) * np.exp(-(((distance + 1.2) / 1.2) ** 2))
    c.paint(inside, level + texture * (c.noise(0.8, 1.2) + 0.6 * c.noise(2.0, 2.0)), attenuation)
    c.mirror *= 1 - inside
    facing = np.abs(v) / (np.abs(u) + np.abs(v) + np.float32(0.1))
    c.mirror += np.float32(rim) * facing**2 * ridges(distance, 0.2)
    for _ in range(calcifications):
        place, far = rng.uniform(-math.pi, math.pi), math.sqrt(rng.random()) * 0.8
        dx, dz = c.x - x - far * width * math.cos(place), c.z - z - far * height * math.sin(place)
        c.mirror += np.float32(rng.uniform(0.05, 0.3)) * np.exp(-((dx**2 + dz**2) / 0.04).astype(np.float32))


def pocket(patient: tuple[int, ...], fluid: bool, cord: bool, view: View, width_mm: float, depth_mm: float) -> Section:
    """A pregnant uterus: abdominal wall, myometrium, perhaps a pocket of fluid and a cord, and a fetal part below.

    Args:
      patient: seed of the anatomy.
      fluid: whether there is an (anechoic) pocket of amniotic fluid.
      cord: whether the umbilical cord crosses the plane: grey jelly around two arteries and a vein.
      view: plane and place; the cord floats, so it moves with the plane.
      width_mm: width that the probe sees.
      depth_mm: depth that the probe sees.
    """
    rng = np.random.default_rng(patient)
    c = Canvas(rng, np.random.default_rng(view.seed), view.plane, width_mm + 2 * MARGIN_MM, depth_mm + MARGIN_MM)
    fat = rng.uniform(8, 18) + c.curve(40, 1.0)
    muscle = fat + rng.uniform(6, 10) + c.curve(40, 1.0)
    uterus = muscle + rng.uniform(8, 28) + c.curve(30, 2.5)  # with the placenta where it is thick
    fine, coarse = c.noise(2.5, 6.0), c.noise(9.0, 20.0)
    c.paint(np.ones((1, 1), np.float32), rng.uniform(-36, -30) + 1.5 * fine + 1.5 * coarse, 0.6)
    c.paint(step(c.z - fat, 1.5), rng.uniform(-36, -31) + 2 * fine, 0.9)
    c.paint(step(c.z - muscle, 1.5), rng.uniform(-31, -26) + 2 * fine + 2 * coarse, 0.6)
    fibres = np.clip(c.noise(1.8, 25.0) - 0.4, 0, 2)
    c.mirror += 0.03 * fibres * (c.z < muscle)
    # What lies below the wall: a fetal part with bright, absorbing bones.
    body = step(c.z - uterus, 1.5)
    c.paint(body, rng.uniform(-34, -28) + 2.5 * fine + 3 * coarse, 0.65)
    x, z = rng.uniform(-0.2, 0.2) * width_mm, rng.uniform(0.62, 0.8) * depth_mm
    bones = _oval(c, x, z, rng.uniform(18, 32), rng.uniform(14, 24), rng.uniform(-0.4, 0.4))
    shell = ridges(bones, 1.3) * np.clip(0.5 + c.noise(8, 8), 0, 1)
    c.attenuation += rng.uniform(0.5, 3) * shell
    c.mirror += 0.2 * shell
    level = float(uterus[0, GRID // 2])
    middle = (rng.uniform(-0.15, 0.15) * width_mm, level + rng.uniform(8, 22))
    edge = _oval(c, *middle, rng.uniform(14, 38), rng.uniform(7, 18), rng.uniform(-0.3, 0.3)) + 2.5 * c.noise(14, 18)
    dim = rng.uniform(-66, -48)  # vernix makes some fluid echo
    if fluid:
        inside = step(-edge, 1.5)
        c.paint(inside, dim + 2 * fine, 0.02)
        c.mirror *= 1 - inside
        c.mirror += 0.05 * ridges(edge, 1.0) * np.clip(0.4 + c.curve(12, 0.7), 0, 1)
    if cord:
        _cord(c, *middle)
    c.paint(step(2.0 - c.z, 0.5), rng.uniform(-24, -16), 1.0)
    bends = ((rng.uniform(0, 4), rng.uniform(120, 200), rng.uniform(0, 2 * math.pi)),)
    return c.section(bends, view.shift_mm)


def _cord(c: Canvas, x: float, z: float) -> None:
    """Paints a few loops of a cord, each cut across or aslant: jelly, a bright sheath, three vessels."""
    rng = c.rng
    for _ in range(rng.integers(1, 4)):
        size, long = rng.uniform(5, 8), rng.uniform(1.0, 2.6)
        u = x + rng.uniform(-16, 16) + 6 * math.sin(c.plane)
        w = z + rng.uniform(-7, 9) + 3 * math.sin(2 * c.plane)
        turn = rng.uniform(-0.7, 0.7)
        edge = _oval(c, u, w, size * long, size, turn)
        c.paint(step(-edge, 1.0), rng.uniform(-35, -29), 0.5)
        c.mirror += 0.06 * ridges(edge, 0.8)
        first = rng.uniform(0, 2 * math.pi)
        for i, bore in enumerate((0.34, 0.24, 0.24)):
            angle = first + i * 2 * math.pi / 3
            vessel = _oval(
                c,
                u + 0.5 * size * long * math.cos(angle) * math.cos(turn),
                w + 0.5 * size * math.sin(angle),
                bore * size * long,
                bore * size,
                turn,
            )
            c.paint(step(-vessel, 0.6), -55.0, 0.1)
