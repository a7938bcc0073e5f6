"""One program over many devices: a mesh with the axes `data` and `model`, and where every array lies on it.

Batches are cut over `data`. Where a variable lies follows from its name, by two tables of regexes; in each the first match
holds. `DIMENSIONS`, behind the rules of the methods for their own variables, says what the dimensions of a leaf are: 'in'
and 'out' of a linear layer, 'width' elsewhere, None for one that is never cut. `PARALLEL` says which of them a layer cuts over
`model`: the first linear layer of a pair by its outputs, the second by its inputs, so that a pair costs one sum over devices
(Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3).

With `fsdp` a leaf is also cut over `data`, and gathered where it is used (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054,
stage 3): along the longest dimension with a name that is not cut yet and that the devices divide. Leaves of one dimension
(biases, norms, scales) stay whole: they are less than a hundredth of the bytes, and each would cost a message of its own.

Optimiser state has the names of the variables inside its own, so the same rules lay it out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from vitft_jax import product, tree
from vitft_jax.errors import InputError

AXES = ("data", "model")
DotGeneralCls = Callable[[], Callable[..., Array]]
Dimensions = tuple[str | None, ...]
Rules = tuple[tuple[str, Dimensions], ...]

DIMENSIONS: Rules = (
    (r"/kernel$", ("in", "out")),
    (r"/bias$", ("out",)),
    (r"/scale$", ("width",)),  # LayerNorm and LayerScale
    (r"/embed/(position|cls_token|dist_token)$", (None, None, "width")),
    (r"(^|/)(step|count)$", ()),
)
"""What the dimensions of a leaf are, by its name."""

PARALLEL: tuple[tuple[str, Mapping[str, str]], ...] = (
    (r"/blocks_\d+/(attn/(query|key|value)|mlp/fc1)/", {"out": "model"}),
    (r"/blocks_\d+/(attn/out|mlp/fc2)/", {"in": "model"}),
    (r"", {}),
)
"""Which dimensions of a linear layer, and of what stands beside its kernel, are cut over which axis."""


@dataclass(frozen=True)
class Layout:
    """Where arrays lie.

    Attributes:
        mesh: Devices `(data, model)`; None is one device, on which nothing is laid out.
        fsdp: Cut variables and optimiser state over `data` too.
        rules: Of the methods, see `methods.Method.sharding`; they come before `DIMENSIONS`.
    """

    mesh: Mesh | None = None
    fsdp: bool = False
    rules: Rules = ()

    def spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a leaf is cut.

        Raises:
            InputError: No rule covers the name, the rule is for another number of dimensions, or `model` does not divide a
                dimension.
        """
        dimensions = tree.first_match((*self.rules, *DIMENSIONS), name)
        if dimensions is None:
            raise InputError(f"sharding: no rule covers {name} {shape}; its method states one in `Method.sharding`")
        if len(dimensions) != len(shape):
            raise InputError(f"sharding: the rule for {name} is for dimensions {dimensions}, and it has shape {shape}")
        if self.mesh is None:
            return PartitionSpec()
        cut = tree.first_match(PARALLEL, name)
        axes = [cut.get(dimension) if self._size(cut.get(dimension)) > 1 else None for dimension in dimensions]
        for size, axis in zip(shape, axes, strict=True):
            if size % self._size(axis):
                raise InputError(
                    f"config key mesh.{axis}={self._size(axis)}: does not divide the {size} of {name} {shape}"
                )
        if self.fsdp and len(shape) > 1:
            free = [
                i
                for i, dimension in enumerate(dimensions)
                if dimension and axes[i] is None and shape[i] % self._size("data") == 0
            ]
            if free and self._size("data") > 1:
                axes[max(free, key=lambda i: shape[i])] = "data"
        while axes and axes[-1] is None:
            axes.pop()  # as the compiler writes it: layouts that differ in this alone would compile twice
        return PartitionSpec(*axes)

    def shardings(self, arrays: Any) -> Any:
        """The sharding of every leaf of a tree of arrays or shapes; raises as `spec`."""
        if self.mesh is None:
            return jax.tree.map(lambda _: self.everywhere, arrays)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, self.spec(_name(path), np.shape(leaf))), arrays
        )

    def shapes(self, arrays: Any) -> Any:
        """The shape of every leaf, with where it lies; raises as `spec`."""
        return jax.tree.map(_shape, arrays, self.shardings(arrays))

    @property
    def everywhere(self) -> jax.sharding.Sharding:
        """Whole on every device."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def check(self, arrays: Any) -> None:
        """Makes sure that every leaf is covered, and that every rule covers a leaf.

        Raises:
            InputError: Names what is not; or as `spec`.
        """
        names = [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(arrays)[0]]
        for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
            self.spec(_name(path), np.shape(leaf))
        for rules in ((*self.rules, *DIMENSIONS), PARALLEL):
            used = {tree.first_match(((pattern, pattern) for pattern, _ in rules), name) for name in names}
            if unused := [pattern for pattern, _ in rules if pattern not in used]:
                raise InputError(
                    f"sharding: the rules {', '.join(map(repr, unused))} cover none of the {len(names)} leaves, such as "
                    f"{names[0]}; a rule before them takes theirs, or they are misspelt"
                )

    def put(self, arrays: Any) -> Any:
        """Puts arrays where they belong. From the host, each process copies only what lies on its own devices."""

        def place(x: Any, sharding: jax.sharding.Sharding) -> Array:
            if isinstance(x, Array) and x.sharding == sharding:
                return x
            if self.mesh is None:
                return jax.device_put(x, sharding)
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(place, arrays, self.shardings(arrays))

    def pin(self, arrays: Any) -> Any:
        """In a jitted function: makes the result lie where it belongs."""
        return arrays if self.mesh is None else jax.lax.with_sharding_constraint(arrays, self.shardings(arrays))

    def whole(self, arrays: Any) -> Any:
        """In a jitted function: makes the result whole on every device, so that every process can read it."""
        return arrays if self.mesh is None else jax.lax.with_sharding_constraint(arrays, self.everywhere)

    def gathered(self, arrays: Any) -> Any:
        """Arrays that lie somewhere, whole on every device."""
        return arrays if self.mesh is None else jax.jit(lambda x: x, out_shardings=self.everywhere)(arrays)

    @property
    def by_rows(self) -> jax.sharding.Sharding:
        """Cut over `data` along the first dimension, as batches are."""
        return self.everywhere if self.mesh is None else NamedSharding(self.mesh, PartitionSpec("data"))

    def batch(self, rows: Any) -> Any:
        """A batch over all processes, of the host's arrays `(b, ...)` that this one has read."""
        if self.mesh is None:
            return rows
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.by_rows, x), rows)

    def products(self, dot_general_cls: DotGeneralCls | None) -> DotGeneralCls | None:
        """Wraps the constructor of the product in a linear layer: examples stay where they are, kernels come to them.

        Without this the compiler may divide the examples otherwise inside the network, and send those around.
        """
        if self.mesh is None:
            return dot_general_cls

        def construct() -> Callable[..., Array]:
            dot = dot_general_cls() if dot_general_cls else product.dot_general
            return lambda x, kernel, *args, **kwargs: self._examples(dot(self._examples(x), kernel, *args, **kwargs))

        return construct

    def _examples(self, x: Array) -> Array:
        """Cuts examples `(B, ...)` over `data`, and leaves the other dimensions to the compiler."""
        if x.shape[0] % self._size("data"):  # a few pictures to draw, or one to find shapes
            return x
        spec = PartitionSpec("data", *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    @property
    def reader(self) -> tuple[int, int]:
        """Which part of a batch this process reads, and in how many parts batches are read."""
        if self.mesh is None:
            return 0, 1
        mine = [i for i, row in enumerate(self.mesh.devices) if any(_is_local(device) for device in row)]
        return mine[0] // len(mine), self.mesh.shape["data"] // len(mine)

    def rows(self, batch_size: int) -> int:
        """The batch size that is at least `batch_size` and divides over `data`."""
        data = self._size("data")
        return -(-batch_size // data) * data

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Refuses micro-batches that do not divide over `data`.

        Raises:
            InputError: Says what would.
        """
        data, rows = self._size("data"), batch_size // accumulate
        if rows % data:
            fitting = max(n for n in range(1, data) if rows % n == 0)
            raise InputError(
                f"config key train.batch_size={batch_size}: {accumulate} micro-batch{'es' * (accumulate > 1)} of {rows} "
                f"images do not divide over mesh.data, {data} devices. Take train.batch_size={self.rows(rows) * accumulate}, "
                f"or mesh.data={fitting}"
            )

    def _size(self, axis: str | None) -> int:
        return 1 if self.mesh is None or axis is None else self.mesh.shape[axis]


ONE_DEVICE = Layout()


def layout(config: Any, rules: Rules = ()) -> Layout:
    """The layout that ``config.mesh`` asks for, over the devices of all processes.

    Devices are in the order of their processes, so that the rows that a process reads are those that a single process would
    have there.

    Raises:
        InputError: There are not as many devices, or `model` cuts across processes.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    c, count = config.mesh, len(devices)
    data = c.data or count // c.model
    asked = f"config keys mesh.data={c.data}, mesh.model={c.model}"
    if not data or data * c.model > count or (not c.data and count % c.model):
        raise InputError(
            f"{asked}: need {max(data, 1) * c.model} of {count} devices{' exactly' * (not c.data)}; on one device both are 1"
        )
    if jax.process_count() > 1 and data * c.model != count:
        raise InputError(f"{asked}: with several processes all {count} devices take part; mesh.data=0 takes all")
    local = jax.local_device_count()
    if jax.process_count() > 1 and local % c.model and c.model % local:
        raise InputError(
            f"{asked}: each process has {local} devices; mesh.model divides them, or is a multiple of them"
        )
    if data * c.model == 1:
        return Layout(rules=rules)
    grid = np.array(devices[: data * c.model]).reshape(data, c.model)
    return Layout(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2), c.fsdp, rules)


def _shape(a: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=sharding)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_local(device: jax.Device) -> bool:
    return device.process_index == jax.process_index()
