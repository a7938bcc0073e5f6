"""Fine-tuning methods: what a method is, and how several become one.

A method is one module in this package with a function ``method(config) -> Method``; the config group it reads has its
name, or that of the method it is a variant of. Every field of `Method` has an identity default, so a method states only
what it changes.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optax
from jax import Array

from vitft_jax import config as configs
from vitft_jax import product
from vitft_jax.attention import Attend
from vitft_jax.errors import InputError, nearest
from vitft_jax.sharding import Rules

READS = {"dora": "lora", "pissa": "lora"}
"""The config group of a method that is a variant of another; of others it has their name."""

Variables = Mapping[str, Any]
DotGeneralCls = Callable[[], Callable[..., Array]]


@dataclass(frozen=True)
class Method:
    """What a fine-tuning method changes about a model and its training; the defaults change nothing.

    Attributes:
        collections: Variable collections that train, beside the chosen part of `params`.
        ranges: Variable collections of calibrated numbers: kept in checkpoints beside what trains, without a gradient. They
            are NaN until `calibrate`, and a model with NaN there is refused.
        sharding: What the dimensions of its own variables and optimiser state are, ``(regex on names, dimensions)``, as in
            `sharding.DIMENSIONS`. Beside a kernel, 'in' and 'out' are those of the kernel, and cut as they are.
        dot: Wraps the constructor of the product in a linear layer: ``dot(base)() (x, kernel, dimensions)``.
        attend: Attention between the projections, in the place of `attention.attend`; None leaves it alone.
        prepare: Rewrites the variables once, before step 0, such as to initialise an adapter from the kernels.
        calibrate: ``calibrate(variables, seen)`` fills `ranges` before step 0 from what the linear layers of the float model
            see on training images, `ptq.observe.Seen` by path.
        select: Token selector (`vit.Select`), or None.
        phases: ``phases(total_steps)``: selectors in its place early in training, each with the step at which it ends, in
            order. Each compiles a step of its own.
        check: ``check(model, patches)`` raises InputError where a model (`vit.ViT`) or the number of its patch tokens does
            not suit the method.
        patches: ``patches(model, variables, images)``: which patches of normalised images go on after a block, bool
            `(B, patches)` by block, to be drawn over the images; None where there is nothing to draw.
        penalty: Maps the trainable variables to a scalar that is added to the loss, or None.
        wrap_tx: ``wrap_tx(tx, total_steps)`` wraps the optimiser.
        merge: Folds the adapters into `params`, in float; takes and returns variables, without its own collections.
        ready_from: Maps the number of steps of a run to the first one whose model is what the method promises; an
            earlier one is never kept as the best, and early stopping waits for it.
        report: ``report(trainable, opt_state)``, what the method did so far, as JSON, for `metrics.jsonl` and
            `summary.json`; an entry that maps paths of layers to numbers is drawn as a heat map.
    """

    collections: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    sharding: Rules = ()
    dot: Callable[[DotGeneralCls], DotGeneralCls] | None = None
    attend: Attend | None = None
    prepare: Callable[[Variables], Variables] = lambda variables: variables
    calibrate: Callable[[Variables, Mapping[str, Any]], Variables] = lambda variables, seen: variables
    select: Any = None
    phases: Callable[[int], Sequence[tuple[int, Any]]] = lambda total_steps: ()
    check: Callable[[Any, int], None] = lambda model, patches: None
    patches: Callable[[Any, Variables, Array], Mapping[int, Array]] | None = None
    penalty: Callable[[Variables], Array] | None = None
    wrap_tx: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] = lambda tx, total_steps: tx
    merge: Callable[[Variables], Variables] = lambda variables: variables
    ready_from: Callable[[int], int] = lambda total_steps: 0
    report: Callable[[Variables, Any], dict[str, Any]] = lambda trainable, opt_state: {}

    @property
    def dot_general_cls(self) -> DotGeneralCls | None:
        """The constructor for `vit.ViT`; None where the method leaves the products alone."""
        return self.dot(lambda: product.dot_general) if self.dot else None


def stack(methods: Sequence[Method]) -> Method:
    """Combines methods, inner to outer, into one.

    Raises:
        InputError: Two methods select tokens, two replace the attention, or two put adapters on the linear layers.
    """
    selectors = [m for m in methods if m.select is not None]
    if len(selectors) > 1:
        raise InputError("two methods select tokens; keep one of them in config.methods")
    attends = [m.attend for m in methods if m.attend is not None]
    if len(attends) > 1:
        raise InputError("two methods replace the attention; keep one of them in config.methods")
    # The inner one would see the path of the outer instead of the layer's, and merging would not find its kernel.
    if sum(bool(m.dot and m.collections) for m in methods) > 1:
        raise InputError("two methods put adapters on the linear layers; keep one of them in config.methods")
    dots = [m.dot for m in methods if m.dot]
    penalties = [m.penalty for m in methods if m.penalty]

    def dot(base: DotGeneralCls) -> DotGeneralCls:
        for wrap in dots:
            base = wrap(base)
        return base

    def prepare(variables: Variables) -> Variables:
        for m in methods:
            variables = m.prepare(variables)
        return variables

    def calibrate(variables: Variables, seen: Mapping[str, Any]) -> Variables:
        for m in methods:
            variables = m.calibrate(variables, seen)
        return variables

    def wrap_tx(tx: optax.GradientTransformation, total_steps: int) -> optax.GradientTransformation:
        for m in methods:
            tx = m.wrap_tx(tx, total_steps)
        return tx

    def check(model: Any, patches: int) -> None:
        for m in methods:
            m.check(model, patches)

    def merge(variables: Variables) -> Variables:
        for m in methods:  # inner to outer, so that adapters are folded into kernels that are float again
            variables = m.merge(variables)
        return variables

    return Method(
        collections=tuple(name for m in methods for name in m.collections),
        ranges=tuple(name for m in methods for name in m.ranges),
        sharding=tuple(rule for m in methods for rule in m.sharding),
        dot=dot if dots else None,
        attend=attends[0] if attends else None,
        prepare=prepare,
        calibrate=calibrate,
        select=selectors[0].select if selectors else None,
        phases=selectors[0].phases if selectors else lambda total_steps: (),
        check=check,
        patches=selectors[0].patches if selectors else None,
        penalty=(lambda variables: sum(p(variables) for p in penalties)) if penalties else None,
        wrap_tx=wrap_tx,
        merge=merge,
        ready_from=lambda total_steps: max((m.ready_from(total_steps) for m in methods), default=0),
        report=lambda trainable, opt_state: {
            key: value for m in methods for key, value in m.report(trainable, opt_state).items()
        },
    )


def unread(config: configs.Config) -> list[str]:
    """Settings of methods, other than the defaults, that no method of the run reads: each as ``key=value``."""
    groups = {READS.get(name, name) for name in _known()}
    unread = groups - {READS.get(name, name) for name in config.methods}
    return [f"{k}={v}" for k, _, v in configs.changes(configs.default(), config) if k.partition(".")[0] in unread]


def _known() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load(config: Any) -> Method:
    """Builds the method of a run from ``config.methods``, names of modules in this package, inner to outer.

    Raises:
        InputError: A name is unknown or occurs twice, or a method refuses its settings.
    """
    known = _known()
    for i, name in enumerate(config.methods):
        if name not in known:
            raise InputError(f"config.methods: unknown method {name!r}; {nearest(str(name), known)}")
        if name in config.methods[:i]:
            raise InputError(f"config.methods: {name!r} occurs twice")
    return stack([importlib.import_module(f"{__name__}.{name}").method(config) for name in config.methods])
