"""Count what Triton compiles, to see that nothing is compiled in the middle of serving."""

from __future__ import annotations

from triton.runtime.jit import JITFunction

from proxyserve_kernels.triton_backend.device import pick, residual, select, stats, tilt


def compiled_variants() -> int:
    """Compiled variants of all kernels of this package, over all devices. In the interpreter nothing is compiled: 0."""
    total = 0
    for module in (pick, residual, select, stats, tilt):
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                total += sum(len(cache[0]) for cache in value.device_caches.values())
    return total
