"""Exports a trained run: its best model in the files of other programs.

A format is one module in this package with a function ``write(source, folder, options) -> notes``: it writes its files into an
empty folder, and says where the exported model differs from the run, a sentence each. `FORMATS` lists them.
"""

import importlib
import os
import shutil
from pathlib import Path

from vitft_jax.errors import InputError, nearest
from vitft_jax.export import card
from vitft_jax.export.source import Options, open_run

FORMATS = {"peft": "peft", "hf": "hugging_face", "timm": "timm", "onnx": "onnx", "stablehlo": "stablehlo"}
"""Formats by name, to their modules."""


def export(workdir: Path, output: Path, format: str, options: Options | None = None) -> list[str]:
    """Writes the best model of a run into a new folder, whole or not at all; returns what its user must know.

    Raises:
        InputError: There is no trained run, the output is not empty, or the format cannot express the run.
    """
    options = options or Options()
    if format not in FORMATS:
        raise InputError(f"--format {format}: {nearest(format, FORMATS)}")
    if options.naming and format != "peft":
        raise InputError(f"--naming {options.naming}: is for --format peft; leave the flag away")
    if output.resolve() == Path.cwd():
        raise InputError(f"--output {output}: is the folder that you are in; give the name of a new one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: exists already and is not empty; choose another, or delete it")
    if file := next((path for path in output.absolute().parents if path.exists() and not path.is_dir()), None):
        raise InputError(f"--output {output}: {file} is no folder; choose another place")
    source = open_run(workdir, options.without)
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a command that was killed
    try:
        part.mkdir(parents=True)
        notes = importlib.import_module(f"{__name__}.{FORMATS[format]}").write(source, part, options)
        card.write(source, part, format, notes)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return notes
