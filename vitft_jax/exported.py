"""What an exported model says of itself beside its weights, in `vitft_jax.json`: classes, preprocessing, thresholds."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitft_jax import report, weightfiles
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError

FILE = "vitft_jax.json"


@dataclass(frozen=True)
class About:
    """An exported model.

    Attributes:
        format: Key of `export.FORMATS`.
        classes: Names of the outputs.
        multilabel: Whether an image has several labels: sigmoids, else a softmax.
        image_size: Side of the input, pixels.
        mean: The input is `(x / 255 - mean) / std`, by channel.
        std: See `mean`.
        fit: How an image of another shape is brought to the input, see `data.resize`.
        temperature: What logits are still to be divided by; 1 where the weights contain the run's.
        thresholds: Probability from which on each label is decided; () = one half, and for classes.
        step: Of the checkpoint.
        left_out: Methods of the run without which the exported model computes.
        base: Where the run's base weights came from: source, revision and sha256.
    """

    format: str
    classes: tuple[str, ...]
    multilabel: bool
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str
    temperature: float
    thresholds: tuple[float, ...]
    step: int
    left_out: tuple[str, ...]
    base: dict[str, str]

    @property
    def decision(self) -> Decision:
        """How its logits are read."""
        return Decision(self.temperature, self.thresholds)


def write(folder: Path, about: About, **more: Any) -> None:
    """Writes the file, with what else a format has to say."""
    report.write_json(folder / FILE, {**asdict(about), **more})


def read(folder: Path) -> About:
    """Reads the file.

    Raises:
        InputError: It is not there or damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no exported model here ({FILE})")
    content = weightfiles.read_json(path)
    try:
        return About(
            format=str(content["format"]),
            classes=tuple(map(str, content["classes"])),
            multilabel=bool(content["multilabel"]),
            image_size=int(content["image_size"]),
            mean=_three(content["mean"]),
            std=_three(content["std"]),
            fit=str(content["fit"]),
            temperature=float(content["temperature"]),
            thresholds=tuple(map(float, content["thresholds"])),
            step=int(content["step"]),
            left_out=tuple(map(str, content["left_out"])),
            base=dict(content["base"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not as vitft_jax.export writes it: {error!r}; export the run again") from None


def _three(values: list[float]) -> tuple[float, ...]:
    red, green, blue = map(float, values)
    return red, green, blue
