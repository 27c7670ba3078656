"""Keep memory that was freed, in processes that are ours.

glibc hands large blocks back to the kernel when they are freed and gets them again page by page: a training step that
frees and asks for the same arrays each time spends 2 to 3% of its time on that.  The price is that a process keeps its
peak until it ends, which is why the library never does this to somebody else's process: the command line does.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; False where there is no glibc (macOS, Windows, musl)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 2**26)])
