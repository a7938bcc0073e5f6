"""What a process does before it computes."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def start() -> None:
    """Tells glibc to keep freed memory; call it before JAX allocates.

    XLA on a CPU takes its temporary buffer from malloc at every step. By default glibc maps and unmaps it each time, and the
    page faults cost about a third of a step. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never: a large batch needs more than the 2 GiB that an int could say
    mallopt(_M_ARENA_MAX, 1)
