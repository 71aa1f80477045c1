"""The C library's allocator, set for tensors: freed memory is kept instead of being returned to the kernel."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Stops glibc from mapping every large tensor anew, and says whether it could.

    By default each activation of a CPU training step is a fresh mapping whose pages the kernel zeroes one by one;
    half of the time went there (docs/LOG.md). Has no effect on memory of a GPU, and none off Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
