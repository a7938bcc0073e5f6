"""report.html in a real browser, where there is Chromium: no error, no request, no page wider than a telephone."""

import json
import re
import shutil
import subprocess

import folders
import pytest

from vitft_jax import config as configs
from vitft_jax.report import comparison, page, record

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000",
)  # fmt: skip
OWN = "not an origin"  # initiator of what the browser asks for itself
LONG = "class_with_a_name_of_many_letters_and_no_place_to_break_it_anywhere"


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run whose names are hostile and long, of classes and of labels, and a comparison."""
    root = tmp_path_factory.mktemp("pages")
    config = configs.default()
    config.data.path = f"/{LONG * 3}"
    made = {}
    for multilabel in (False, True):
        classes = (*folders.HOSTILE, LONG, *(f"class {i}" for i in range(5)))
        path = folders.write(root / f"run{multilabel}", classes=classes, multilabel=multilabel, config=config, n=90)
        made[f"multilabel {multilabel}"] = page.render(record.read(path))
    both = [record.read(folders.write(root / name)) for name in (LONG, f"{LONG}2")]
    made["comparison"] = comparison.render(both)
    return made


def opened(chromium, path, tmp_path):
    """The page as it stands after loading, what the browser said, and the addresses that it asked for."""
    log = tmp_path / "net.json"
    command = [
        chromium,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        "--dump-dom",
        path.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = [line.rstrip(",") for line in log.read_text(errors="replace").splitlines() if '"initiator"' in line]
    asked = [event["url"] for event in (json.loads(line)["params"] for line in events) if event["initiator"] != OWN]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line], asked


def test_a_page_loads_and_runs_nothing(chromium, pages, tmp_path):
    for name, html in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(html)
        loaded, said, asked = opened(chromium, path, tmp_path)
        assert "</footer>" in loaded, name
        assert "<script" not in loaded, name
        assert (said, asked) == ([], []), name


def test_the_test_sees_requests_scripts_and_messages(chromium, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("here")</script>')
    _, said, asked = opened(chromium, path, tmp_path)
    assert any("here" in line for line in said)
    assert "http://127.0.0.1:9/x.png" in asked


def test_no_page_is_wider_than_a_telephone(chromium, pages, tmp_path):
    frames = {**pages, "too wide": "<!DOCTYPE html><p style='width: 400px'>wide</p>"}
    outer = tmp_path / "outer.html"
    measure = """
      const widths = {};
      for (const [name, html] of Object.entries(pages)) {
        const frame = document.createElement("iframe");
        frame.width = 360; frame.height = 740; frame.srcdoc = html;
        frame.onload = () => {
          const root = frame.contentDocument.documentElement;
          widths[name] = [root.clientWidth, root.scrollWidth];
          document.body.dataset.widths = JSON.stringify(widths);
        };
        document.body.append(frame);
      }"""
    content = json.dumps(frames).replace("<", "\\u003c")
    outer.write_text(f"<!DOCTYPE html><body><script>const pages = {content};{measure}</script></body>")
    loaded, said, _ = opened(chromium, outer, tmp_path)
    assert said == []
    widths = json.loads(re.search(r'data-widths="([^"]*)"', loaded)[1].replace("&quot;", '"'))
    assert widths.pop("too wide")[1] > 400
    assert len(widths) == len(pages)
    for name, (window, whole) in widths.items():
        assert 340 <= window <= 360
        assert whole <= window, name
