"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).

A draw is a pure function of (seed, position, stream, index): it does not depend on the batch, the row or what else was
drawn, and any implementation on any device gives the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10

#: Streams keep the draws of one position independent of each other: the two levels of a token's draw, the coin that
#: accepts a drafted token, and the two levels of the draw from a residual.
STREAM_BLOCK, STREAM_TOKEN, STREAM_ACCEPT, STREAM_RESIDUAL_BLOCK, STREAM_RESIDUAL_TOKEN = range(5)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter. All tensors are int64 holding values below 2**32 and broadcast together."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    # Both halves of a round at once: what is multiplied, and what is not. Small tensors cost their operations.
    even, odd = torch.stack([c0, c2]), torch.stack([c1, c3])
    keys = torch.stack(torch.broadcast_tensors(*key, c0)[:2])
    shape = (2, *[1] * c0.dim())
    multipliers = torch.tensor([_MULTIPLIER_0, _MULTIPLIER_1], device=c0.device).view(shape)
    weyl = torch.tensor([_WEYL_0, _WEYL_1], device=c0.device).view(shape)
    for _ in range(_ROUNDS):
        # The 64-bit products wrap around in int64, which leaves both 32-bit halves right.
        product = (even * multipliers).flip(0)
        even = ((product >> 32) & _LOW).bitwise_xor_(odd).bitwise_xor_(keys)
        odd = product.bitwise_and_(_LOW)
        keys = (keys + weyl).bitwise_and_(_LOW)
    return even[0], odd[0], even[1], odd[1]


def uniform(seeds: Tensor, positions: Tensor, stream: int, first: Tensor, count: int) -> Tensor:
    """Uniforms in (0, 1), float64 [n, count]: entry (r, j) belongs to index `first[r] + j`.

    `seeds` int64 [n] (64 bits, any sign), `positions` int64 [n] below 2**32, `first` int64 [n], a multiple of 4.
    Index i uses word i % 4 of the counter (i // 4, position, stream, 0) under the seed as key; the value is
    (word + 0.5) / 2**32, never 0 or 1.
    """
    groups = -(-count // 4)
    index = (first // 4)[:, None] + torch.arange(groups, device=seeds.device)
    position = positions[:, None].expand_as(index)
    words = philox4x32(
        (index, position, torch.full_like(index, stream), torch.zeros_like(index)),
        ((seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None]),
    )
    integers = torch.stack(words, dim=-1).flatten(1)[:, :count]
    return (integers.double() + 0.5) * 2.0**-32


def gumbel(seeds: Tensor, positions: Tensor, stream: int, first: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise, float32 [n, count], from `uniform` of the same arguments; between -3.2 and 22.9."""
    return -torch.log(-torch.log(uniform(seeds, positions, stream, first, count))).float()
