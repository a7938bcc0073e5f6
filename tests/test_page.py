"""report.html: what it says of every kind of run, that names are only ever text, and that it needs nothing from outside."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import folders
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from support import lines

from vitft_jax import config as configs
from vitft_jax import data, evaluate, metrics, model_card, train
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.report import charts, comparison, examples, markup, page, record, results, words
from vitft_jax.report.__main__ import main

VOID = {"meta", "link", "img", "br"}


class Parsed(HTMLParser):
    """Elements, text and mistakes of a page."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def checked(html):
    """A parsed page that is whole, names each thing once, loads nothing, runs nothing, and can be read aloud."""
    parsed = Parsed(html)
    tags = {name for name, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "audio", "video"}
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(key, "#")
            assert value.startswith(("data:", "#")), (name, value[:80])
            if value.startswith("#") and len(value) > 1:
                assert value[1:] in ids
        for url in re.findall(r"url\((.*?)\)", " ".join(filter(None, attributes.values()))):
            assert url[1:] in ids, url
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    assert all(attributes.get("alt") for attributes in parsed.all("img"))
    charts_ = [a for a in parsed.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a["role"] == "img" and a["aria-label"] for a in charts_)
    (policy,) = [a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    return parsed


def rendered(path, **options):
    return checked(page.render(record.read(path), **options))


@pytest.fixture
def pictures(image_folder):
    """A dataset whose images are those of folders.write, by name."""
    files = sorted(image_folder.rglob("*.png"))

    class Pictures:
        def __getitem__(self, i):
            return Image.open(files[i % len(files)])

    def of(path):
        p = record.read(path).predictions["test"]
        n = len(p.names)
        return data.Dataset(p.classes, p.multilabel, p.names, p.labels, p.groups, ("test",) * n, Pictures())

    return of


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_page_says_what_the_run_wrote_down(tmp_path, pictures, multilabel):
    found = {"exact": 2, "near": 3}
    path = folders.write(tmp_path / "run", multilabel=multilabel, duplicates_across_splits=found)
    parsed = rendered(path, dataset=pictures(path))
    summary = json.loads((path / "summary.json").read_text())
    for name, value in summary["metrics"]["test"].items():
        assert words.name(name) in parsed.text
        assert f"{value['value']:.3f} {value['low']:.3f} to {value['high']:.3f}" in parsed.text, name
    for name, values in summary["per_class"]["test"].items():
        sensitivity = values["sensitivity"]
        assert f"{name} {values['images']} {sensitivity['value']:.3f}" in parsed.text
    for told in (
        "Pairs of images in different splits: 2 the same, 3 nearly the same.",
        "1,000", "100 (10.00 %)", "3.2 GFLOPs, 80 % of that with all tokens", "12.5 images/s",
        "not measured", "1 min 15 s", "abab", "somewhere/weights", "2 x a processor", "jax 0.0",
        "60 test images in 30 groups", "Not a medical device and not validated clinically",
    ):  # fmt: skip
        assert told in parsed.text, told
    for when in ("before", "after"):
        assert f"Calibration error (ECE) {summary['calibration']['test'][when]['ece']:.3f}" in parsed.text
    assert ("decided from" in parsed.text) == multilabel
    p = record.read(path).predictions["test"]
    assert len(parsed.all("img")) == sum(map(len, examples.chosen(p))) > examples.RIGHT
    worst = examples.chosen(p)[0][0]
    if multilabel:
        c = np.flatnonzero(p.decided[worst] != p.labels[worst])[0]
        kind = "missed" if p.labels[worst, c] else "false alarm"
        assert f"{kind}: {p.classes[c]} {p.probabilities[worst, c]:.2f}" in parsed.text
    else:
        said = f"wrong: {p.classes[p.decided[worst]]} {p.probabilities[worst].max():.2f} truth: {p.classes[p.labels[worst]]}"
        assert said in parsed.text
        cells = metrics.confusion(p.decided, p.labels, 3)[0]
        shares = " ".join(f"{n} {100 * n / cells.sum():.0f} %" for n in cells)
        assert f"benign {shares}" in parsed.text


def test_settings_that_differ_come_first_and_all_are_there(tmp_path):
    config = configs.default()
    config.methods, config.lora.rank, config.data.path = ("lora", "skip"), 16, "/nowhere/<b>images</b>"
    path = folders.write(tmp_path / "run", config=config)
    parsed = rendered(path)
    differ = parsed.text[
        parsed.text.index("What differs from the defaults") : parsed.text.index("All keys (config.json)")
    ]
    assert "lora.rank 16 8" in differ
    assert "methods lora, skip ()" in differ
    assert "/nowhere/<b>images</b>" in differ
    assert "lora.alpha" not in differ
    assert '"alpha": 16.0' in parsed.text
    assert "Images are not shown, as the data cannot be read here: data.path: there is no folder" in parsed.text


@pytest.mark.parametrize("multilabel", [False, True])
def test_names_from_outside_are_only_text(tmp_path, pictures, multilabel):
    names = [f"{folders.HOSTILE[i % 3]}{i}\u202e" for i in range(180)]
    config = configs.default()
    config.data.path = f"/{folders.HOSTILE[0]}"
    path = folders.write(
        tmp_path / "<script>alert(2)</script>".replace("/", "|"),
        classes=folders.HOSTILE,
        multilabel=multilabel,
        names=names,
        config=config,
        method={"<i>key</i>": "<i>value</i>", "more": {"<i>nested</i>": 1}},
    )
    (path / "figures").mkdir()
    Image.new("L", (20, 20)).save(path / "figures" / "<b onclick=alert(1)>.png")
    parsed = rendered(path, dataset=pictures(path))  # checks that there is no script
    assert not parsed.all("i")
    assert not any(parsed.all("b"))  # those of ours have no attributes
    for name in (
        *folders.HOSTILE,
        "<script>alert(2)<|script>",
        "<i>nested</i>",
        "<i>value</i>",
        "<b onclick=alert(1)>",
    ):
        assert re.sub(r"\s+", " ", name) in parsed.text, name
    plain = rendered(path)  # a message about the data holds its path
    assert "there is no folder" in plain.text


def test_control_characters_and_halves_of_surrogates_can_be_written():
    assert markup.text("a\x00\x1b[2J\ud800<") == "a\ufffd\ufffd[2J?&lt;"


def test_a_threshold_that_stayed_at_one_half_says_why(tmp_path):
    path = folders.write(tmp_path / "run", ("a", "b"), multilabel=True)
    assert "validation groups" not in rendered(path).text
    summary = json.loads((path / "summary.json").read_text())
    summary["calibration"]["test"]["one_half"] = {"b": "in 6 validation groups, 10 are needed"}
    (path / "summary.json").write_text(json.dumps(summary))
    assert "0.40 in 6 validation groups, 10 are needed" in rendered(path).text
    assert "a 0.40, b 0.40 (in 6 validation groups, 10 are needed)" in model_card.render(path)


def test_undefined_metrics_and_groups_of_one_image_are_said(tmp_path):
    path = folders.write(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    nothing = {"value": None, "low": None, "high": None, "why": "no image is '<b>'"}
    summary["metrics"]["test"]["auroc"] = nothing
    summary["metrics"]["test"]["precision_macro"] = dict.fromkeys(("value", "low", "high"))  # as runs wrote it once
    summary["metrics"]["test"]["accuracy"] = {"value": 0.75, "low": None, "high": None}
    summary["per_class"]["test"]["normal"]["auroc"] = nothing
    (path / "summary.json").write_text(json.dumps(summary))
    assert "Every image is a group of its own" not in rendered(path).text
    table = (path / "split.csv").read_text()
    (path / "split.csv").write_text(re.sub(r"(images/(\d+)\.png,\w+),g\d+", r"\1,g\2", table))
    parsed = rendered(path)
    assert "Every image is a group of its own" in parsed.text
    assert "AUROC undefined no image is '<b>'" in parsed.text  # the tile
    assert "AUROC undefined: no image is '<b>'" in parsed.text  # the table
    assert "Precision, mean over classes undefined: why is not recorded" in parsed.text
    assert "Accuracy 0.750 no interval: only one group" in parsed.text
    assert "0.000 0.000 to" not in parsed.text


def test_a_run_that_trains_still_and_one_that_never_did(tmp_path):
    path = folders.unfinished(folders.write(tmp_path / "run"))
    parsed = rendered(path)
    assert "The run has not finished: there are no results yet." in parsed.text
    assert "training" in parsed.text
    assert parsed.text.count("not measured") >= 4
    (path / "metrics.jsonl").unlink()
    (path / "split.csv").unlink()
    parsed = rendered(path)
    assert "No training is recorded in this folder." in parsed.text
    assert "Which images were in which split is not recorded." in parsed.text


def test_an_int8_run_beside_its_float_run(tmp_path):
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    compared = {
        "float": {"accuracy": value},
        "change": {"accuracy": {"value": -0.0123, "low": -0.02, "high": 0.01}},
        "agreement": 0.987,
        "divergence": 1e-4,
    }
    method = {
        "compared": {"test": compared},
        "val_drop": 0.001,
        "float_layers": ["head"],
        "layers": {"a/b": {"snr_db": 1.0}},
    }
    path = folders.write(tmp_path / "int8", method=method, flops={}, timing={"float_eval_images_per_second": 4.5})
    (path / "metrics.jsonl").unlink()
    parsed = rendered(path)
    for told in ("98.7 % of the images", "-0.012 -0.020 to +0.010", "val drop 0.001", '"snr_db"', "4.5 images/s"):
        assert told in parsed.text, told
    assert "No training is recorded in this folder." in parsed.text


def test_evaluations_under_other_settings_and_figures(tmp_path):
    path = folders.write(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    other = path / "evaluations" / "skip half"
    (other / "figures").mkdir(parents=True)
    told = {part: summary[part]["test"] for part in record.PARTS}
    told |= {"differs": ["skip.drop_ratio: (0.35,) there, (0.5,) here"], "step": 20, "flops": summary["flops"]}
    (other / "results_test.json").write_text(json.dumps({**told, "eval_images_per_second": 33.0}))
    (path / "figures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 1500, 3), np.uint8)
    Image.fromarray(noise).save(path / "figures" / "patches.png")
    Image.new("RGB", (64, 48)).save(path / "figures" / "other_thing.png")
    parsed = rendered(path)
    assert "skip half skip.drop_ratio: (0.35,) there, (0.5,) here test" in parsed.text
    assert "33 images/s" in parsed.text
    assert examples.CAPTIONS["patches"] in parsed.text
    small, large = (a["src"] for a in parsed.all("img"))
    assert (
        small
        == "data:image/png;base64," + base64.b64encode((path / "figures" / "other_thing.png").read_bytes()).decode()
    )
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as image:
        assert image.format == "JPEG"
        assert image.width <= 1100
    assert record.read(other).differs == tuple(told["differs"])
    alone = rendered(other)
    assert "Evaluated under other settings than it was trained with" in alone.text


def test_thumbnails_are_small_and_a_missing_image_is_said(tmp_path, pictures):
    path = folders.write(tmp_path / "run")
    found, dataset = record.read(path), pictures(path)
    p = found.predictions["test"]
    shown = Parsed(str(examples.gallery(p, range(3), dataset)))
    for i, attributes in enumerate(shown.all("img")):
        kind, _, content = attributes["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert max(image.size) <= 176
        assert attributes["alt"].startswith(f"{p.names[i]}: truth {p.classes[p.labels[i]]}, decided")

    class Broken:
        def __getitem__(self, i):
            raise InputError("7.png: damaged <b>")

    broken = data.Dataset(p.classes, False, p.names, p.labels, p.groups, dataset.splits, Broken())
    assert "cannot be shown: 7.png: damaged <b>" in Parsed(str(examples.gallery(p, [0], broken))).text
    fewer = data.Dataset(p.classes, False, (), p.labels[:0], (), (), Broken())
    assert "it is not in the data any more" in Parsed(str(examples.gallery(p, [0], fewer))).text


def test_without_images_there_is_no_name_of_a_file_and_no_path(tmp_path, pictures):
    config = configs.default()
    config.data.path, config.figures.names = "/secret_place/scans", ("images/secret_1.png",)
    config.data.table, config.model.pretrained = "/secret_place/table.csv", "/secret_place/vit"
    config.init_adapter = "/secret_place/adapter"
    path = folders.write(tmp_path / "run", names=[f"images/secret_{i}.png" for i in range(180)], config=config)
    outside = json.loads((path / "run.json").read_text())
    outside["weights"]["source"] = "/secret_place/vit"
    (path / "run.json").write_text(json.dumps(outside))
    (path / "figures").mkdir()
    Image.new("RGB", (64, 48)).save(path / "figures" / "patches.png")
    found = record.read(path)
    whole = page.render(found, pictures(path))
    for secret in ("images/secret_1.png", *(f"/secret_place/{x}" for x in ("scans", "table.csv", "vit", "adapter"))):
        assert secret in whole, secret
    html = page.render(found, pictures(path), images=False)
    assert "secret_" not in html
    assert not checked(html).all("img")
    assert "scans" in checked(html).text  # what the last part of a path says is no secret
    both = [found, found]
    assert "/secret_place/scans" in comparison.render(both)
    assert "secret_" not in comparison.render(both, images=False)
    assert "secret_" not in model_card.of(found)


def test_an_id_on_the_hub_is_no_path(tmp_path):
    config = configs.default()
    config.model.pretrained = "someone/vit"
    path = folders.write(tmp_path / "run", config=config)
    outside = json.loads((path / "run.json").read_text())
    outside["weights"] |= {"source": "someone/vit", "revision": "abc"}
    (path / "run.json").write_text(json.dumps(outside))
    assert "Base weights someone/vit revision abc" in rendered(path, images=False).text


def test_the_surest_mistakes_come_first():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.45, 0.55], [1.0, 0.0]])
    labels = np.array([0, 0, 0, 1, 1])
    names = tuple("abcde")
    made = results.Predictions(names, names, labels, p.argmax(1), p, ("x", "y"))
    wrong, right = examples.chosen(made)
    assert wrong.tolist() == [4, 1, 2]
    assert right.tolist() == [0, 3]
    truth = np.eye(2, dtype=int)[labels]
    made = results.Predictions(names, names, truth, (p > 0.3).astype(int), p, ("x", "y"))
    wrong, right = examples.chosen(made)
    assert wrong.tolist() == [4, 1, 2, 3]  # both labels of the last two are decided: 0.6 and 0.45 off
    assert right.tolist() == [0]


def test_curves_enclose_the_area_of_the_metric_and_pass_where_the_model_decides():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    score = (truth + rng.normal(size=200)).round(1)  # with ties
    line = charts.roc(score, truth, score > 0.5, "x")
    p = np.stack([1 - score, score], axis=1)
    assert np.trapezoid(line.y, line.x) == pytest.approx(metrics.compute(p, truth, False)["auroc"])
    assert line.mark == (np.mean(score[truth == 0] > 0.5), np.mean(score[truth == 1] > 0.5))
    assert any(np.allclose(line.mark, point) for point in zip(line.x, line.y, strict=True))
    assert charts.roc(score, np.ones(200), score > 0, "x") is None


def test_bins_are_those_of_the_calibration_error():
    rng = np.random.default_rng(1)
    p = metrics.probabilities(2 * rng.normal(size=(300, 3)), False)
    labels = rng.integers(0, 3, 300)
    found = charts.bins(p.max(axis=1), p.argmax(axis=1) == labels)
    assert found.images.sum() == 300
    ece = (np.abs(found.right - found.confidence) * found.images).sum() / 300
    assert ece == pytest.approx(metrics.compute(p, labels, False)["ece"])
    for right, low, high, n in zip(found.right, found.low, found.high, found.images, strict=True):
        wilson = stats.binomtest(round(right * n), int(n)).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_what_was_before_the_temperature_comes_back(multilabel, temperature):
    """Files hold six digits, so an error of 5e-7 in a probability of at least 0.01, and logits to about 5e-5."""
    z = np.random.default_rng(2).uniform(-1, 1, (50, 3))
    p = metrics.probabilities(z / temperature, multilabel).round(6)
    labels = np.zeros((50, 3) if multilabel else 50, int)
    made = results.Predictions((), (), labels, labels, p, ("a", "b", "c"))
    raw = metrics.probabilities(z, multilabel)
    np.testing.assert_allclose(results._before(made, temperature), raw, atol=5e-5)


def test_charts_have_no_colour_font_or_name_of_their_own():
    drawn = [charts.Line("a", np.arange(3), np.array([0.1, np.nan, 0.3]), mark=(0.5, 0.5), points=True)] * 2
    first = charts.lines(drawn, "x", "y", "one chart", square=True, diagonal=True, vertical=1)
    second = charts.lines(drawn, "x", "y", "another", square=True, diagonal=True, vertical=1)
    assert first == charts.lines(drawn, "x", "y", "one chart", square=True, diagonal=True, vertical=1)
    for html in (first, second):
        assert not re.search(r": #|font-family|<style|<metadata|http", html)
        assert "currentColor" in html
    names = [set(re.findall(r' id="([^"]*)"', html)) for html in (first, second)]
    assert names[0]
    assert not names[0] & names[1]


def test_many_classes(tmp_path):
    path = folders.write(tmp_path / "run", classes=[f"class {i}" for i in range(20)], n=80)
    parsed = rendered(path)
    p = record.read(path).predictions["test"]
    counts = metrics.confusion(p.decided, p.labels, 20)
    np.fill_diagonal(counts, 0)
    assert "most frequent confusions of 20 classes" in parsed.text
    i, j = np.unravel_index(counts.argmax(), counts.shape)
    assert f"class {i} class {j} {counts[i, j]}" in parsed.text
    assert "Left out: 12 classes with fewer images" in parsed.text


def test_training_and_evaluation_write_it_last_and_lose_nothing_where_it_fails(
    tiny_config, tmp_path, monkeypatch, capsys, reports
):
    tiny_config.train.epochs = 1.0
    folder = tmp_path / "run"
    summary = train.train(tiny_config, folder)
    parsed = checked((folder / "report.html").read_text())
    assert "dark, grey, light" in parsed.text
    assert len(parsed.all("img")) >= 1
    assert summary["duplicates_across_splits"] == {"exact": 0, "near": 0}
    assert "No image was found in two splits" in parsed.text
    assert (folder / "MODEL_CARD.md").exists()
    assert "Metric test validation Accuracy" in parsed.text  # columns of the table
    (folder / "report.html").unlink()
    evaluate.evaluate(folder, "train")
    assert "Metric test validation training Accuracy" in checked((folder / "report.html").read_text()).text
    (folder / "report.html").unlink()

    def fails(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(page, "render", fails)
    capsys.readouterr()
    assert train.train(tiny_config, folder)["metrics"]["test"] == summary["metrics"]["test"]
    assert f"warning: {folder / 'report.html'} could not be written (RuntimeError: no ink)" in capsys.readouterr().out
    assert evaluate.evaluate(folder, "test") == summary["metrics"]["test"]
    assert len(lines(folder)) > 0


def test_the_command_makes_it_anew(tmp_path, capsys):
    path = folders.write(tmp_path / "run")
    main([str(path)])
    assert capsys.readouterr().out == f"{path / 'report.html'}\n"
    assert {"report.html", "MODEL_CARD.md"} <= {file.name for file in path.iterdir()}
    main([str(path), "--output", str(tmp_path / "page.html"), "--no_images"])
    assert "left out on request" in checked((tmp_path / "page.html").read_text()).text
    assert not (tmp_path / "MODEL_CARD.md").exists()  # two runs' pages may lie in one folder
    (path / "MODEL_CARD.md").unlink()
    main([str(path), "--output", str(path / "other.html")])
    assert (path / "MODEL_CARD.md").exists()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "example:\n  python -m vitft_jax.report runs/lora\n" in capsys.readouterr().out
    for arguments, message in (
        ([str(path), "--output", "x.pdf"], "pages are HTML files"),
        ([str(path), "--output", str(tmp_path / "no" / "x.html")], "there is no folder"),
        ([str(tmp_path / "nothing")], "no run here"),
        ([str(tmp_path)], "no run here"),
    ):
        with pytest.raises(InputError, match=message):
            main(arguments)


def test_damaged_files_are_named(tmp_path):
    path = folders.write(tmp_path / "run")
    (path / "predictions_test.csv").write_text("path\n")
    with pytest.raises(InputError, match=r"predictions_test\.csv: no table of predictions"):
        record.read(path)
    (path / "predictions_test.csv").unlink()
    log, split = path / "metrics.jsonl", path / "split.csv"
    whole, table = log.read_bytes(), split.read_text()
    log.write_bytes(b"\xff" + whole)
    with pytest.raises(InputError, match=r"metrics\.jsonl: no log"):
        record.read(path)
    log.write_bytes(whole[:-9])  # the last line was being written when the run was killed
    assert len(record.read(path).log) == 5
    for damaged in (b"", b"\n", table.encode() + b"\n", table[:-7].encode(), b"path\na.png\n", b"\xff", b"a\0b"):
        split.write_bytes(damaged)
        with pytest.raises(InputError, match=r"split\.csv: no split as vitft_jax\.train writes it"):
            record.read(path)
    split.write_text(table)
    (path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"summary\.json"):
        record.read(path)
    assert Folder(path).exists
