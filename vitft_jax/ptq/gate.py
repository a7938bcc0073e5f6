"""Which layers stay in float: how sensitive each one is, and how many of them it takes until a metric falls no further."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vitft_jax import data, decision, metrics, report, tree
from vitft_jax.config import Config
from vitft_jax.errors import InputError
from vitft_jax.evaluate import Outputs, outputs
from vitft_jax.ptq import simulate
from vitft_jax.ptq.simulate import Layer
from vitft_jax.step import Program


@dataclass(frozen=True)
class Simulation:
    """The quantised model with any of its layers in float: the program of `simulate`, and what its variables are made of."""

    program: Program
    params: tree.Tree
    layers: dict[str, Layer]
    weight_only: bool
    config: Config

    def outputs(self, dataset: data.Dataset, split: str, in_float: Sequence[str]) -> Outputs:
        """What it says about a split with some layers in float."""
        variables = simulate.variables(self.params, self.layers, in_float, self.weight_only)
        return outputs(self.program, variables, {}, dataset, split, self.config)


def sensitivity(simulation: Simulation, exact: Outputs, dataset: data.Dataset) -> dict[str, float]:
    """How much the divergence from the float model falls when one layer alone stays in float, by path, in nats.

    Args:
        simulation: Of the quantised model.
        exact: What the float model says about the training split of `dataset`.
        dataset: The images that are asked.
    """

    def divergence(in_float: Sequence[str]) -> float:
        p = simulation.outputs(dataset, "train", in_float).probabilities
        return simulate.divergence(exact.probabilities, p, dataset.multilabel)

    whole, values = divergence([]), {}
    for i, path in enumerate(simulation.layers, 1):
        values[path] = whole - divergence([path])
        if i % max(1, len(simulation.layers) // report.PLAIN_LINES) == 0:
            print(f"leaving out layer {i}/{len(simulation.layers)}  {path}  {values[path]:.2e} nats", flush=True)
    return values


def within(
    max_drop: float,
    in_float: Sequence[str],
    sensitivities: Mapping[str, float],
    dataset: data.Dataset,
    simulation: Simulation,
    before: Outputs,
) -> list[str]:
    """The layers to keep in float, the most sensitive first, until the metric falls by no more than `max_drop`.

    Raises:
        InputError: As `one_more`.
    """
    while True:
        after = simulation.outputs(dataset, "val", in_float)
        fallen = drop(before, after, dataset, simulation.config.train.thresholds)
        print(f"{len(in_float)} layers in float: validation drop {fallen:.2f} points", flush=True)
        if fallen <= max_drop:
            return list(in_float)
        in_float = one_more(in_float, sensitivities, max_drop)


def one_more(in_float: Sequence[str], sensitivities: Mapping[str, float], max_drop: float) -> list[str]:
    """The layers in float and the most sensitive of the others.

    Raises:
        InputError: Nothing would be left to quantise.
    """
    order = sorted(sensitivities, key=sensitivities.__getitem__, reverse=True)
    if len(in_float) + 1 >= len(order):
        raise InputError(
            f"--max_drop {max_drop}: no layer is left to quantise within it; allow more, or try other stages"
        )
    return order[: len(in_float) + 1]


def drop(before: Outputs, after: Outputs, dataset: data.Dataset, rule: str) -> float:
    """Percentage points that the first metric falls on the validation split; negative where it rises.

    Labels are decided at thresholds that are fitted to each side by `rule`, as those of the model that is written are.
    """

    def first(out: Outputs) -> float:
        groups = [dataset.groups[i] for i in out.indices]
        fitted = decision.fit(out.logits, out.labels, groups, rule)
        return replace(out, decision=fitted).metrics[metrics.names(dataset.multilabel)[0]]

    return 100 * (first(before) - first(after))
