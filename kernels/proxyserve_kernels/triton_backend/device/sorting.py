"""Sorting on the device, by itself so that tests in the interpreter, which takes a second for it, can replace it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_descending(keys):
    """int64 keys, a power of two of them, largest first."""
    return tl.sort(keys, descending=True)
