"""Several runs on one page: the numbers of compare, and no differences where there can be none."""

import json
import re

import folders
import pytest
from test_page import checked

from vitft_jax import compare
from vitft_jax.errors import InputError
from vitft_jax.report import comparison, record
from vitft_jax.report.__main__ import main


def rendered(*paths):
    return checked(comparison.render([record.read(path) for path in paths]))


@pytest.mark.parametrize("multilabel", [False, True])
def test_values_and_paired_differences_from_the_first(tmp_path, multilabel):
    classes = folders.HOSTILE
    a, b, c = (
        folders.write(tmp_path / name, classes=classes, multilabel=multilabel, seed=seed)
        for seed, name in enumerate(("first", "<i>second</i>".replace("/", "|"), "third"))
    )
    config = record.read(b).config
    config.lora.rank = 4
    (b / "config.json").write_text(json.dumps(config.to_dict()))
    parsed = rendered(a, b, c)
    assert not parsed.all("i")
    assert "B <i>second<|i> none 60 30" in parsed.text
    for letter, other in (("B", b), ("C", c)):
        assert f"{letter} − A:" in parsed.text
        for name, told in compare.compare(a, other)["metrics"].items():
            shown = f"{told['a']:.3f} {told['b']:.3f} {told['value']:+.3f} {told['low']:+.3f} to {told['high']:+.3f} "
            assert shown + f"{100 * told['share_better']:.1f} %" in parsed.text, name
    assert "lora.rank 8 4 8" in parsed.text
    assert "train.lr" not in parsed.text[: parsed.text.index('"lr"')]
    assert parsed.text.count("3.2 GFLOPs") == 3
    assert "Measured on 1 x cpu (cpu); 2 x a processor." in parsed.text
    assert "McNemar" not in parsed.text  # groups have several images


def test_other_images_are_shown_without_differences(tmp_path):
    a = folders.write(tmp_path / "a")
    b = folders.write(tmp_path / "b", names=[f"other/{i}.png" for i in range(180)], environment={"cpu": "another"})
    parsed = rendered(a, b)
    assert "these runs cannot be paired" in parsed.text
    assert "120 images, such as 'images/120.png', are in the split of one run only" in parsed.text
    assert "better in" not in parsed.text
    assert "images/120.png" not in comparison.render([record.read(path) for path in (a, b)], images=False)
    value = json.loads((b / "summary.json").read_text())["metrics"]["test"]["auroc"]["value"]
    assert f"{value:.3f}" in parsed.text
    assert "different machines: do not compare their speeds" in parsed.text


def test_what_makes_results_look_better_is_said_with_its_runs(tmp_path):
    a, b, c = (folders.write(tmp_path / x, duplicates_across_splits={"exact": 2, "near": 3}) for x in "abc")
    assert "Runs A, B, C: Pairs of images in different splits: 2 the same, 3 nearly the same." in rendered(a, b, c).text
    for path in (b, c):
        summary = json.loads((path / "summary.json").read_text())
        summary["duplicates_across_splits"] = {"exact": 0, "near": 0}
        (path / "summary.json").write_text(json.dumps(summary))
    assert "Run A: Pairs of images in different splits" in rendered(a, b, c).text
    parsed = rendered(b, c)
    assert not [a for a in parsed.all("div") if a.get("class") == "box warn"]
    for path in (b, c):
        table = (path / "split.csv").read_text()
        (path / "split.csv").write_text(re.sub(r"(images/(\d+)\.png,\w+),g\d+", r"\1,g\2", table))
    assert "Runs B, C: Every image is a group of its own." in rendered(a, b, c).text


def test_what_cannot_stand_on_one_page(tmp_path):
    a = folders.write(tmp_path / "a")
    b = folders.write(tmp_path / "b", classes=("x", "y", "z"))
    with pytest.raises(InputError, match=r"b: its classes are x, y, z, those of .*a benign, malignant, normal"):
        rendered(a, b)
    c = folders.unfinished(folders.write(tmp_path / "c"))
    with pytest.raises(InputError, match="c: has no results on its test split yet"):
        rendered(a, c)
    with pytest.raises(InputError, match="27 runs: at most 26"):
        rendered(*[a] * 27)


def test_undefined_metrics_and_many_runs(tmp_path):
    a = folders.write(tmp_path / "a")
    summary = json.loads((a / "summary.json").read_text())
    summary["metrics"]["test"]["auroc"] = dict.fromkeys(("value", "low", "high")) | {"why": "no image is 'x'"}
    (a / "summary.json").write_text(json.dumps(summary))
    parsed = rendered(*[a] * 9)
    assert "AUROC undefined: no image is 'x' undefined: no image is 'x'" in parsed.text
    assert "The first 8 runs are drawn." in parsed.text


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        folders.write(tmp_path / name)
    main(["a", "b"])
    assert capsys.readouterr().out == "comparison.html\n"
    checked((tmp_path / "comparison.html").read_text())
    assert not (tmp_path / "MODEL_CARD.md").exists()
