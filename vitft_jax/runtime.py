"""What a process does about memory on a CPU, where XLA takes its temporary buffer from malloc at every step.

By default glibc maps that buffer and unmaps it again each time, and every step pays for the page faults. So freed memory stays
with the process (`start`), on huge pages, which fault 512 times less often. Two things keep the buffer in one place then. Steps
run one at a time, since each one in flight would hold a buffer of its own. And whatever is smaller finds room elsewhere, in
a nursery: malloc takes the smallest free piece that is large enough, so nothing settles in the hole that the buffer leaves.
"""

import ctypes
import os
import sys

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
_MADV_HUGEPAGE, _HUGE_PAGE, _PAGE = 14, 2**21, 2**12
_NURSERY = 3 * 2**29  # bytes: what a run needs beside the buffer; memory is used only where it is touched
_GUARD = 2**16  # bytes between the nursery and the buffer, so that the two never join


def start() -> None:
    """Makes the process keep freed memory; call it once, before JAX allocates. Does nothing but on Linux with glibc."""
    libc = _glibc()
    if libc is None:
        return
    # Only where the CPU is the device does this change anything, and there a step in flight gains nothing.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never: the buffer may be larger than the 2 GiB that an int could say
    libc.mallopt(_M_ARENA_MAX, 1)  # other arenas cannot hold large blocks and would map them after all
    _reserve(libc)


def release() -> None:
    """Gives freed memory back to the system, as after a compilation; costs the page faults of one step."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
        _reserve(libc)  # trimming has given the room at the end of the heap back


def _reserve(libc: ctypes.CDLL) -> None:
    """Address space for the heap to grow into, marked for huge pages while it is one piece, and the nursery in it."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if block := libc.malloc(size):  # NULL where address space is limited
        first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, (block + size - first) // _PAGE * _PAGE, _MADV_HUGEPAGE)
        libc.free(block)
    if nursery := libc.malloc(_NURSERY):
        libc.malloc(_GUARD)  # never freed
        libc.free(nursery)


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
