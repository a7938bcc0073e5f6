"""Digests of the files of a folder, kept beside them, so that damage to one is seen: `sha256sum -c` reads them too."""

import hashlib
from pathlib import Path

from vitft_jax.report import write_text

FILE = "sha256sum.txt"


def write(folder: Path) -> None:
    """Writes the digests of all files in a folder."""
    write_text(folder / FILE, "".join(f"{sha256(folder / name)}  {name}\n" for name in _names(folder)))


def known(folder: Path) -> bool:
    """Whether there are digests of a folder."""
    return (folder / FILE).is_file()


def damage(folder: Path) -> str:
    """What is not as it was when `write` was called; '' if nothing, or if there are no digests to tell."""
    if not known(folder):
        return ""
    lines = (folder / FILE).read_bytes().decode(errors="replace").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = _names(folder)
    for name in digests:
        if name not in there:
            return f"{name} is missing"
    for name in there:
        if name not in digests:
            return f"{FILE} does not know {name}"
        if sha256(folder / name) != digests[name]:
            return f"{name} has changed"
    return ""


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != FILE)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
