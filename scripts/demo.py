"""The main job on what comes with the package: fine-tunes the bundled ViT to images of a scanner that it has not seen.

The ViT has learned normal, benign and malignant from generated images of one scanner; the images here come from another.
Three models are compared on its test patients: the ViT as it is, with its head trained further, and with LoRA adapters beside.
The runs are ordinary run folders, so the same command goes on where it stopped, and `evaluate` works on them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vitft_jax import cli, data, evaluate, metrics, run, runtime
from vitft_jax import config as configs
from vitft_jax.build import build
from vitft_jax.train import train

CONFIGS = Path(__file__).parent.parent / "configs"
NEXT = """\
{workdir}/lora holds the run: config, metrics, predictions, checkpoints.
With your own images, one sub-folder per class:
  python -m vitft_jax.train --config configs/lora.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS
WEIGHTS is a directory or Hub id of a pretrained ViT, DeiT or DINOv2; README.md says more.\
"""


def before(config: configs.Config) -> dict[str, Any]:
    """Test metrics of the bundled ViT with the head that it came with."""
    config, source = run.resolve(config)
    dataset = data.load(config.data, config.seed)
    built = build(config, dataset, source)
    out = evaluate.outputs(built.program, built.trainable, built.frozen, dataset, "test", config)
    groups = [dataset.groups[i] for i in out.indices]
    return metrics.intervals(out.probabilities, out.labels, groups, dataset.multilabel, metrics.RESAMPLES)


def row(title: str, found: dict[str, Any], summary: dict[str, Any] | None = None) -> list[str]:
    """Cells of the table."""
    cells = [
        f"{found[m]['value']:.3f} ({found[m]['low']:.3f} to {found[m]['high']:.3f})" for m in ("accuracy", "auroc")
    ]
    if summary is None:
        return [title, *cells, "-", "-", "-"]
    speed = summary["timing"]["train_images_per_second"]
    parameters = summary["parameters"]
    share = f"{parameters['trainable']:,} ({parameters['trainable_percent']:.1f} %)"
    return [title, *cells, share, f"{summary['bytes']['trainable'] / 1e3:,.0f} kB", f"{speed:.0f}" if speed else "-"]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(__doc__, "python scripts/demo.py --config.seed=1 --workdir runs/demo_1")
    arguments.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    options, overrides = cli.parse_with_overrides(arguments, argv, "--config.seed=1")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"Generated ultrasound images come to {data.cache_folder()}; to make them takes some seconds, once.")
    table = Table("model", "test accuracy (95 % CI)", "test AUROC (95 % CI)", "trained", "its bytes", "images/s")
    table.add_row(*row("before", before(configs.load(str(CONFIGS / "probe.py"), overrides))))
    for name, title in (("probe", "head only"), ("lora", "LoRA and head")):
        config = configs.load(str(CONFIGS / f"{name}.py"), overrides)
        summary = train(config, options.workdir / name)
        table.add_row(*row(title, summary["metrics"]["test"], summary))
    console.print(table)
    console.print(NEXT.format(workdir=options.workdir), markup=False, highlight=False)


if __name__ == "__main__":
    cli.main(main)
