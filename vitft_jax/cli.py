"""Command lines: flags, config overrides, and errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from vitft_jax import config as configs
from vitft_jax.errors import InputError, nearest


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_with_config(
    arguments: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, configs.Config]:
    """Parses flags and a config: ``--config FILE`` and any number of ``--config.KEY=VALUE``.

    Raises:
        InputError: A flag or key is unknown, or the file or a value is at fault.
    """
    arguments.add_argument("--config", required=True, metavar="FILE", help="a Python config, such as configs/lora.py")
    flags, changes = parse_with_overrides(arguments, argv, "--config.lora.rank=16")
    return flags, configs.load(flags.config, changes)


def parse_with_overrides(
    arguments: argparse.ArgumentParser, argv: Sequence[str] | None, example: str
) -> tuple[argparse.Namespace, list[str]]:
    """Parses flags and any number of ``--config.KEY=VALUE``, which come back as ``KEY=VALUE``.

    Raises:
        InputError: A flag is unknown.
    """
    arguments.add_argument_group("config keys").add_argument(
        "--config.KEY=VALUE", dest="_", metavar="", help=f"change a key, such as {example}"
    )
    flags, rest = arguments.parse_known_args(argv)
    known = [option for action in arguments._actions for option in action.option_strings]
    for flag in rest:
        if not flag.startswith("--config."):
            raise InputError(f"unknown flag {flag!r}; {nearest(flag.split('=')[0], known)}")
    return flags, [flag.removeprefix("--config.") for flag in rest]


def main(command: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on standard error and exit code 2."""
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
