"""Count what Triton compiles, to see that nothing is compiled in the middle of serving."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def compiled_variants(kernels: Iterable[Any]) -> int:
    """Compiled variants that `kernels` hold, over all devices. In the interpreter nothing is compiled: 0."""
    total = 0
    for kernel in kernels:
        for cache in getattr(kernel, "device_caches", {}).values():
            total += len(cache[0])
    return total
