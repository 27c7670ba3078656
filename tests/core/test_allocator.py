"""Freed memory is kept: the same large array again costs (next to) no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from palimpsest.core.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("no glibc")
    raise SystemExit
def use():
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_same_array_again_costs_no_page_faults():
    def faults(how: str) -> str:
        return subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout

    kept = faults("keep").strip()
    if kept == "no glibc":
        pytest.skip("another libc than glibc")
    assert int(kept) < int(faults("plain")) / 10
