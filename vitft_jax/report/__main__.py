"""Makes the report of a run, or of several runs side by side.

Of one run: `report.html` and the model card in its folder, or the page alone where --output says. Of several: one page with
their results, their paired differences from the first (as vitft_jax.compare), and what they cost. Runs of other classes are
refused; runs of other test images are shown, but no differences, which would mean nothing. A page is one file that loads
nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

from vitft_jax import cli
from vitft_jax.errors import InputError
from vitft_jax.report import comparison, page


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = cli.parser(
        __doc__, "python -m vitft_jax.report runs/lora\n  python -m vitft_jax.report runs/probe runs/lora"
    )
    arguments.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or one of its evaluations/"
    )
    arguments.add_argument(
        "--output", type=Path, help="page to write (default: RUN/report.html; of several comparison.html)"
    )
    arguments.add_argument(
        "--no_images", action="store_true", help="leave out images, names of files and paths, to pass it on"
    )
    flags = arguments.parse_args(argv)
    several = len(flags.runs) > 1
    output = flags.output or (Path("comparison.html") if several else flags.runs[0] / page.FILE)
    if output.suffix.lower() != ".html" or output.is_dir():
        raise InputError(f"--output {output}: pages are HTML files; give a name that ends in .html")
    if not several and not flags.runs[0].is_dir():
        raise InputError(f"{flags.runs[0]}: no run here")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.absolute().parent}")
    if several:
        comparison.write(flags.runs, output, images=not flags.no_images)
    else:
        page.write(flags.runs[0], output, images=not flags.no_images)
    print(output, flush=True)


if __name__ == "__main__":
    cli.main(main)
