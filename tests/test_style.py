"""The colours of a page can be read: contrast as WCAG 2 defines it (AA: 4.5 for text, 3 for lines of a chart)."""

import re

import pytest

from vitft_jax.report.style import CSS, SERIES

TEXT = ("ink", "soft", "good", "bad", "tint")


def scheme(dark):
    """Variables by name, as RGB from 0 to 1."""
    light, other = re.findall(r":root \{([^}]*)\}", CSS)
    found = dict(re.findall(r"--(\w+): ([^;]+);", light + (other if dark else "")))

    def rgb(text):
        if text.startswith("#"):
            return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return tuple(int(part) / 255 for part in text.split(","))

    return {name: rgb(text) for name, text in found.items()}


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def over(top, share, below):
    return tuple(share * a + (1 - share) * b for a, b in zip(top, below, strict=True))


def test_contrast_is_that_of_wcag():
    white = (1, 1, 1)
    assert contrast((0, 0, 0), white) == pytest.approx(21)
    assert contrast(white, white) == 1
    grey = (0x77 / 255,) * 3  # WebAIM: #777777 on white is 4.48, just too little
    assert contrast(grey, white) == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out(dark):
    colours = scheme(dark)
    assert (luminance(colours["page"]) < 0.1) == dark
    for below in ("page", "card"):
        for name in TEXT:
            assert contrast(colours[name], colours[below]) >= 4.5, (name, below)
    assert contrast(colours["ink"], colours["warn"]) >= 4.5
    for i in range(SERIES):
        assert contrast(colours[f"s{i}"], colours["page"]) >= 3, i


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_stand_out_in_every_cell_of_a_confusion_matrix(dark):
    """results._cell: 6 to 50 % of the tint over the page; the small print is at 85 %."""
    colours = scheme(dark)
    for share in (0, 0.5, 1):
        cell = over(colours["tint"], 0.06 + 0.44 * share, colours["page"])
        assert contrast(colours["ink"], cell) >= 4.5
        assert contrast(over(colours["ink"], 0.85, cell), cell) >= 4.5, share
