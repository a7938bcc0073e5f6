"""The race of scripts/accuracy_race.py: both sides train the same model on the same batches."""

import json

import accuracy_race
import numpy as np
import pytest

from vitft_jax import report
from vitft_jax.errors import InputError

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.interop


def run(config, root, method):
    """Both sides; returns their predictions."""
    found = []
    for side in accuracy_race.SIDES:
        accuracy_race.one(side, config.copy_and_resolve_references(), root / f"{method}_{side}_0")
        found.append(report.read_predictions(root / f"{method}_{side}_0" / "predictions_test.csv"))
    return found


@pytest.mark.slow
def test_full_fine_tuning_is_the_same_run_twice(tiny_config, tmp_path):
    """Nothing is drawn but the start, which is shared; so batches, rates, decay, clipping and choice of the epoch agree."""
    tiny_config.train.trainable = "."
    tiny_config.train.lr = 3e-3
    ours, theirs = run(tiny_config, tmp_path, "full")
    assert ours.names == theirs.names
    assert np.ptp(ours.probabilities, axis=0).max() > 0.1  # it has learned something
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=2e-3)
    row = accuracy_race.table(tmp_path, "full", [0])[-1]
    assert "+0.000 (" in row.split("|")[3]
    told = json.loads((tmp_path / "full_peer_0" / "race.json").read_text())
    assert told["seconds_per_step"] > 0
    assert told["peak_mib"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_adapters_start_as_the_same_model(tiny_config, tmp_path, method):
    tiny_config.methods = (method,)
    tiny_config.train.lr = 1e-9
    ours, theirs = run(tiny_config, tmp_path, method)
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=2e-3)


def test_what_the_peer_does_not_do_is_refused(tiny_config, tmp_path):
    tiny_config.methods, tiny_config.lora.targets = ("lora",), "encoder"
    with pytest.raises(InputError, match=r"lora\.targets='encoder'"):
        accuracy_race.peer(tiny_config, tmp_path)
