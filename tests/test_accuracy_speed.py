"""Accuracy against speed of finished runs, by scripts/accuracy_speed.py."""

import json
from pathlib import Path

import accuracy_speed
import contest
import pytest
from PIL import Image
from support import TINY

from vitft_jax import config as configs
from vitft_jax import train, vit
from vitft_jax.errors import InputError


class Here:
    """A contestant in this process with set speeds: a run that skips is twice as fast, and does its work once."""

    def __init__(self, name, command):
        options = accuracy_speed.parser().parse_args(command[1:])
        works = accuracy_speed.works(options.runs[0], options)
        if name == "skip":  # that both compile would take long
            for work in works.values():
                work()
        self.works, self.seconds = list(works), {work: [] for work in works}
        self.step = 0.25 if name == "skip" else 0.5

    def turn(self, work):
        self.seconds[work].append(self.step)

    def close(self):
        pass


@pytest.mark.slow
def test_a_table_and_a_picture_of_two_runs(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", {**TINY, "depth": 3})
    monkeypatch.setattr(contest, "Contestant", Here)
    tiny_config.train.epochs = 1.0
    tiny_config.figures.count = 0
    tiny_config.skip.update(layers=(0,), drop_ratio=(0.5,), rejoin=(2,))
    summaries = []
    for name, methods in (("lora", ("lora",)), ("skip", ("lora", "skip"))):
        tiny_config.methods = methods
        summaries.append(train.train(tiny_config, tmp_path / name))
    ratio = summaries[1]["flops"]["ratio"]
    old = {key: value for key, value in summaries[0].items() if key != "flops"}  # as earlier versions wrote it
    (tmp_path / "lora" / "summary.json").write_text(json.dumps(old))

    runs = [str(tmp_path / name) for name in ("lora", "skip")]
    accuracy_speed.main([*runs, "--batch", "2", "--rounds", "2", "--plot", str(tmp_path / "plot.png")])
    head, _, *rows = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    first, second = (dict(zip(head, row, strict=True)) for row in rows)
    assert head[:5] == ["run", "tokens that skip", "FLOPs", "test accuracy", "test auroc"]
    assert head[5:] == ["inference, batch 2: images/s", "ratio", "training, batch 6: images/s", "ratio"]
    assert (first["run"], first["tokens that skip"], first["FLOPs"]) == ("lora", "all tokens", "1.000")
    assert (second["run"], second["tokens that skip"]) == ("skip", "50 % after 0; back before 2")
    assert second["FLOPs"] == f"{ratio:.3f}"
    for row, summary in ((first, summaries[0]), (second, summaries[1])):
        for metric in ("accuracy", "auroc"):
            m = summary["metrics"]["test"][metric]
            assert row[f"test {metric}"] == f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})"
    assert first["inference, batch 2: images/s"] == "4.0 (4.0 to 4.0)"
    assert second["training, batch 6: images/s"] == "24.0 (24.0 to 24.0)"
    assert (first["ratio"], second["ratio"]) == ("", "2.00x (2.00 to 2.00)")
    with Image.open(tmp_path / "plot.png") as plot:
        assert min(plot.size) > 500

    for flags, works in (
        (["--no-train"], ["inference 1", "inference 32"]),
        (["--batch", "8", "--train_batch", "1", "4"], ["inference 8", "training 1", "training 4"]),
    ):
        assert (
            list(accuracy_speed.works(tmp_path / "skip", accuracy_speed.parser().parse_args([*runs, *flags]))) == works
        )
    with pytest.raises(InputError, match=r"--metric acuracy: .*lora has .*accuracy"):
        accuracy_speed.main([*runs, "--metric", "acuracy"])
    (tmp_path / "skip" / "summary.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        accuracy_speed.main(runs)


def made_up(name, value=0.8, **skip):
    config = configs.default()
    if skip:
        config.methods = ("skip",)
        config.skip.update(skip)
    metrics = {"accuracy": {"value": value, "low": value - 0.1, "high": value + 0.05}}
    return accuracy_speed.Run(Path(name), config, metrics, 1.0)


@pytest.mark.parametrize(
    ("skip", "text"),
    [
        ({}, "all tokens"),
        ({"layers": (3, 6, 9), "drop_ratio": (0.3,)}, "30 % after 3, 6, 9"),
        ({"layers": (3, 6), "drop_ratio": (0.3, 0.5), "fuse": True}, "30 %, 50 % after 3, 6; fused"),
        ({"layers": (2,), "keep": (40,), "rejoin": (11,)}, "all but 40 after 2; back before 11"),
        ({"layers": (2, 6), "rejoin": (5, None), "mode": "mask"}, "35 % after 2, 6; back before 5, -; mask mode"),
    ],
)
def test_the_setting_in_words(skip, text):
    assert made_up("run", **skip).skips == text


def test_a_run_without_a_training_step_has_an_empty_cell():
    runs = [made_up("lora"), made_up("int8")]
    found = [{"inference 1": [1.0, 1.0], "training": [2.0, 2.0]}, {"inference 1": [3.0, 3.0]}]
    row = accuracy_speed.table(runs, found, ["accuracy"])[-1]
    assert row.endswith("| 3.0 (3.0 to 3.0) | 3.00x (3.00 to 3.00) |  |  |")


def test_an_undefined_metric_is_said_so_and_is_not_drawn(monkeypatch):
    runs = [made_up("lora"), made_up("int8")]
    found = [{"inference 8": [1.0, 1.0]}, {"inference 8": [3.0, 3.0]}]
    runs[0].metrics["accuracy"] = {"value": 0.5, "low": None, "high": None}
    accuracy_speed.picture(runs, found, 8, "accuracy")  # a point without a bar
    runs[1].metrics["accuracy"] = {**dict.fromkeys(("value", "low", "high")), "why": "no image is 'b'"}
    rows = accuracy_speed.table(runs, found, ["accuracy"])
    assert "| 0.500 (no interval: only one group) |" in rows[-2]
    assert "| undefined (no image is 'b') |" in rows[-1]
    monkeypatch.setattr(accuracy_speed, "read", lambda path: {"lora": runs[0], "int8": runs[1]}[path.name])
    with pytest.raises(InputError, match=r"--plot: accuracy of int8 is undefined .no image is 'b'."):
        accuracy_speed.main(["lora", "int8", "--plot", "plot.png"])


def test_a_run_that_is_not_finished_or_damaged_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text(configs.to_json(configs.default()))
    with pytest.raises(InputError, match="not finished"):
        accuracy_speed.read(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: cannot be read"):
        accuracy_speed.read(tmp_path)


def test_points_of_the_picture_have_a_marker_for_what_they_do_and_a_name_of_their_own():
    settings = [{}, {"layers": (3,)}, {"layers": (6,)}, {"layers": (3,), "rejoin": (9,)}]
    runs = [made_up(f"run_{i}", 0.8 - 0.01 * i, **skip) for i, skip in enumerate(settings)]
    found = [{"inference 8": [10.0 + i, 10.5 + i]} for i in range(4)]
    figure = accuracy_speed.picture(runs, found, 8, "accuracy")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_marker() in ("s", "o", "^")]
    assert [line.get_marker() for line in lines] == ["s", "o", "o", "^"]
    assert [float(line.get_xdata()[0]) for line in lines] == [10.25, 11.25, 12.25, 13.25]
    names = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in names] == [r.skips.replace("; ", "\n") for r in runs]
    boxes = [text.get_window_extent() for text in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(accuracy_speed.MARKERS)
