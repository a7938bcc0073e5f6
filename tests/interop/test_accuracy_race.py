"""The race of scripts/accuracy_race.py: both sides train the same model on the same batches."""

import json

import accuracy_race
import numpy as np
import pytest

from vitft_jax import config as configs
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lora.targets=encoder", r"lora\.targets='encoder': of the peer, qv or qkv"),
        ("lora.rs=True", r"lora\.rs=True: the peer does not follow it; leave it as in configs/lora\.py"),
        ("lora.rank_pattern=(('fc1', 4),)", r"lora\.rank_pattern"),
        ("lora.lr_ratio=2", r"lora\.lr_ratio=2\.0"),
        ("augment.mixup=0.2", r"augment\.mixup=0\.2"),
        ("train.balanced=True", r"train\.balanced=True"),
        ("train.label_smoothing=0.1", r"train\.label_smoothing=0\.1"),
        ("train.trainable=.", r"train\.trainable='\.'"),
        ("train.patience=2", r"train\.patience=2"),
        ("methods=dora", r"methods=\('dora',\): the peer knows one of lora, adalora, full"),
        ("methods=lora,skip", r"methods=\('lora', 'skip'\)"),
    ],
)
def test_what_the_peer_does_not_do_is_refused(tiny_config, tmp_path, change, says):
    tiny_config.methods = ("lora",)
    configs.override(tiny_config, [change])
    with pytest.raises(InputError, match=says):
        accuracy_race.peer(tiny_config, tmp_path)


def test_a_run_under_another_config_is_not_taken_for_this_one(tiny_config, tmp_path):
    assert not accuracy_race.done(tmp_path, tiny_config)
    report.write_json(tmp_path / "race.json", {"config": accuracy_race.made(tiny_config)})
    assert accuracy_race.done(tmp_path, tiny_config)
    tiny_config.lora.rank = 64
    with pytest.raises(InputError, match="was made with other settings"):
        accuracy_race.done(tmp_path, tiny_config)
