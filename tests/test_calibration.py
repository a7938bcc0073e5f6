"""Static ranges of a run that trains: calibrated before step 0, kept in its checkpoints, refused where they are missing."""

import jax
import numpy as np
import pytest

from vitft_jax import calibration, evaluate, run, step, train, tree
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError


@pytest.fixture
def static_config(tiny_config):
    tiny_config.methods, tiny_config.train.trainable = ("quant",), "."
    tiny_config.quant.static = True
    tiny_config.augment.crop, tiny_config.augment.rotate = 1.0, 0.0
    tiny_config.train.epochs = 1.0
    return tiny_config


def built_of(config, workdir):
    config, source = run.resolve(config)
    dataset = run.Folder(workdir).dataset(config)
    return config, dataset, run.build(config, dataset, source)


def bounds(trainable):
    return {name.split("/quant/")[0]: float(leaf) for name, leaf in tree.flatten(trainable["quant"]).items()}


def test_ranges_are_those_of_the_training_images(static_config, tmp_path):
    config, dataset, built = built_of(static_config, tmp_path)
    found = bounds(calibration.calibrated(built, dataset, config).trainable)
    assert len(found) == 2 * 6
    images = np.stack(
        [np.asarray(dataset.images[i].convert("RGB").resize((16, 16), 2)) for i in dataset.indices("train")]
    )
    model = calibration.plain(built.program).model
    _, seen = jax.jit(lambda p, x: model.apply(p, x, capture_intermediates=True))(
        {"params": built.trainable["params"]}, step.normalise(built.program, images)
    )
    # Among the candidates is the largest value, and the narrowest holds 99.9 %.
    inputs = np.abs(seen["intermediates"]["blocks_0"]["norm1"]["__call__"][0])
    for name in ("query", "key", "value"):
        assert np.percentile(inputs, 99.8) < found[f"blocks_0/attn/{name}"] <= inputs.max() * 1.02  # another resize


@pytest.mark.parametrize(("methods", "trainable"), [(("quant",), "."), (("quant", "lora"), "^head")])
def test_a_run_keeps_its_ranges_and_says_how_many_parameters_train(static_config, tmp_path, methods, trainable, capsys):
    static_config.methods, static_config.train.trainable = methods, trainable
    summary = train.train(static_config, tmp_path / "run")
    config, dataset, built = built_of(static_config, tmp_path / "run")
    expected = bounds(calibration.calibrated(built, dataset, config).trainable)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        kept = bounds(checkpoints.restore_best(built.trainable)[0])
    assert kept == expected  # training did not move them
    assert all(0 < bound < np.inf for bound in kept.values())
    rest = {name: leaf for name, leaf in built.trainable.items() if name != "quant"}
    assert summary["parameters"]["trainable"] == tree.count(rest)
    assert evaluate.evaluate(tmp_path / "run") == summary["metrics"]["test"]


def test_ranges_that_were_never_calibrated_are_refused(static_config, tmp_path):
    config, dataset, built = built_of(static_config, tmp_path)
    with pytest.raises(InputError, match=r"quant/blocks_0/attn/key/quant/bound: this range was never calibrated"):
        evaluate.outputs(built.program, built.trainable, built.frozen, dataset, "val", config)
    static_config.data.val_fraction = static_config.data.test_fraction = 0.3
    with pytest.raises(InputError, match="12 calibration images"):
        train.train(static_config, tmp_path / "few")
