"""Why a command ends without a result: the input is at fault, the machine is, or the system asked it to end."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user, with a message that says what is wrong, where, and what to do.

    Commands print the message alone (no traceback) and exit with code 2.
    """


class MachineError(RuntimeError):
    """What the machine did to a command, such as a full disk; the message says what, where, and what to do.

    Once that is mended, the same command goes on. Commands print the message alone and exit with code 74.
    """


class Preempted(BaseException):
    """The system asked the process to end (SIGTERM); the message says what was saved. Commands exit with code 75.

    Like KeyboardInterrupt it is no Exception, since it may be raised anywhere.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: the option that looks most like it, or all options."""
    options = sorted(map(str, options))
    if close := difflib.get_close_matches(name, options, n=1):
        return f"did you mean {close[0]!r}?"
    return f"choose one of {', '.join(options)}"
