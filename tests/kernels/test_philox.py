"""Philox against the published test vectors, and the noise made of it."""

from __future__ import annotations

import torch

from proxyserve_kernels.philox import STREAM_BLOCK, STREAM_TOKEN, gumbel, philox4x32


def words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    result = philox4x32(
        tuple(torch.tensor([value]) for value in counter),  # type: ignore[arg-type]
        (torch.tensor([key[0]]), torch.tensor([key[1]])),
    )
    return [int(word) for word in result]


def test_known_answers() -> None:
    """Philox4x32-10 vectors of the authors' Random123 distribution."""
    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_noise_depends_on_its_index_only() -> None:
    seeds, positions = torch.tensor([-5, 99]), torch.tensor([3, 4])
    whole = gumbel(seeds, positions, STREAM_TOKEN, torch.tensor([0, 0]), 1024)
    part = gumbel(seeds, positions, STREAM_TOKEN, torch.tensor([512, 256]), 256)
    assert torch.equal(part[0], whole[0, 512:768]) and torch.equal(part[1], whole[1, 256:512])
    swapped = gumbel(seeds.flip(0), positions.flip(0), STREAM_TOKEN, torch.tensor([0, 0]), 1024)
    assert torch.equal(swapped.flip(0), whole)
    assert not torch.equal(gumbel(seeds, positions, STREAM_BLOCK, torch.tensor([0, 0]), 1024), whole)
    assert torch.isfinite(whole).all()


def test_all_64_bits_of_the_seed_count() -> None:
    low, high = torch.tensor([1]), torch.tensor([1 + 2**32])
    zero = torch.tensor([0])
    assert not torch.equal(gumbel(low, zero, 0, zero, 8), gumbel(high, zero, 0, zero, 8))
