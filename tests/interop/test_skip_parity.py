"""Token skipping against a small EViT in torch (`scripts/evit.py`): logits and gradients on the same random weights."""

import jax
import numpy as np
import pytest
from support import TINY, init, skipping, tiny

torch = pytest.importorskip("torch")
import evit  # noqa: E402

from vitft_jax import tree  # noqa: E402

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("case", evit.CASES)
def test_logits_and_gradients(case, distilled):
    model = tiny(depth=4, distilled=distilled, select=skipping(**evit.CASES[case]))
    params = init(model.clone(select=None))["params"]
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    theirs = {name: torch.tensor(np.array(leaf), requires_grad=True) for name, leaf in tree.flatten(params).items()}
    expected = evit.logits(theirs, torch.tensor(images), TINY["heads"], TINY["patch"], evit.CASES[case])
    expected.sin().sum().backward()

    def loss(params):
        logits = model.apply({"params": params}, images)
        return jax.numpy.sin(logits).sum(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-5)
    largest = max(float(leaf.grad.abs().max()) for leaf in theirs.values())
    for name, grad in tree.flatten(grads).items():
        np.testing.assert_allclose(grad, theirs[name].grad, atol=1e-5 * largest, err_msg=name)
