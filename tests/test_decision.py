"""What a run keeps of how its logits are read."""

import numpy as np
import pytest

from vitft_jax import decision, metrics
from vitft_jax.errors import InputError

Z = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)


def test_it_comes_back_as_it_was(tmp_path):
    labels = (Z + np.random.default_rng(1).normal(size=Z.shape) > 0).astype(float)
    fitted = decision.fit(Z, labels, range(60), "f1")
    assert len(set(fitted.thresholds)) == 2
    decision.write(tmp_path, fitted, ("a", "b"))
    assert decision.read(tmp_path) == fitted
    few = decision.fit(Z, np.stack([labels[:, 0], np.arange(60) < 4], 1), range(60), "f1")
    assert few.thresholds[1] == pytest.approx(0.5)
    assert few.told(("a", "b"))["one_half"] == {"b": "in 4 validation groups, 10 are needed"}
    decision.write(tmp_path, few, ("a", "b"))
    assert decision.read(tmp_path) == few
    several = decision.fit(Z, labels.argmax(axis=1), range(60), "f1")
    assert several.thresholds == ()
    decision.write(tmp_path, several, ("a", "b"))
    assert decision.read(tmp_path) == several


def test_a_run_without_one_is_read_as_it_is(tmp_path):
    assert decision.read(tmp_path) == decision.RAW
    np.testing.assert_array_equal(decision.RAW.probabilities(Z, True), metrics.probabilities(Z, True))


def test_the_temperature_changes_no_class_and_thresholds_hold_after_it():
    warm = decision.Decision(3.0)
    p = warm.probabilities(Z, False)
    np.testing.assert_array_equal(warm.decide(p, False), Z.argmax(axis=1))
    np.testing.assert_allclose(p, metrics.probabilities(Z / 3, False), atol=1e-7)
    cut = decision.Decision(3.0, (0.5, 0.6))
    np.testing.assert_array_equal(cut.decide(cut.probabilities(Z, True), True), [0, 3 * np.log(0.6 / 0.4)] <= Z)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"temperature": "hot", "thresholds": {}}', '{"temperature": 1, "thresholds": 3}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / decision.FILE).write_text(text)
    with pytest.raises(InputError, match=r"decision\.json: no temperature"):
        decision.read(tmp_path)
