"""Resolves all dependencies for each Python given and prints one constraints file with environment markers.

    python scripts/lock.py python3.12 python3.11 > constraints.txt

The first interpreter stands for itself and newer ones, the last for itself.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """Returns the version of an interpreter and what pip would install into it, without installing it."""
    version = subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        report = Path(folder) / "report.json"
        install = ["install", "--dry-run", "--ignore-installed", "--report", str(report), ".[dev,interop]"]
        subprocess.run([*pip, *install], check=True, stdout=sys.stderr)
        found = json.loads(report.read_text())["install"]
    packages = {item["metadata"]["name"]: item["metadata"]["version"] for item in found}
    # A local build ("+cpu") is installed by its public version.
    return version.strip(), {re.sub(r"[-_.]+", "-", n).lower(): v.split("+")[0] for n, v in packages.items()}


def main() -> None:
    """Merges the resolutions: a plain line where all agree, lines with markers where they differ."""
    resolved = [resolve(python) for python in sys.argv[1:]]
    print("# Written by scripts/lock.py (`make lock`); the versions that the tests run with.")
    for name in sorted({name for _, packages in resolved for name in packages} - {"vitft-jax"}):
        versions = [packages.get(name) for _, packages in resolved]
        if len(set(versions)) == 1:
            print(f"{name}=={versions[0]}")
            continue
        for i, (python, packages) in enumerate(resolved):
            if name in packages:
                relation = ">=" if i == 0 else "=="
                print(f'{name}=={packages[name]} ; python_version {relation} "{python}"')


if __name__ == "__main__":
    main()
