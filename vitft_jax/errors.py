"""The one exception that means: the input is at fault, not the program."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user, with a message that says what is wrong, where, and what to do.

    Commands print the message alone (no traceback) and exit with code 2.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: the option that looks most like it, or all options."""
    options = sorted(map(str, options))
    if close := difflib.get_close_matches(name, options, n=1):
        return f"did you mean {close[0]!r}?"
    return f"choose one of {', '.join(options)}"
