"""Count what Triton compiles, to see that nothing is compiled in the middle of serving."""

from __future__ import annotations

from triton.runtime.jit import JITFunction

from proxyserve_kernels.triton_backend.device import pick, residual, select, stats, tilt


def compiled_variants() -> int:
    """Compiled variants of all kernels of this package, over all devices. In the interpreter nothing is compiled: 0."""
    modules = (pick, residual, select, stats, tilt)
    kernels = {id(value): value for module in modules for value in vars(module).values()}
    return sum(
        len(cache[0])
        for kernel in kernels.values()
        if isinstance(kernel, JITFunction)
        for cache in kernel.device_caches.values()
    )
