"""What a run writes: predictions that read back as they were."""

import math
from dataclasses import replace

import numpy as np
import pytest

from vitft_jax import config as configs
from vitft_jax import data, report
from vitft_jax.errors import InputError


@pytest.mark.parametrize("multilabel", [False, True])
def test_predictions_read_back_as_they_were(image_folder, tmp_path, multilabel):
    config = configs.default()
    config.data.path = str(image_folder)
    dataset = data.load(config.data, 0)
    if multilabel:
        labels = np.eye(3, dtype=np.float32)[dataset.labels]
        labels[:, 0] = 1
        dataset = replace(dataset, labels=labels, multilabel=True)
    indices = dataset.indices("test")[::-1]
    p = np.random.default_rng(0).dirichlet(np.ones(3), len(indices))
    decided = (p > [0.1, 0.2, 0.6]).astype(int) if multilabel else p.argmin(axis=1)  # as they are given
    report.write_predictions(tmp_path / "p.csv", dataset, indices, p, decided)
    read = report.read_predictions(tmp_path / "p.csv")
    assert read.names == tuple(dataset.names[i] for i in indices)
    assert read.groups == tuple(dataset.groups[i] for i in indices)
    assert read.multilabel == multilabel
    assert read.classes == ("dark", "grey", "light")
    np.testing.assert_array_equal(read.labels, dataset.labels[indices])
    np.testing.assert_array_equal(read.decided, decided)
    np.testing.assert_allclose(read.probabilities, p, rtol=1e-8)


@pytest.mark.parametrize("text", ["", "path,group,true\n", "path,p:a\nx,0.5\n", "path,group,true,p:a\nx,g,b,0.5\n"])
def test_what_is_no_table_of_predictions(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=r"p\.csv: no table of predictions"):
        report.read_predictions(tmp_path / "p.csv")


def test_what_the_screen_says_of_numbers_that_are_missing(capsys):
    undefined = dict.fromkeys(("value", "low", "high"), math.nan) | {"why": "no image is '[bold]x'"}
    alone = {"value": 0.5, "low": None, "high": None, "why": "only one group"}
    report.print_results("title", {"test": {"auroc": undefined, "accuracy": alone}})
    printed = capsys.readouterr().out
    assert "undefined (no image is '[bold]x')" in printed
    assert "0.500 (no interval: only one group)" in printed
    shown = report.line({"loss": 0.5, "auroc": math.nan}, lambda name: f"{name} has no 'x'")
    assert shown == "loss 0.5000  auroc undefined (auroc has no 'x')"


def test_the_screen_says_why_a_threshold_stayed_at_one_half(capsys):
    told = {
        "temperature": 1.5,
        "before": {"ece": 0.2},
        "after": {"ece": 0.1},
        "thresholds": {"cyst": 0.43, "fluid": 0.5},
    }
    report.print_calibration(
        {"val": told, "test": told | {"one_half": {"fluid": "in 6 validation groups, 10 are needed"}}}
    )
    assert capsys.readouterr().out.splitlines() == [
        "val: temperature 1.50, ece 0.200 -> 0.100",
        "test: temperature 1.50, ece 0.200 -> 0.100",
        "thresholds: cyst 0.43, fluid 0.50 (in 6 validation groups, 10 are needed)",
    ]
