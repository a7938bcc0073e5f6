"""A trained model as an ONNX graph: uint8 pixels in, probabilities out; with token skipping and int8 products where it has.

The graph is written node by node and holds what a runtime needs and no more. What is linear and constant is folded: mean and
standard deviation into the patch embedding, the softmax scale into the queries, LayerScale into the layer before it; and the
projections of one input are one product. int8 kernels stay the integers that training or `vitft_jax.quantize` chose:

- activations are rounded between QuantizeLinear and DequantizeLinear around MatMul (QDQ), which runtimes fuse into an int8
  product; with static ranges that is all, with a scale per token the graph divides by it before and multiplies after;
- where kernels alone are integers: MatMul, and the scales after it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitft_jax import quantizer, tree
from vitft_jax.errors import InputError
from vitft_jax.methods import quant
from vitft_jax.methods.skip import Split
from vitft_jax.vit import ViT

OPSET, IR_VERSION = 20, 10
INPUT, OUTPUTS = "images", ("logits", "probabilities")
_N = int(quantizer.edge(8))  # 127, the largest integer
_ZERO = 128  # of activations as uint8, for which processors have instructions beside int8; ONNX Runtime is slow without
_END = 2**62  # of a slice to the end


@dataclass(frozen=True)
class Linear:
    """A linear layer: ``x kernel + bias``.

    Attributes:
        kernel: `(in, out)`, float32 or int8.
        bias: `(out,)`.
        scale: Of an int8 kernel, `(out,)`; None for a float one.
        bound: Static range of x; None = a scale per token.
    """

    kernel: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None = None
    bound: float | None = None

    def times(self, factor: np.ndarray | float) -> "Linear":
        """The layer whose outputs are multiplied by a factor, one for all or one each."""
        bias = (self.bias * factor).astype(np.float32)
        if self.scale is None:
            return Linear((self.kernel * factor).astype(np.float32), bias)
        return Linear(self.kernel, bias, (self.scale * factor).astype(np.float32), self.bound)

    def beside(self, *others: "Linear") -> "Linear | None":
        """One layer with the outputs of all, which read the same input; None where they do not multiply alike."""
        layers = (self, *others)
        kinds = {(layer.scale is None, layer.bound) for layer in layers}
        if len(kinds) > 1:
            return None
        scale = None if self.scale is None else np.concatenate([layer.scale for layer in layers])
        kernel = np.concatenate([layer.kernel for layer in layers], axis=1)
        return Linear(kernel, np.concatenate([layer.bias for layer in layers]), scale, self.bound)


class Graph:
    """Nodes and constants of a graph that is being written; each method returns the names of what it computes."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._node, self._tensor = helper.make_node, numpy_helper.from_array
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def constant(self, value: Any, dtype: Any, name: str = "") -> str:
        """A constant; small ones of equal value are one."""
        array = np.ascontiguousarray(np.asarray(value, dtype))
        key = (array.tobytes(), array.dtype.str, array.shape) if array.size < 64 and not name else (name,)
        if key not in self._known:
            self._known[key] = name or f"constant_{len(self.constants)}"
            self.constants[self._known[key]] = self._tensor(array, self._known[key])
        return self._known[key]

    def shape(self, *values: int) -> str:
        """A constant of int64."""
        return self.constant(values, np.int64)

    def number(self, value: float) -> str:
        """A constant scalar of float32."""
        return self.constant(value, np.float32)

    def add(self, op: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or a tuple of several."""
        names = tuple(f"{name or op}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs))
        self.nodes.append(self._node(op, list(inputs), list(names), name=f"{op}_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        """``x[start:end]`` along an axis."""
        return self.add("Slice", x, self.shape(start), self.shape(end), self.shape(axis))

    def gather(self, x: str, index: str) -> str:
        """Tokens `(B, N, D)` at places `(B, K)`: `(B, K, D)`."""
        return self.add("GatherND", x, self.add("Unsqueeze", index, self.shape(2)), batch_dims=1)

    def rising(self, index: str, count: int) -> str:
        """Places `(B, K)` sorted; `count` is K."""
        return self.add("TopK", index, self.shape(count), outputs=2, axis=-1, largest=0, sorted=1)[0]


@dataclass
class _Stream:
    """The tokens between two splits, `Skip`'s own in names of a graph."""

    n: int
    rejoin: int | None = None
    rest: str = ""
    inverse: str = ""
    outer: "_Stream | None" = None


@dataclass
class _Writer:
    """Writes a model block by block."""

    model: ViT
    params: Mapping[str, np.ndarray]
    layers: Mapping[str, Linear]
    weight_only: bool
    graph: Graph = field(default_factory=Graph)
    _quantised: dict[tuple[str, float | None], tuple[str, str]] = field(default_factory=dict)

    def linear(self, x: str, layer: Linear, name: str) -> str:
        """A linear layer of tokens `(B, N, in)`."""
        g = self.graph
        kernel, bias = g.constant(layer.kernel, layer.kernel.dtype, f"{name}/kernel"), layer.bias
        bias = g.constant(bias, np.float32, f"{name}/bias")
        if layer.scale is None:
            return g.add("Add", g.add("MatMul", x, kernel, name=name), bias)
        scale = g.constant(layer.scale, np.float32, f"{name}/scale")
        if self.weight_only:  # DequantizeLinear here would have ONNX Runtime round x too
            x = g.add("MatMul", x, g.add("Cast", kernel, to=_TYPES["float32"]), name=name)
            return g.add("Add", g.add("Mul", x, scale), bias)
        zeros = g.constant(np.zeros(len(layer.scale)), np.int8, f"{name}/zero")
        integers, of_tokens = self.quantised(x, layer.bound)
        y = g.add("MatMul", integers, g.add("DequantizeLinear", kernel, scale, zeros, axis=1), name=name)
        return g.add("Add", g.add("Mul", y, of_tokens) if of_tokens else y, bias)

    def quantised(self, x: str, bound: float | None) -> tuple[str, str]:
        """Tokens rounded, as QuantizeLinear and DequantizeLinear leave them, and what they are still to be multiplied by.

        With a static range nothing is left; else the scales of the tokens, `(B, N, 1)`, as a runtime's int8 product takes no
        scale for each row. See `quantizer`.
        """
        if (x, bound) not in self._quantised:
            g, of_tokens = self.graph, ""
            scale = g.number(1)
            if bound is None:
                largest = g.add("ReduceMax", g.add("Abs", x), g.shape(-1), keepdims=1)
                least = g.number(1e-30)  # where all are 0
                of_tokens = g.add("Mul", g.add("Max", largest, least), g.number(1 / quantizer.edge(8)))
                values = g.add("Mul", x, g.add("Reciprocal", of_tokens))
            else:
                values, scale = x, g.number(bound / quantizer.edge(8))
            # QuantizeLinear alone goes on to -128.
            lowest = g.number(-_N if bound is None else -_N * bound / quantizer.edge(8))
            zero = g.constant(_ZERO, np.uint8)
            integers = g.add("QuantizeLinear", g.add("Max", values, lowest), scale, zero)
            self._quantised[x, bound] = g.add("DequantizeLinear", integers, scale, zero), of_tokens
        return self._quantised[x, bound]

    def norm(self, x: str, name: str) -> str:
        """LayerNorm."""
        g, p = self.graph, self.params
        scale, bias = (g.constant(p[f"{name}/{part}"], np.float32, f"{name}/{part}") for part in ("scale", "bias"))
        return g.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.model.eps)

    def embed(self, images: str, mean: Sequence[float], std: Sequence[float], size: int) -> str:
        """uint8 images `(B, S, S, 3)` to tokens `(B, P + N, D)`."""
        g, m, p = self.graph, self.model, self.params
        side = size // m.patch
        x = g.add("Reshape", images, g.shape(-1, side, m.patch, side, m.patch, 3))
        x = g.add("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = g.add("Cast", g.add("Reshape", x, g.shape(-1, side * side, 3 * m.patch**2)), to=_TYPES["float32"])
        kernel, bias = p["embed/patch/kernel"].astype(np.float64), p["embed/patch/bias"].astype(np.float64)
        mean, std = (np.tile(np.asarray(v, np.float64), m.patch**2)[:, None] for v in (mean, std))
        position = p["embed/position"][0]
        folded = Linear(
            (kernel / (255 * std)).astype(np.float32),
            (bias - (kernel * mean / std).sum(axis=0) + position[m.prefix :]).astype(np.float32),
        )
        x = self.linear(x, folded, "embed/patch")
        tokens = [p[f"embed/{name}"][0] for name in ("cls_token", "dist_token")[: m.prefix]]
        prefix = g.constant((np.concatenate(tokens) + position[: m.prefix])[None], np.float32, "embed/prefix")
        batch = g.slice(g.add("Shape", x), 0, 1, 0)
        prefix = g.add("Expand", prefix, g.add("Concat", batch, g.shape(m.prefix, m.width), axis=0))
        return g.add("Concat", prefix, x, axis=1)

    def block(self, i: int, x: str, leave: int | None) -> tuple[str, str]:
        """A block; returns the tokens, the first `leave` of them or all, and their attention `(B, H, N, M)`."""
        g, name = self.graph, f"blocks_{i}"

        def residual(path: str, scale: str) -> Linear:
            layer = self.layers[f"{name}/{path}"]
            return layer.times(self.params[f"{name}/{scale}/scale"]) if self.model.layer_scale else layer

        y, attention = self.attention(name, self.norm(x, f"{name}/norm1"), leave)
        y = self.linear(y, residual("attn/out", "scale1"), f"{name}/attn/out")
        x = g.add("Add", x if leave is None else g.slice(x, 0, leave, 1), y)
        y = self.linear(self.norm(x, f"{name}/norm2"), self.layers[f"{name}/mlp/fc1"], f"{name}/mlp/fc1")
        y = self.linear(g.add("Gelu", y), residual("mlp/fc2", "scale2"), f"{name}/mlp/fc2")
        return g.add("Add", x, y), attention

    def attention(self, name: str, x: str, leave: int | None) -> tuple[str, str]:
        """Attention between the projections; `(B, N, D)` and `(B, H, N, M)`."""
        g, heads = self.graph, self.model.heads
        channels = self.model.width // heads
        query, key, value = (self.layers[f"{name}/attn/{part}"] for part in ("query", "key", "value"))
        query = query.times(channels**-0.5)

        def split(y: str, parts: int) -> list[str]:
            y = g.add("Reshape", y, g.shape(0, 0, parts, heads, channels))
            y = g.add("Transpose", y, perm=[2, 0, 3, 1, 4])
            found = g.add("Split", y, outputs=parts, axis=0, num_outputs=parts) if parts > 1 else [y]
            return [g.add("Squeeze", part, g.shape(0)) for part in found]

        together = None if leave is not None else query.beside(key, value)
        if together is not None:
            q, k, v = split(self.linear(x, together, f"{name}/attn/qkv"), 3)
        else:
            first = x if leave is None else g.slice(x, 0, leave, 1)
            (q,) = split(self.linear(first, query, f"{name}/attn/query"), 1)
            if (both := key.beside(value)) is not None:
                k, v = split(self.linear(x, both, f"{name}/attn/kv"), 2)
            else:
                (k,), (v,) = (
                    split(self.linear(x, y, f"{name}/attn/{n}"), 1) for n, y in (("key", key), ("value", value))
                )
        scores = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2]))
        attention = g.add("Softmax", scores, axis=-1)
        y = g.add("Transpose", g.add("MatMul", attention, v), perm=[0, 2, 1, 3])
        return g.add("Reshape", y, g.shape(0, 0, self.model.width)), attention

    def select(self, block: int, x: str, attention: str, stream: _Stream) -> tuple[str, _Stream]:
        """Token skipping after a block, as `Skip` in mode 'gather'."""
        g, prefix = self.graph, self.model.prefix
        while stream.rejoin == block + 1:
            together = g.add("Concat", g.slice(x, prefix, _END, 1), stream.rest, axis=1)
            x = g.add("Concat", g.slice(x, 0, prefix, 1), g.gather(together, stream.inverse), axis=1)
            stream = stream.outer
        for split in self.model.select.splits:
            if split.after == block:
                x, stream = self._split(split, x, attention, stream)
        return x, stream

    def _split(self, split: Split, x: str, attention: str, stream: _Stream) -> tuple[str, _Stream]:
        g, prefix, n, select = self.graph, self.model.prefix, stream.n, self.model.select
        k = select.count(split, n)
        if k >= n:
            return x, stream
        score = g.add("ReduceMean", g.slice(attention, 0, prefix, 2), g.shape(1, 2), keepdims=0)
        score, tokens = g.slice(score, prefix, _END, 1), g.slice(x, prefix, _END, 1)
        falling = g.add("TopK", score, g.shape(n), outputs=2, axis=-1, largest=1)[1]
        kept, left = g.rising(g.slice(falling, 0, k, 1), k), g.rising(g.slice(falling, k, n, 1), n - k)
        parts = [g.slice(x, 0, prefix, 1), g.gather(tokens, kept)]
        if select.fuse:
            weights = g.add("Unsqueeze", g.add("GatherElements", score, left, axis=1), g.shape(1))
            parts.append(g.add("MatMul", weights, g.gather(tokens, left)))
        inner = _Stream(k + select.fuse, split.rejoin)
        if split.rejoin is not None:
            order = g.add("Concat", kept, left, axis=1)
            inner.rest, inner.outer = g.gather(tokens, left), stream
            # Where each token lies: what sorts a permutation is its inverse.
            inner.inverse = g.add("TopK", order, g.shape(n), outputs=2, axis=-1, largest=0)[1]
        return g.add("Concat", *parts, axis=1), inner

    def logits(self, x: str, leave: int | None) -> str:
        """The heads, after the last LayerNorm."""
        g, m, p = self.graph, self.model, self.params
        x = self.norm(x, "norm")
        parts = {
            "cls": lambda: g.add("Squeeze", g.slice(x, 0, 1, 1), g.shape(1)),
            "mean": lambda: g.add("ReduceMean", g.slice(x, m.prefix, _END, 1), g.shape(1), keepdims=0),
        }
        features = [parts[name]() for name in m.features.split("+")]
        pooled = features[0] if len(features) == 1 else g.add("Concat", *features, axis=1)
        heads = [("head", pooled)]
        if m.distilled and m.dist_head:
            heads.append(("head_dist", g.add("Squeeze", g.slice(x, 1, 2, 1), g.shape(1))))
        share = 1 / len(heads)
        found = [self.linear(y, Linear(p[f"{name}/kernel"], p[f"{name}/bias"]).times(share), name) for name, y in heads]
        return found[0] if len(found) == 1 else g.add("Add", *found)


