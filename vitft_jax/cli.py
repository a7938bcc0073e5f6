"""Command lines: flags, config overrides, and errors as one message with an exit code."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

import jax

from vitft_jax import config as configs
from vitft_jax import preemption, processes
from vitft_jax.errors import InputError, MachineError, Preempted, nearest

EXIT_CODES = """exit codes:
    0  done
    1  a defect of the program, with a traceback; please report it
    2  the input is at fault: the message says what, where, and what to do
    3  predict: some images could not be read; the others are done
    4  check_data: there are problems in the data
   74  the machine is at fault, such as a full disk; once it is mended the same command goes on
   75  ended by SIGTERM, as before a preemption; the same command goes on
  130  ended by Ctrl-C; the same command goes on"""

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_OF_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTDIR)


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example and the exit codes."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
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
    """Runs a command. Whatever is not its own fault ends it with a message on standard error and one of `EXIT_CODES`."""
    try:
        with preemption.end_at_once():
            command()
        sys.stdout.flush()
    except InputError as error:
        _end(2, f"error: {error}")
    except MachineError as error:
        _say(f"error: {error}")
        sys.stdout.flush()
        os._exit(74)  # an orderly end would wait, for ever on a full disk, for what still tries to write
    except Preempted as end:
        _say(str(end))
        sys.exit(75)  # which all processes reach together
    except KeyboardInterrupt:
        _end(130, "interrupted; the same command goes on from the last checkpoint")
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno in _OF_A_NAME:
            _end(2, f"error: {error.filename}: {error.strerror}; give another path")
        if error.errno not in _OF_THE_DISK:
            raise
        _end(
            74, f"error: {error.filename or 'a file'}: {error.strerror}; once that is mended, the same command goes on"
        )
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            if not processes.together():
                raise
            _say(
                f"error: the processes lost each other ({str(error).splitlines()[0]}); if another one said why it ended, "
                "mend that, and start all of them again: they go on from the last checkpoint"
            )
            processes.leave(74, alone=False)
        first = (str(error) or "no more to be had").splitlines()[0]
        _end(
            74,
            f"error: out of memory: {first}. Smaller train.batch_size, more train.accumulate or smaller images need less",
        )


def _end(code: int, message: str) -> None:
    _say(message)
    processes.leave(code)
    sys.exit(code)


def _say(message: str) -> None:
    """Prints on standard error. Names from outside may hold control characters, which would command the terminal."""
    print("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message), file=sys.stderr, flush=True)
