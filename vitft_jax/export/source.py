"""The best model of a run, as every format needs it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitft_jax import decision, run, tree
from vitft_jax.build import ARCHITECTURE
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError, nearest
from vitft_jax.exported import About
from vitft_jax.vit import ViT

LEAVABLE = ("skip", "quant")
"""Methods that stay in the model after merging, and without which it can be exported."""


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        without: Methods of `LEAVABLE` to leave out of the exported model.
        naming: Of PEFT's modules, one of `hf_names.SCHEMES`; '' = the first.
    """

    without: tuple[str, ...] = ()
    naming: str = ""


@dataclass(frozen=True)
class Source:
    """A run to be exported.

    Attributes:
        workdir: Its folder.
        best: Its best model, on one device.
        decision: How its logits are read.
        without: Methods that are left out.
    """

    workdir: Path
    best: run.Best
    decision: Decision
    without: tuple[str, ...]

    @property
    def model(self) -> ViT:
        """The network without any method, for `params`."""
        return self.best.built.program.model.clone(dot_general_cls=None, attend=None, select=None)

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `vit.ViT` that say what the model is."""
        return {name: getattr(self.model, name) for name in ARCHITECTURE}

    def params(self, calibrated: bool = True) -> dict[str, np.ndarray]:
        """Leaves of `params` by name, float32, adapters merged; where `calibrated`, the heads divide by the temperature."""
        leaves = tree.flatten(jax.device_get(self.best.built.merged(self.best.trainable)))
        leaves = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
        t = self.decision.temperature if calibrated else 1.0
        return {name: leaf / np.float32(t) if name.startswith("head") else leaf for name, leaf in leaves.items()}

    def refuse_methods(self, format: str) -> None:
        """For formats that know a plain ViT alone.

        Raises:
            InputError: A method of the run stays in the model, and is not left out.
        """
        for name in self.best.config.methods:
            if name in LEAVABLE and name not in self.without:
                raise InputError(
                    f"--workdir {self.workdir}: computes with {name!r}, which --format {format} cannot express. Use --format "
                    f"onnx or stablehlo, which keep it, or --without {name} for a model whose answers differ from the run's"
                )

    def about(self, format: str, calibrated: bool = True) -> About:
        """What the exported model says of itself; `calibrated` as in `params`."""
        program, task = self.best.built.program, self.best.task
        return About(
            format=format,
            classes=task.classes,
            multilabel=task.multilabel,
            image_size=self.best.config.data.image_size,
            mean=program.mean,
            std=program.std,
            fit=self.best.config.data.fit,
            temperature=1.0 if calibrated else self.decision.temperature,
            thresholds=self.decision.thresholds,
            step=self.best.step,
            left_out=self.without,
            base=asdict(self.best.built.weights),
        )

    def notes(self, dtype: str = "float32") -> list[str]:
        """Where a model that computes in `dtype`, without the methods left out, differs from the run."""
        notes = [
            f"without {name!r}, which the run computes with: answers differ from the run's, and its metrics, temperature and "
            "thresholds are not those of this model"
            for name in self.without
        ]
        if self.best.config.dtype != dtype:
            notes.append(
                f"the run computes in {self.best.config.dtype} and this model in {dtype}: probabilities differ by rounding"
            )
        return notes


def open_run(workdir: Path, without: Sequence[str] = ()) -> Source:
    """Opens a run to export its best model.

    Raises:
        InputError: As `run.best`; or a method that is to be left out is not there, or cannot be.
    """
    for name in without:
        if name not in LEAVABLE:
            raise InputError(f"--without {name}: {nearest(name, LEAVABLE)}")
    best = run.best(workdir, devices=1)
    for name in without:
        if name not in best.config.methods:
            raise InputError(f"--without {name}: this run does not compute with it; leave the flag away")
    return Source(workdir, best, decision.read(workdir), tuple(without))
