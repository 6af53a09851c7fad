"""How this process asks the system for memory."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt`, of its malloc.h."""


def keep_memory() -> None:
    """Let freed memory serve the next tensor instead of going back to the system, where glibc is.

    By default glibc maps every large block anew, and the kernel clears each of its pages. That was a fifth
    of the processor seconds of decoding a photograph. The process keeps its peak of memory until it ends.

    Whoever has set one of glibc's own variables is left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for parameter, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
        mallopt(parameter, value)
