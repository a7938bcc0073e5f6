"""A run that is killed or terminated, whenever, ends to the bit as one that was not."""

import random
import signal

import pytest
from deaths import POINTS, assert_same, kill, run, terminate

from vitft_jax import evaluate, step, train
from vitft_jax.errors import InputError, Preempted


@pytest.fixture
def config(tiny_config):
    """Nine steps in three epochs of everything that draws random numbers or keeps averages."""
    tiny_config.methods = ("adalora",)
    tiny_config.adalora.update({"init_r": 4, "target_r": 2})
    tiny_config.augment.update({"speckle": 0.2, "tgc": 0.2, "mixup": 0.4, "cutmix": 1.0})
    tiny_config.train.epochs = 3.0
    tiny_config.train.patience = 2
    return tiny_config


def dropout(config, **settings):
    """The same with LoRA, which has dropout, and other settings of the training."""
    config = config.copy_and_resolve_references()
    config.methods = ("lora",)
    config.lora.dropout = 0.2
    config.train.update(settings)
    return config


@pytest.mark.slow
def test_killed_in_evaluation_and_while_a_checkpoint_is_written(config, tmp_path):
    checkpoints = tmp_path / "cut" / "checkpoints"

    def steps():
        return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())

    assert run(config, tmp_path / "cut", "eval", 2)[0] == -signal.SIGKILL
    assert steps() == [3]
    assert run(config, tmp_path / "cut", "save", 1)[0] == -signal.SIGKILL
    assert steps() == [3]
    assert [path for path in checkpoints.iterdir() if "tmp" in path.name]  # half of one
    assert run(config, tmp_path / "cut", "saved", 2)[0] == -signal.SIGKILL
    assert steps()[-1] == 9
    train.train(config, tmp_path / "cut")
    assert all(path.name.isdigit() for path in checkpoints.iterdir())
    train.train(config, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(config, tmp_path):
    config.train.epochs = 8.0
    rng = random.Random(0)
    # Each time the process comes to some point a few times, then lives on for at most this many seconds.
    reach = {"train": (8, 0.05), "eval": (3, 0.05), "save": (5, 0.2), "saved": (2, 0.05)}
    moments = [
        (point, rng.randint(1, reach[point][0]), kill, rng.uniform(0, reach[point][1])) for point in [*POINTS] * 5
    ]
    rng.shuffle(moments)
    kinds = config, dropout(config, accumulate=2, balanced=True)
    kinds[1].data.workers = 1
    runs = 0
    while moments:
        kind = kinds[runs % 2]
        folder = tmp_path / str(runs)
        while moments:
            code, said = run(kind, folder, *moments[-1])
            assert code in (0, -signal.SIGKILL), said
            if code == 0:
                break  # it ended before its moment, which is left for the next run
            moments.pop()
        assert run(kind, folder)[0] == 0
        if runs < 2:
            assert run(kind, tmp_path / f"whole {runs}")[0] == 0
        assert_same(tmp_path / f"whole {runs % 2}", folder)
        runs += 1
    assert runs >= 2  # both kinds


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_sigterm_finishes_the_step_and_goes_on_there(config, tmp_path, monkeypatch, method):
    config = config if method == "adalora" else dropout(config)
    config.train.batch_size = 2  # nine steps an epoch
    config.train.epochs = 2.0
    monkeypatch.setattr(train, "LOG_EVERY", 4)  # lines of the log at 4, 8, 9, 12, 16, 18
    train.train(config, tmp_path / "whole")
    real, done = step.train_step, []

    def terminated_at(*steps):
        def train_step(*args, **kwargs):
            done.append(None)
            if len(done) in steps:
                terminate()
            return real(*args, **kwargs)

        monkeypatch.setattr(step, "train_step", train_step)
        with pytest.raises(Preempted, match=f"step {steps[0]} of 18 is saved"):
            train.train(config, tmp_path / "cut")
        assert len(done) == steps[0]  # no step is done twice, none after the signal

    terminated_at(6)  # with two steps that no line tells of yet
    with pytest.raises(InputError, match="no checkpoint here"):  # it was not validated, so nothing is best
        evaluate.evaluate(tmp_path / "cut")
    terminated_at(7)
    terminated_at(9)  # an epoch ends: validated, and saved as ever
    terminated_at(15)
    train.train(config, tmp_path / "cut")
    assert len(done) == 18
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_has_its_own_exit_code(config, tmp_path):
    code, said = run(config, tmp_path / "run", "train", 2, terminate)
    assert code == 75
    assert "step 2 of 9 is saved and the same command goes on there" in said
    assert "Traceback" not in said
    code, said = run(config, tmp_path / "run", "eval", 4, terminate)  # after training: at once
    assert code == 75
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "lock").exists()
    assert run(config, tmp_path / "run")[0] == 0
