"""What a run stands on, and what came of it: its base weights, and its best model."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vitft_jax import config as configs
from vitft_jax import pretrained, step, tree
from vitft_jax.build import ARCHITECTURE, Built, build_for
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.task import Task


def resolve(
    config: configs.Config, whole: dict[str, Any] | None = None
) -> tuple[configs.Config, pretrained.Pretrained | None]:
    """Reads the base weights; returns the config with what they determine filled in, and the weights.

    Args:
        config: Of the run.
        whole: Of a run whose checkpoint holds the whole model, `Folder.whole`: no weights are read then.

    Raises:
        InputError: The weights cannot be read.
    """
    source = None
    if config.model.pretrained and whole is None:
        workdir = Path(config.model.pretrained).expanduser()
        if Folder(workdir).exists:
            if config.model.revision:
                raise InputError(
                    f"config key model.revision={config.model.revision!r} is for Hub ids, {workdir} is a run"
                )
            source = finetuned(workdir, config.model.name)
        else:
            source = pretrained.load(config.model.pretrained, config.model.revision, config.model.name)
    config = configs.absolute(config)
    config.data.image_size = config.data.image_size or (source.image_size if source else 224)
    return config, source


def finetuned(workdir: Path, name: str = "") -> pretrained.Pretrained:
    """The best model of a run as base weights of another: adapters merged, and the head, which stays where the classes do.

    Args:
        workdir: The folder of the run; its base weights must still be where they were.
        name: Key of `vit.VARIANTS` that the architecture must agree with; '' for no such check.

    Raises:
        InputError: The run has no checkpoint, is quantised, or has another architecture; or as `resolve` and `build`.
    """
    if Folder(workdir).whole() is not None:
        raise InputError(f"model.pretrained={workdir}: is an int8 model; give the run that it was made from")
    found = best(workdir)
    built, trainable = found.built, found.built.program.layout.gathered(found.trainable)
    model = {key: getattr(built.program.model, key) for key in ARCHITECTURE}
    if name:
        pretrained.confirm(name, model, str(workdir))
    digest = hashlib.sha256(built.weights.sha256.encode())
    for leaf_name, leaf in sorted(tree.flatten(trainable).items()):
        digest.update(leaf_name.encode() + np.asarray(leaf).tobytes())
    return pretrained.Pretrained(
        model=model,
        params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), built.merged(trainable)),
        classes=found.task.classes,
        image_size=found.config.data.image_size,
        mean=built.program.mean,
        std=built.program.std,
        antialias=found.source.antialias if found.source else True,
        source=str(workdir.resolve()),
        revision="",
        sha256=digest.hexdigest(),
    )


@dataclass(frozen=True)
class Best:
    """The best model of a run.

    Attributes:
        config: Of the run, on the devices of today.
        task: Of the run.
        source: What its base weights are, its `params` let go; None where they were random, or the checkpoint holds the whole
            model.
        built: Its program, and its variables before step 0.
        trainable: What trained, as in the best checkpoint.
        step: Of that checkpoint.
    """

    config: configs.Config
    task: Task
    source: pretrained.Pretrained | None
    built: Built
    trainable: Any
    step: int


def best(workdir: Path, devices: int = 0) -> Best:
    """The best model of a run, from its folder and its base weights alone, on so many devices (0 = all).

    Raises:
        InputError: No run or no checkpoint there, its base weights are not what they were, or its static ranges were never
            calibrated.
    """
    folder = Folder(workdir)
    whole = folder.whole()
    config = folder.config()
    config.mesh = configs.default().mesh  # the devices of today
    config.mesh.data = devices
    config, source = resolve(config, whole)
    task = folder.task(config)
    built = build_for(config, task, source, whole)
    source = replace(source, params={}) if source else None  # in float, beside what `built` holds
    folder.confirm(task, built)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        trainable, at = checkpoints.restore_best(built.trainable, built.program.layout)
    step.check_calibrated(built.program, trainable)
    return Best(config, task, source, built, trainable, at)
