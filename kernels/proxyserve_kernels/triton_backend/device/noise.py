"""The same noise as `proxyserve_kernels.philox`, made on the device.

The logarithms are float64: a row draws fewer than 1300 numbers, and so both backends get the same float32 noise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(seed, position, stream, first, COUNT: tl.constexpr):
    """Uniforms in (0, 1), float64 [COUNT], of indices first, first + 1, ...; `first` and COUNT are multiples of 4."""
    index = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = tl.philox(seed, index, position, stream, 0)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape([COUNT])
    return (words.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(seed, position, stream, first, COUNT: tl.constexpr):
    """Standard Gumbel noise float32 [COUNT], as `uniform`."""
    return (-tl.log(-tl.log(uniform(seed, position, stream, first, COUNT)))).to(tl.float32)
