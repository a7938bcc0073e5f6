"""report.html in a real browser: no error, no request, fit for a telephone, every image there, dark, light and on paper.

Needs Chromium. Where there is none these tests are skipped, or fail where the environment variable VITFT_NEEDS_BROWSER is
set, as .ci/run does.
"""

import json
import os
import re
import shutil
import subprocess

import folders
import numpy as np
import pytest
from PIL import Image
from test_style import scheme

from vitft_jax import config as configs
from vitft_jax import data
from vitft_jax.report import comparison, page, record

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000",
)  # fmt: skip
OWN = "not an origin"  # initiator of what the browser asks for itself
LONG = "class_with_a_name_of_many_letters_and_no_place_to_break_it_anywhere"
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("VITFT_NEEDS_BROWSER"):
        pytest.fail("VITFT_NEEDS_BROWSER is set, and there is no Chromium")
    if found is None:
        pytest.skip("needs Chromium, such as `apt-get install chromium`")
    return found


class Pictures:
    """Noise of several shapes, so that no picture is like another."""

    def __getitem__(self, i):
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + i % 3 * 30, 60, 3), np.uint8))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Runs with images and a figure whose names are hostile and long, of classes and of labels, and a comparison."""
    root = tmp_path_factory.mktemp("pages")
    config = configs.default()
    config.data.path = f"/{LONG * 3}"
    made = {}
    for multilabel in (False, True):
        classes = (*folders.HOSTILE, LONG, *(f"class {i}" for i in range(5)))
        path = folders.write(root / f"run{multilabel}", classes=classes, multilabel=multilabel, config=config, n=90)
        (path / "figures").mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (500, 1500, 3), np.uint8)
        Image.fromarray(noise).save(path / "figures" / "patches.png")
        found = record.read(path)
        p = found.predictions["test"]
        splits = ("test",) * len(p.names)
        dataset = data.Dataset(p.classes, p.multilabel, p.names, p.labels, p.groups, splits, Pictures())
        made[f"multilabel {multilabel}"] = page.render(found, dataset)
        assert made[f"multilabel {multilabel}"].count("<img ") >= 8
    both = [record.read(folders.write(root / name)) for name in (LONG, f"{LONG}2")]
    made["comparison"] = comparison.render(both)
    return made


def browse(chromium, path, tmp_path, *flags):
    """Opens a page, and returns what the browser printed."""
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def opened(chromium, path, tmp_path):
    """The page as it stands after loading, what the browser said, and the addresses that it asked for."""
    log = tmp_path / "net.json"
    result = browse(chromium, path, tmp_path, f"--log-net-log={log}", "--dump-dom")
    events = [line.rstrip(",") for line in log.read_text(errors="replace").splitlines() if '"initiator"' in line]
    asked = [event["url"] for event in (json.loads(line)["params"] for line in events) if event["initiator"] != OWN]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line], asked


def written(tmp_path, name, html):
    path = tmp_path / f"{name}.html"
    path.write_text(html)
    return path


def test_a_page_loads_and_runs_nothing(chromium, pages, tmp_path):
    for name, html in pages.items():
        loaded, said, asked = opened(chromium, written(tmp_path, name, html), tmp_path)
        assert "</footer>" in loaded, name
        assert "<script" not in loaded, name
        assert (said, [url for url in asked if not url.startswith("data:")]) == ([], []), name


def test_the_test_sees_requests_scripts_and_messages(chromium, tmp_path):
    path = written(tmp_path, "bad", '<img src="http://127.0.0.1:9/x.png"><script>console.error("here")</script>')
    _, said, asked = opened(chromium, path, tmp_path)
    assert any("here" in line for line in said)
    assert "http://127.0.0.1:9/x.png" in asked


def test_on_a_telephone_no_page_is_too_wide_and_every_image_is_there(chromium, pages, tmp_path):
    whole = pages["multilabel False"]
    forbidden = whole.replace("img-src data:;", "")
    assert forbidden != whole
    frames = {**pages, "too wide": "<!DOCTYPE html><p style='width: 400px'>wide</p>", "forbidden": forbidden}
    measure = """
      const found = {};
      for (const [name, html] of Object.entries(pages)) {
        const frame = document.createElement("iframe");
        frame.width = 360; frame.height = 740; frame.srcdoc = html;
        frame.onload = () => {
          const root = frame.contentDocument.documentElement;
          const images = [...frame.contentDocument.images];
          const drawn = images.filter(i => i.complete && i.naturalWidth && i.getBoundingClientRect().width);
          found[name] = [root.clientWidth, root.scrollWidth, images.length, drawn.length];
          document.body.dataset.found = JSON.stringify(found);
        };
        document.body.append(frame);
      }"""
    content = json.dumps(frames).replace("<", "\\u003c")
    outer = written(
        tmp_path, "outer", f"<!DOCTYPE html><body><script>const pages = {content};{measure}</script></body>"
    )
    loaded, said, _ = opened(chromium, outer, tmp_path)
    found = json.loads(re.search(r'data-found="([^"]*)"', loaded)[1].replace("&quot;", '"'))
    assert found.pop("too wide")[1] > 400
    *_, images, drawn = found.pop("forbidden")  # so that these tests see an image that is not drawn
    assert images > 0
    assert drawn == 0
    assert all("Content Security Policy" in line for line in said)
    assert len(said) == images + 1  # and the icon of the page
    assert len(found) == len(pages)
    for name, (window, width, images, drawn) in found.items():
        assert 340 <= window <= 360
        assert width <= window, name
        assert drawn == images == pages[name].count("<img "), name


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_light_or_dark_as_its_reader_wishes(chromium, pages, tmp_path, dark):
    """Its corner has the colour of the page; its colours are mostly those of the scheme, and it is not empty."""
    picture = tmp_path / "page.png"
    path = written(tmp_path, "page", pages["multilabel False"])
    browse(chromium, path, tmp_path, DARK if dark else LIGHT, "--window-size=1000,3000", f"--screenshot={picture}")
    with Image.open(picture) as shown:
        pixels = np.asarray(shown.convert("RGB")).astype(int)
    expected = np.round(255 * np.array(scheme(dark)["page"]))
    assert np.abs(pixels[5, 5] - expected).max() <= 1
    alike = (np.abs(pixels - expected).max(axis=2) <= 1).mean()
    assert 0.4 < alike < 0.95
    ink = np.round(255 * np.array(scheme(dark)["ink"]))
    assert (np.abs(pixels - ink).max(axis=2) <= 8).mean() > 0.002


@pytest.mark.slow
def test_every_image_is_on_paper(chromium, pages, tmp_path):
    """Chromium writes each picture once into a PDF; a page that is too wide for the paper would be cut off or shrunk."""
    for name, html in pages.items():
        paper = tmp_path / "page.pdf"
        browse(chromium, written(tmp_path, name, html), tmp_path, DARK, f"--print-to-pdf={paper}")
        content = paper.read_bytes()
        assert content.startswith(b"%PDF")
        assert 1 <= len(re.findall(rb"/Type /Page\b", content)) < 30, name
        pictures = set(re.findall(r'<img src="([^"]*)"', html))
        assert len(re.findall(rb"/Subtype /Image\b", content)) >= len(pictures), name
