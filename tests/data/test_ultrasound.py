import math
from dataclasses import replace

import numpy as np
import pytest

from vitft_jax.data import anatomy, cases, ultrasound
from vitft_jax.data.anatomy import GRID, Section, View
from vitft_jax.data.ultrasound import LINES, RANGES, SIDE, Domain

# A scanner without anything that varies, so that what remains is speckle.
IDEAL = Domain(tgc_error_db=0.0, contact_db=0.0, noise_db=-300.0)


def uniform(attenuation=ultrasound.COMPENSATED, scatter=0.03):
    maps = np.zeros((GRID, GRID, 3), np.float32)
    maps[..., 0], maps[..., 2] = scatter, attenuation
    return Section(52.0, 46.0, maps)


def with_ball(attenuation):
    """A uniform tissue with a ball of 5 mm radius at 15 mm that differs in attenuation alone."""
    section = uniform()
    z, x = np.mgrid[:GRID, :GRID].astype(float) / GRID
    section.maps[np.hypot((x - 0.5) * 52, z * 46 - 15) < 5, 2] = attenuation
    return section


def rng(seed=0):
    return np.random.default_rng(seed)


def test_uniform_tissue_gives_rayleigh_speckle():
    envelope = np.abs(ultrasound.acquire(uniform(), IDEAL, rng()))
    # Rayleigh: mean / std = sqrt(pi / (4 - pi)) = 1.913. Some 10,000 resolution cells leave a standard error below 1 %.
    assert envelope.mean() / envelope.std() == pytest.approx(math.sqrt(math.pi / (4 - math.pi)), rel=0.03)


def test_compensation_keeps_uniform_tissue_even_and_calibrated():
    envelope = np.abs(ultrasound.acquire(uniform(scatter=0.03), IDEAL, rng()))
    rms = np.sqrt((envelope.reshape(4, -1) ** 2).mean(1))
    # A quarter of the depth has some 2,500 resolution cells, so a standard error of 1 % in amplitude.
    np.testing.assert_allclose(rms, 0.03, rtol=0.05)


@pytest.mark.parametrize("attenuation", [0.3, 1.1])
def test_attenuation_is_decibels_per_centimetre_and_megahertz_both_ways(attenuation):
    envelope = np.abs(ultrasound.acquire(uniform(attenuation), IDEAL, rng()))
    slice_db = [10 * np.log10((envelope[i : i + 40] ** 2).mean()) for i in (40, 300)]
    centimetres = 260 * IDEAL.depth_cm / RANGES
    expected = 2 * (ultrasound.COMPENSATED - attenuation) * IDEAL.frequency_mhz * centimetres
    assert slice_db[1] - slice_db[0] == pytest.approx(expected, abs=0.6)


def test_axial_width_is_that_of_a_pulse_of_the_given_bandwidth():
    sigma = ultrasound.axial_sigma_mm(IDEAL)
    z = np.arange(-4096, 4096) * 0.002
    spectrum = np.abs(np.fft.fft(np.exp(-0.5 * (z / sigma) ** 2)))
    frequency = np.fft.fftfreq(len(z), 0.002) * ultrasound.SPEED_MM_PER_US / 2  # t = 2 z / c
    width = np.ptp(frequency[spectrum > spectrum.max() / 2])
    assert width == pytest.approx(IDEAL.bandwidth * IDEAL.frequency_mhz, rel=0.03)  # bins are 0.047 MHz wide


def test_psf_shrinks_with_frequency_and_is_narrowest_at_the_focus():
    low, high = replace(IDEAL, frequency_mhz=4.0), replace(IDEAL, frequency_mhz=12.0)
    assert ultrasound.axial_sigma_mm(low) == pytest.approx(3 * ultrasound.axial_sigma_mm(high))
    depth = np.linspace(1, 40, 391)
    for domain in (low, high):
        sigma = ultrasound.lateral_sigma_mm(domain, depth)
        narrowest = np.argmin(sigma)
        assert depth[narrowest] == pytest.approx(10 * domain.focus_cm, abs=0.11)
        assert (np.diff(sigma[: narrowest + 1]) < 0).all()
        assert (np.diff(sigma[narrowest:]) > 0).all()
    assert (ultrasound.lateral_sigma_mm(high, depth) < ultrasound.lateral_sigma_mm(low, depth)).all()