_TYPES = {"float32": 1, "uint8": 2, "int8": 3}
"""Element types, by the numbers of ONNX's TensorProto."""


def layers_of(model: ViT, variables: Mapping[str, Any], settings: quant.Settings | None) -> dict[str, Linear]:
    """The linear layers of the blocks by path, as they multiply.

    Args:
        model: The program's.
        variables: `params`, and of an int8 model `quant`.
        settings: Of an int8 model; None for a float one.
    """
    params = tree.flatten(variables["params"])
    ranges = tree.flatten(variables.get(quant.COLLECTION, {}))
    found = {}
    for i in range(model.depth):
        for part in ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/fc1", "mlp/fc2"):
            path = f"blocks_{i}/{part}"
            kernel, bias = (np.asarray(params[f"{path}/{leaf}"]) for leaf in ("kernel", "bias"))
            if kernel.dtype != np.int8:
                found[path] = Linear(kernel.astype(np.float32), bias.astype(np.float32))
                continue
            bound = float(ranges[f"{path}/quant/bound"]) or 1.0 if settings is not None and settings.static else None
            found[path] = Linear(kernel, bias.astype(np.float32), np.asarray(ranges[f"{path}/quant/scale"]), bound)
    return found


def build(
    model: ViT,
    variables: Mapping[str, Any],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    settings: quant.Settings | None = None,
    temperature: float = 1.0,
    multilabel: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """An `onnx.ModelProto` of a model.

    Its input `images` is uint8 `(batch, size, size, 3)`, RGB; its outputs are `logits` and `probabilities`, float32
    `(batch, classes)`, the latter after the temperature. The batch is of any size.

    Args:
        model: With the selector, if tokens skip.
        variables: `params` with adapters merged, and of an int8 model the collection `quant`.
        size: Side of the images, pixels.
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        settings: Of an int8 model.
        temperature: Divides the logits.
        multilabel: Probabilities of each label by itself.
        metadata: What else the file says of the model; JSON.

    Raises:
        InputError: The products of attention are int8, which no ONNX operator expresses well, or the package is missing.
    """
    try:
        from onnx import helper
    except ModuleNotFoundError:
        raise InputError("ONNX needs the package onnx: pip install 'vitft_jax[onnx]'") from None
    if settings is not None and settings.attention:
        raise InputError("int8 attention has no ONNX form here; quantise the run without --attention and export that")
    params = {name: np.asarray(leaf) for name, leaf in tree.flatten(variables["params"]).items()}
    writer = _Writer(
        model, params, layers_of(model, variables, settings), settings is not None and settings.weight_only
    )
    g = writer.graph
    x = writer.embed(INPUT, mean, std, size)
    stream = _Stream((size // model.patch) ** 2)
    for i in range(model.depth):
        leave = model.prefix if model.features == "cls" and i == model.depth - 1 else None
        x, attention = writer.block(i, x, leave)
        if model.select is not None:
            x, stream = writer.select(i, x, attention, stream)
    logits = writer.logits(x, leave)
    g.nodes.append(helper.make_node("Identity", [logits], [OUTPUTS[0]]))
    scaled = g.add("Mul", logits, g.number(1 / temperature))
    squash = {"op_type": "Sigmoid"} if multilabel else {"op_type": "Softmax", "axis": -1}
    g.nodes.append(helper.make_node(inputs=[scaled], outputs=[OUTPUTS[1]], **squash))

    image = helper.make_tensor_value_info(INPUT, _TYPES["uint8"], ["batch", size, size, 3])
    outputs = [helper.make_tensor_value_info(name, _TYPES["float32"], ["batch", model.classes]) for name in OUTPUTS]
    graph = helper.make_graph(g.nodes, "vitft_jax", [image], outputs, list(g.constants.values()))
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="vitft_jax"
    )
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in (metadata or {}).items()})
    return proto
