"""Temperature scaling: the right temperature, and none without evidence."""

import numpy as np
import pytest
from scipy import special

from vitft_jax import metrics, temperature


def drawn(rng, logits, multilabel):
    """Labels that come as often as the logits say."""
    if multilabel:
        return (rng.random(logits.shape) < special.expit(logits)).astype(float)
    return (rng.random((len(logits), 1)) > special.softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_scale_of_the_logits_is_found(multilabel, scale):
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.normal(size=(20_000, 3))
    labels = drawn(rng, logits, multilabel)
    # The Fisher information of the logarithm of the temperature is above 0.2 n, so its standard error is below 0.016.
    assert temperature.fit(scale * logits, labels) == pytest.approx(scale, rel=3 * 0.016)


@pytest.mark.parametrize("multilabel", [False, True])
def test_it_is_the_minimum_of_the_likelihood_but_for_a_fraction_of_an_image(multilabel):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(80, 3))
    labels = drawn(rng, 0.5 * logits, multilabel)

    def loss(t):
        p = metrics.probabilities(logits / t, multilabel)
        return 80 * (3 if multilabel else 1) * metrics.compute(p, labels, multilabel)["loss"]

    best = temperature.fit(logits, labels)
    assert loss(best) < min(loss(1.0), loss(1.5 * best), loss(best / 1.5))
    assert loss(best) - min(loss(t) for t in best * np.linspace(0.5, 2, 301)) < 0.1  # nats, over all images


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_few_images_without_an_error_do_not_make_a_model_certain(multilabel):
    labels = np.array([0, 1, 2, 0, 1, 2])
    truth = np.eye(3)[labels]
    logits = 4 * truth - 2
    t = temperature.fit(logits, truth if multilabel else labels)
    assert 0.3 < t < 1
    hopeless = temperature.fit(-logits, truth if multilabel else labels)
    assert 1 < hopeless < 150