def width_of_echo(domain, row):
    """Lateral and axial standard deviation, in mm, of the echo of one point."""
    sources = np.zeros((RANGES, LINES), np.complex64)
    sources[row, LINES // 2] = 1
    echo = np.abs(ultrasound.convolve(sources, domain))
    lateral, axial = echo[row], echo[:, LINES // 2]
    spacing, step = 10 * domain.width_cm / LINES, 10 * domain.depth_cm / RANGES
    across, along = np.arange(LINES) - LINES // 2, np.arange(RANGES) - row
    return (
        math.sqrt((lateral * across**2).sum() / lateral.sum()) * spacing,
        math.sqrt((axial * along**2).sum() / axial.sum()) * step,
    )


@pytest.mark.parametrize("row", [60, 172, 330])
def test_a_point_shows_the_stated_psf(row):
    domain = replace(IDEAL, frequency_mhz=3.0)  # wide enough that the sampling does not show
    lateral, axial = width_of_echo(domain, row)
    depth = (row + 0.5) * 10 * domain.depth_cm / RANGES
    assert lateral == pytest.approx(float(ultrasound.lateral_sigma_mm(domain, np.array(depth))), rel=0.03)
    assert axial == pytest.approx(ultrasound.axial_sigma_mm(domain), rel=0.05)  # cut at 3 standard deviations


def behind_ball(attenuation, seed):
    """Grey behind the ball minus grey beside, in levels of 255."""
    image = ultrasound.scan(with_ball(attenuation), IDEAL, rng(seed)).astype(float)
    rows = slice(round(22 / 40 * SIDE), round(34 / 40 * SIDE))
    return image[rows, 60:68].mean() - np.concatenate([image[rows, 10:25], image[rows, 103:118]], axis=1).mean()


def test_less_attenuation_brightens_what_lies_behind_and_more_darkens_it():
    # 1 cm of 0.4 dB/cm/MHz more or less is 6 dB at 7.5 MHz, 31 levels of 255 at 50 dB.
    for seed in range(3):
        assert behind_ball(ultrasound.COMPENSATED - 0.4, seed) == pytest.approx(30.6, abs=6)
        assert behind_ball(ultrasound.COMPENSATED + 0.4, seed) == pytest.approx(-30.6, abs=6)
        assert abs(behind_ball(ultrasound.COMPENSATED, seed)) < 6


def test_gain_and_dynamic_range():
    envelope = np.array([1.0, 0.1, 0.01], np.float32)
    plain = replace(IDEAL, gain_db=0.0, dynamic_range_db=40.0)
    np.testing.assert_allclose(ultrasound.compress(envelope, plain), [1, 0.5, 0], atol=1e-6)
    brighter = ultrasound.compress(envelope, replace(plain, gain_db=10.0))
    np.testing.assert_allclose(brighter, [1, 0.75, 0.25], atol=1e-6)
    wider = ultrasound.compress(envelope, replace(plain, dynamic_range_db=80.0))
    np.testing.assert_allclose(wider, [1, 0.75, 0.5], atol=1e-6)


def test_noise_rises_with_depth_as_it_is_amplified_by_the_compensation():
    silent = uniform(scatter=0.0)
    envelope = np.abs(ultrasound.acquire(silent, replace(IDEAL, noise_db=-60.0), rng()))
    level = 20 * np.log10(np.sqrt((envelope**2).mean(1)))
    at = 2 * IDEAL.frequency_mhz * ultrasound.COMPENSATED * ultrasound.scan_lines(IDEAL).depth[:, 0] / 10 - 60
    np.testing.assert_allclose(level.reshape(-1, 16).mean(1), at.reshape(-1, 16).mean(1), atol=0.5)


def test_a_sector_is_black_outside_and_shows_a_point_where_it_is():
    domain = cases.DOMAINS["target"]
    grey = np.zeros((RANGES, LINES), np.float32)
    assert not ultrasound.display(grey, domain).any()
    full = ultrasound.display(grey + 1, domain)
    assert set(np.unique(full)) == {0, 255}
    np.testing.assert_array_equal(full, full[:, ::-1])
    radius, depth, half = domain.radius_cm, domain.depth_cm, domain.width_cm / domain.radius_cm / 2
    side = 2 * (radius + depth) * math.sin(half)
    area = half * ((radius + depth) ** 2 - radius**2) / side**2  # of the square
    assert (full > 0).mean() == pytest.approx(area, rel=0.03)
    row, line = 200, 150
    grey[row - 4 : row + 5, line - 2 : line + 3] = 1
    shown = ultrasound.display(grey, domain).astype(float)
    z, x = (np.tensordot(np.arange(SIDE) + 0.5, shown.sum(axis), 1) / shown.sum() for axis in (1, 0))
    angle, reach = ((line + 0.5) / LINES - 0.5) * 2 * half, radius + (row + 0.5) / RANGES * depth
    top = radius * math.cos(half)
    padding = (side - (radius + depth - top)) / 2
    assert x == pytest.approx((reach * math.sin(angle) / side + 0.5) * SIDE, abs=0.6)
    assert z == pytest.approx((reach * math.cos(angle) - top + padding) / side * SIDE, abs=0.6)


def test_a_linear_display_averages_by_area():
    grey = rng().random((RANGES, LINES), np.float32)
    image = ultrasound.display(grey, replace(IDEAL, smoothing=0.0))
    fine = np.repeat(grey.reshape(SIDE, 3, LINES).mean(1), 2, axis=1).reshape(SIDE, SIDE, 3).mean(2)
    np.testing.assert_allclose(image, 255 * fine, atol=0.51)


def seen(finding, patient, plane=0.0, kind=1):
    return anatomy.breast((7, patient), finding, View(plane, (0.0, 0.0), (kind,)), 40.0, 40.0)


def test_planes_of_a_patient_look_alike_and_patients_do_not():
    def attributes(section):
        level = np.log(section.maps[..., 0]).ravel()
        return level - level.mean()

    same, near, far = [], [], []
    for patient in range(6):
        here = attributes(seen("benign", patient))
        same.append(np.array_equal(here, attributes(seen("benign", patient, kind=2))))
        near.append(np.corrcoef(here, attributes(seen("benign", patient, plane=0.4)))[0, 1])
        far.append(np.corrcoef(here, attributes(seen("benign", patient + 6)))[0, 1])
    assert all(same)  # plane 0 is the patient's own, whatever the others look like
    assert min(near) > max(far)


def test_the_lesions_differ_as_their_descriptors_say():
    """Attenuation drives what is seen behind a mass: on average less in benign ones, more in malignant ones."""

    without = np.array([seen("normal", i).maps[..., 2].mean() for i in range(30)])

    def added(finding):
        return np.array([seen(finding, i).maps[..., 2].mean() for i in range(30)]) - without

    benign, malignant = added("benign"), added("malignant")
    error = np.hypot(benign.std(), malignant.std()) / math.sqrt(30)
    assert benign.mean() < 0
    assert malignant.mean() - benign.mean() > 3 * error
    assert malignant.min() < benign.max()  # but one cannot tell every one by it
