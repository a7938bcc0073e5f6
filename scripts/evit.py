"""A small EViT in torch, the independent reference of token skipping: for `make_golden.py` and the interop tests."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {  # settings of `config.skip`, for four blocks
    "prune": {"layers": (0, 1, 2), "drop_ratio": (0.3, 0.3, 0.3)},
    "fuse": {"layers": (0, 1, 2), "drop_ratio": (0.3, 0.3, 0.3), "fuse": True},
    "rejoin": {"layers": (0, 1), "drop_ratio": (0.5, 0.3), "rejoin": (3, 3)},
}


def logits(p: Mapping[str, Tensor], images: Tensor, heads: int, patch: int, skip: Mapping[str, Any]) -> Tensor:
    """Logits `(B, C)`. Kept tokens stand in the order of their scores, as in EViT.

    Unlike there, splits lie after a block, a distillation token is protected, and tokens may come back (to where they
    stood; the encoder does not mind the order).

    Args:
        p: The parameters by the names of ours; with `embed/dist_token`, there are two prefix tokens and two heads.
        images: `(B, S, S, 3)`.
        heads: Of the attention.
        patch: Side of a patch.
        skip: One of `CASES`.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)

    batch, prefix = len(images), 1 + ("embed/dist_token" in p)
    cells = images.unfold(1, patch, patch).unfold(2, patch, patch)  # (B, rows, columns, 3, y, x)
    x = linear(cells.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2), "embed/patch")
    first = [p[f"embed/{name}"].expand(batch, -1, -1) for name in ("cls_token", "dist_token")[:prefix]]
    x = torch.cat([*first, x], dim=1) + p["embed/position"]
    rejoins = skip.get("rejoin") or (None,) * len(skip["layers"])
    splits = dict(zip(skip["layers"], zip(skip["drop_ratio"], rejoins, strict=True), strict=True))
    away = []  # (block, tokens that left)
    for i in range(sum(name.endswith("/mlp/fc1/kernel") for name in p)):
        while away and away[-1][0] == i:
            x = torch.cat([x, away.pop()[1]], dim=1)
        y = norm(x, f"blocks_{i}/norm1")
        q, k, v = (
            linear(y, f"blocks_{i}/attn/{role}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for role in ("query", "key", "value")
        )
        attention = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"blocks_{i}/attn/out")
        y = linear(norm(x, f"blocks_{i}/norm2"), f"blocks_{i}/mlp/fc1")
        x = x + linear(torch.nn.functional.gelu(y), f"blocks_{i}/mlp/fc2")
        if i in splits:
            ratio, rejoin = splits[i]
            score = attention[:, :, :prefix, prefix:].mean(dim=(1, 2))
            ranked = score.argsort(dim=1, descending=True)
            keep = math.ceil((1 - Fraction(str(ratio))) * score.shape[1])
            body = torch.gather(x[:, prefix:], 1, ranked[:, :, None].expand(-1, -1, x.shape[-1]))
            kept, left = body[:, :keep], body[:, keep:]
            if skip.get("fuse"):
                weight = torch.gather(score, 1, ranked[:, keep:])[:, :, None]
                kept = torch.cat([kept, (left * weight).sum(dim=1, keepdim=True)], dim=1)
            if rejoin is not None:
                away.append((rejoin, left))
            x = torch.cat([x[:, :prefix], kept], dim=1)
    x = norm(x, "norm")
    return sum(linear(x[:, i], name) for i, name in enumerate(("head", "head_dist")[:prefix])) / prefix
