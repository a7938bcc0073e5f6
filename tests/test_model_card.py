"""MODEL_CARD.md: the numbers of the run, plain words about its limits, and no card of a user's written over."""

import json
import re

import folders
import pytest
import yaml

from vitft_jax import config as configs
from vitft_jax import model_card
from vitft_jax.errors import InputError


def split(card):
    """The front matter, read, and the text."""
    _, front, text = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_card_says_what_the_run_wrote_down(tmp_path, multilabel):
    config = configs.default()
    config.methods, config.lora.rank = ("lora",), 16
    config.data.path = config.model.pretrained = "/secret/place"
    path = folders.write(tmp_path / "run", multilabel=multilabel, config=config)
    front, text = split(model_card.render(path))
    assert front["license"] == "other"
    assert front["library_name"] == "vitft_jax"
    assert front["pipeline_tag"] == "image-classification"
    assert "lora" in front["tags"]
    assert "roc_auc" in front["metrics"]
    assert "base_model" not in front
    summary = json.loads((path / "summary.json").read_text())
    for value in summary["metrics"]["test"].values():
        assert f"| {value['value']:.3f} | {value['low']:.3f} to {value['high']:.3f} |" in text
    for name, values in summary["per_class"]["test"].items():
        assert f"| {name} | {values['images']} | {values['sensitivity']['value']:.3f} (" in text
    told = summary["calibration"]["test"]
    assert f"{told['before']['ece']:.3f} | {told['after']['ece']:.3f}" in text
    assert ("benign 0.40" in text) == multilabel
    for said in (
        "This is not a medical device. It is not validated clinically", "`" + "ab" * 32 + "`", "| `lora.rank` | 16 | 8 |",
        "3.2 GFLOPs", "not measured", 'vitft_jax.load("run")', "What was not measured", "one run with one seed",
        "| images | 60 | 60 | 60 |", "License and consent: to be filled in",
    ):  # fmt: skip
        assert said in text, said
    assert "/secret" not in text


def test_weights_of_the_hub_are_named_as_it_asks(tmp_path):
    path = folders.write(tmp_path / "run")
    outside = json.loads((path / "run.json").read_text())
    outside["weights"] |= {"source": "facebook/dinov2-small", "revision": "abc"}
    (path / "run.json").write_text(json.dumps(outside))
    front, text = split(model_card.render(path))
    assert front["base_model"] == "facebook/dinov2-small"
    assert "facebook/dinov2-small, revision abc" in text


@pytest.mark.parametrize("key", ["", "balanced", "class_weights", "focal_gamma"])
def test_what_probabilities_hold_for(tmp_path, key):
    config = configs.default()
    if key:
        config.train[key] = 2.0 if key == "focal_gamma" else True
    text = model_card.render(folders.write(tmp_path / "run", config=config))
    assert ("Probabilities hold for the frequency of the classes in the data below." in text) == (not key)
    assert ("Its probabilities are no frequencies: while it trained, " in text) == bool(key)


def test_names_from_outside_are_only_text(tmp_path):
    path = folders.write(tmp_path / "a|b`c\n# d", classes=folders.HOSTILE)
    front, text = split(model_card.render(path))
    assert set(front) == {"license", "license_name", "library_name", "pipeline_tag", "tags", "metrics"}
    assert "\n# a\\|b\\`c \\# d\n" in text
    assert not re.search(r"<(script|img|style|title)", text)
    rows = [line for line in text.splitlines() if line.startswith("| &lt;script")]
    assert len(rows) == 2
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if re.match(r"\| .*\\_x", line)}
    assert cells == {5, 7}  # data; classes


def test_what_the_run_could_not_tell(tmp_path):
    path = folders.write(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    summary["metrics"]["test"]["auroc"] = dict.fromkeys(("value", "low", "high")) | {"why": "no image is '<x>'"}
    (path / "summary.json").write_text(json.dumps(summary))
    table = (path / "split.csv").read_text().splitlines()
    rows = [line.split(",") for line in table[1:]]
    (path / "split.csv").write_text("\n".join([table[0], *(f"{r[0]},{r[1]},{r[0]},{r[3]}" for r in rows)]) + "\n")
    text = model_card.render(path)
    assert "| AUROC | undefined | no image is '&lt;x&gt;' |" in text
    assert "- AUROC: undefined here, as no image is '&lt;x&gt;'." in text
    assert "every image is a group of its own here" in text
    folders.unfinished(path)
    text = model_card.render(path)
    assert "Training has not finished." in text
    assert "Not evaluated." in text
    assert "The test split: the model was not evaluated on it." in text
    with pytest.raises(InputError, match="no run here"):
        model_card.render(tmp_path)


def test_a_card_that_was_changed_by_hand_stays(tmp_path, capsys):
    path = tmp_path / "MODEL_CARD.md"
    model_card.write(path, "first\n")
    model_card.write(path, "second\n")
    assert path.read_text().startswith("second\n<!-- as generated: ")
    assert capsys.readouterr().out == ""
    path.write_text(path.read_text().replace("second", "mine"))
    model_card.write(path, "third\n")
    assert path.read_text().startswith("mine\n")
    assert "was changed by hand and stays as it is" in capsys.readouterr().out
    path.write_text("all mine")
    model_card.write(path, "third\n")
    assert path.read_text() == "all mine"
