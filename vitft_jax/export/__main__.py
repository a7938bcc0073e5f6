"""Exports the best model of a run for other programs.

peft       the adapter alone, for Hugging Face's PEFT: LoRA, DoRA, AdaLoRA, PiSSA (as LoRA of the original base)
hf         the whole model for transformers: AutoModelForImageClassification, pipeline("image-classification")
timm       the whole model for timm: create_model("local-dir:DIR")
onnx       the whole model for ONNX Runtime and others; int8 of runs that vitft_jax.quantize made, float32 else
stablehlo  the compiled program with its weights, for cpu, cuda and tpu; runs with jax and flatbuffers alone

Adapters are merged into the kernels, but for peft. The folder also holds vitft_jax.json (classes, preprocessing) and README.md.
"""

from collections.abc import Sequence
from pathlib import Path

from vitft_jax import cli, hf_names, runtime
from vitft_jax.export import FORMATS, export
from vitft_jax.export.source import LEAVABLE, Options


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    runtime.start()
    arguments = cli.parser(
        __doc__, "python -m vitft_jax.export --workdir runs/lora --format hf --output exported/lora_hf"
    )
    arguments.add_argument("--workdir", required=True, type=Path, help="the folder of a trained run")
    arguments.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    arguments.add_argument("--output", required=True, type=Path, help="the folder to make; new or empty")
    arguments.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="METHOD",
        help=f"leave out {' or '.join(LEAVABLE)}, which most formats cannot express; answers then differ from the run's",
    )
    arguments.add_argument(
        "--naming",
        default="",
        help=f"peft: module names of transformers 5 (hf5) or 4 (hf4) (default: {hf_names.SCHEMES[0]})",
    )
    flags = arguments.parse_args(argv)
    notes = export(flags.workdir, flags.output, flags.format, Options(tuple(flags.without), flags.naming))
    size = sum(file.stat().st_size for file in flags.output.rglob("*") if file.is_file())
    print(f"{flags.output}: {flags.format}, {size / 1e6:.1f} MB")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    cli.main(main)
