"""What a process does about memory on a CPU, where XLA takes its temporary buffer from malloc at every step.

By default glibc maps that buffer and unmaps it again each time, and every step pays for the page faults. So freed memory stays
with the process (`start`), on huge pages, which fault 512 times less often. Kept memory fragments, though: where something
small has settled in the hole that the buffer left, the buffer takes new memory. `release` gives the holes back; call it where
the program changes from one step function to another. Between such points a process still grows to several times the buffer.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
_MADV_HUGEPAGE, _HUGE_PAGE, _PAGE = 14, 2**21, 2**12


def start() -> None:
    """Makes glibc keep freed memory; call it once, before JAX allocates. Does nothing on other systems."""
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never: the buffer may be larger than the 2 GiB that an int could say
    libc.mallopt(_M_ARENA_MAX, 1)  # other arenas cannot hold large blocks and would map them after all
    # Address space for the heap to grow into, marked for huge pages while it is one piece; no memory is used until touched.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if block := libc.malloc(size):  # NULL where address space is limited
        first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, (block + size - first) // _PAGE * _PAGE, _MADV_HUGEPAGE)
        libc.free(block)


def release() -> None:
    """Gives freed memory back to the system; costs the page faults of one step."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc
