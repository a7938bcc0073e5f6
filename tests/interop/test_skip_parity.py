"""Token skipping against a small EViT written here in torch: logits and gradients on the same random weights."""

import jax
import numpy as np
import pytest
from support import init, tiny

torch = pytest.importorskip("torch")

from vitft_jax import tree  # noqa: E402
from vitft_jax.methods.skip import Skip, Split  # noqa: E402

pytestmark = pytest.mark.interop
DEPTH, HEADS = 4, 4


def evit(p, images, splits, fuse, prefix):
    """Logits; images NHWC, `p` the parameters by name. Kept tokens stand in the order of their scores, as in EViT.

    Unlike there, splits lie after a block, a distillation token is protected, and tokens may come back (to where they
    stood; the encoder does not mind the order).
    """

    def linear(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)

    batch, patch = len(images), 4
    x = images.unfold(1, patch, patch).unfold(2, patch, patch).permute(0, 1, 2, 4, 5, 3).reshape(batch, 16, -1)
    tokens = ["cls_token", "dist_token"][:prefix]
    first = [p[f"embed/{name}"].expand(batch, -1, -1) for name in tokens]
    x = torch.cat([*first, linear(x, "embed/patch")], dim=1) + p["embed/position"]
    away = []  # (block, tokens that left)
    for i in range(DEPTH):
        while away and away[-1][0] == i:
            x = torch.cat([x, away.pop()[1]], dim=1)
        y = norm(x, f"blocks_{i}/norm1")
        q, k, v = (
            linear(y, f"blocks_{i}/attn/{role}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for role in ("query", "key", "value")
        )
        attention = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"blocks_{i}/attn/out")
        y = linear(norm(x, f"blocks_{i}/norm2"), f"blocks_{i}/mlp/fc1")
        x = x + linear(torch.nn.functional.gelu(y), f"blocks_{i}/mlp/fc2")
        for split in (split for split in splits if split.after == i):
            score = attention[:, :, :prefix, prefix:].mean(dim=(1, 2))
            ranked = score.argsort(dim=1, descending=True)
            keep = split.count(score.shape[1])
            body = torch.gather(x[:, prefix:], 1, ranked[:, :, None].expand(-1, -1, x.shape[-1]))
            kept, left = body[:, :keep], body[:, keep:]
            if fuse:
                weight = torch.gather(score, 1, ranked[:, keep:])[:, :, None]
                kept = torch.cat([kept, (left * weight).sum(dim=1, keepdim=True)], dim=1)
            if split.rejoin is not None:
                away.append((split.rejoin, left))
            x = torch.cat([x[:, :prefix], kept], dim=1)
    x = norm(x, "norm")
    heads = ["head", "head_dist"][:prefix]
    return sum(linear(x[:, i], name) for i, name in enumerate(heads)) / prefix


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    ("splits", "fuse"),
    [
        ((Split(0, 0.3), Split(1, 0.3), Split(2, 0.3)), False),
        ((Split(0, 0.3), Split(1, 0.3), Split(2, 0.3)), True),
        ((Split(0, 0.5, rejoin=3), Split(1, 0.3, rejoin=3)), False),
    ],
    ids=["prune", "fuse", "rejoin"],
)
def test_logits_and_gradients(splits, fuse, distilled):
    model = tiny(depth=DEPTH, distilled=distilled, select=Skip(splits, fuse))
    params = init(tiny(depth=DEPTH, distilled=distilled))["params"]
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
    theirs = {name: torch.tensor(np.array(leaf), requires_grad=True) for name, leaf in tree.flatten(params).items()}
    expected = evit(theirs, torch.tensor(images), splits, fuse, 1 + distilled)
    expected.sin().sum().backward()

    def loss(params):
        logits = model.apply({"params": params}, images)
        return jax.numpy.sin(logits).sum(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-5)
    largest = max(float(leaf.grad.abs().max()) for leaf in theirs.values())
    for name, grad in tree.flatten(grads).items():
        np.testing.assert_allclose(grad, theirs[name].grad, atol=1e-5 * largest, err_msg=name)
