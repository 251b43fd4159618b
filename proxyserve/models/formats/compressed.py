"""Compressed diffs (ComPEFT, arXiv 2311.13171): the largest entries of a diff vector, by their signs and one scale.

The paper names no file format; ours is a safetensors file. Its header has the settings, and under the name of each
weight of which something is kept lies one tensor of bytes, three sections after each other:

1. quotients: for each kept entry, in the order of memory, `gap >> r` zero bits and a one bit;
2. remainders: for each kept entry, the low `r` bits of `gap`, the lowest first;
3. signs: for each kept entry, one bit, set if it is negative.

`gap` is the number of entries that are left out between a kept one and the one before. Bits fill bytes from the lowest
up, and each section ends with zero bits up to a whole byte. This is a Golomb-Rice code of the gaps whose two parts are
kept apart, so that both are read without a loop; with `r` 0 the first section is a plain bitmap. `r` is chosen
for each weight so that its bytes are fewest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxyserve.errors import LoadError
from proxyserve.models.formats.diff import FILE as DIFF_FILE
from proxyserve.models.formats.diff import (
    Change,
    difference,
    keep_companions,
    target_file,
    tracked,
    write_diff,
)
from proxyserve.models.formats.tensors import FolderTensors, Shape, write_tensors

FILE = "compressed.safetensors"
FORMAT = "proxyserve-compressed"
VERSION = "1"

#: Gaps of 2^30 and more would need tensors that nothing here can hold.
_MOST_REMAINDER_BITS = 30
_PIECE = 1 << 22

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """Sizes in bytes: of the file, of the tuned weights as they are stored, and of their plain diff in float32. `kept`
    of `total` entries are left, each as plus or minus `scale`."""

    bytes: int
    original_bytes: int
    diff_bytes: int
    kept: int
    total: int
    scale: float


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight's entries. `data` uint8 [bytes] as described above, `remainder_bits` its `r`."""

    shape: Shape
    kept: int
    remainder_bits: int
    data: Bytes


def compress(
    tuned: Path,
    untuned: Path,
    target: Path,
    *,
    density: float,
    progress: Callable[[float], None] = lambda share: None,
) -> CompressionReport:
    """Keep the share `density` of the entries of tuned minus untuned that are largest in absolute value, over all
    weights together; of equal ones the first. The scale is their mean absolute value. As many entries with one scale
    cannot have a smaller squared error, and a weight that tuning hardly moved is left alone. `target` is a file if it
    ends in .safetensors, else a folder, which gets the tuned model's tokenizer too where that is another one. One
    weight at a time is in memory. `progress` is told which share is done. Raises LoadError."""
    if not 0.0 < density <= 1.0:
        raise LoadError(f"density {density:g} must be above 0 and at most 1")
    file = target_file(target, FILE)
    with FolderTensors(tuned) as ours, FolderTensors(untuned) as theirs:
        change = difference(ours, theirs)
        total = sum(math.prod(shape) for shape in change.shapes.values())
        threshold, ties = _threshold(change, max(1, round(density * total)), progress)
        packed: dict[str, Packed] = {}
        absolute_sum = 0.0
        for name, delta in tracked(change, lambda share: progress((2.0 + share) / 3.0)):
            size = delta.abs().view(torch.int32)
            mask = size > threshold
            if ties and threshold > 0:
                # All of one absolute value: the first ones are as good as any.
                equal = (size.flatten() == threshold).nonzero()[:ties]
                mask.view(-1)[equal] = True
                ties -= len(equal)
            absolute_sum += float(delta[mask].abs().sum(dtype=torch.float64))
            if bool(mask.any()):
                packed[name] = pack(delta, mask)
        if not packed:
            raise LoadError(f"{tuned}: its weights are those of {untuned}; there is nothing to compress")
        kept = sum(entry.kept for entry in packed.values())
        scale = absolute_sum / kept
        size_in_bytes = _write(file, packed, density=density, scale=scale, kept=kept, total=total)
        report = CompressionReport(size_in_bytes, ours.bytes, 4 * total, kept, total, scale)
    keep_companions(tuned, untuned, target)
    return report


def read_compressed(path: Path) -> Change:
    """A file, or `compressed.safetensors` in a folder. Raises LoadError, also later for what is wrong with a tensor."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise LoadError(f"{file}: no such file")
    tensors = FolderTensors(file)
    metadata = tensors.metadata
    if metadata.get("format") != FORMAT:
        raise LoadError(f"{file}: no compressed diff; make one with `proxyserve compress`")
    if metadata.get("version") != VERSION:
        raise LoadError(
            f"{file}: a compressed diff of version {metadata.get('version')}, and this program reads {VERSION}; make "
            "it again"
        )
    try:
        scale, entries = _read_header(metadata, {name: tensors.shape(name) for name in tensors.names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"its header cannot be used ({error})") from error

    def read(name: str) -> Tensor:
        shape, kept, remainder_bits = entries[name]
        if tensors.dtype(name) != torch.uint8:
            raise _damaged(file, f"{name} is stored as {tensors.dtype(name)}")
        try:
            return unpack(Packed(shape, kept, remainder_bits, tensors.get(name).numpy()), scale)
        except ValueError as error:
            raise _damaged(file, f"{name}: {error}") from error

    return Change(file, {name: shape for name, (shape, _, _) in entries.items()}, read)


def decompress(path: Path, target: Path) -> int:
    """Write a compressed diff as a plain one and return its size in bytes. Raises LoadError."""
    return write_diff(read_compressed(path), target_file(target, DIFF_FILE))


def pack(delta: Tensor, mask: Tensor) -> Packed:
    """The entries of `delta` (float32) where `mask` (bool, as large) is true, of which there is at least one."""
    positions = mask.flatten().nonzero().flatten().numpy()
    gaps = np.diff(positions, prepend=-1) - 1
    kept = len(gaps)
    r, size = 0, kept + int(gaps.sum())
    while r < _MOST_REMAINDER_BITS:
        next_size = kept * (r + 2) + int((gaps >> (r + 1)).sum())
        if next_size >= size:
            break
        r, size = r + 1, next_size
    quotients = np.zeros(size - kept * r, dtype=np.uint8)
    quotients[np.cumsum((gaps >> r) + 1) - 1] = 1
    remainders = np.empty((kept, r), dtype=np.uint8)
    for bit in range(r):
        remainders[:, bit] = (gaps >> bit) & 1
    signs = (delta.flatten()[torch.from_numpy(positions)] < 0).numpy()
    sections = (np.packbits(bits, bitorder="little") for bits in (quotients, remainders, signs))
    return Packed(tuple(delta.shape), kept, r, np.concatenate(list(sections)))


def unpack(packed: Packed, scale: float) -> Tensor:
    """float32: plus or minus `scale` where an entry is kept, else 0. Raises ValueError for bytes that `pack` cannot
    have made."""
    kept, r, data = packed.kept, packed.remainder_bits, packed.data
    numel = math.prod(packed.shape)
    tail = (kept * r + 7) // 8 + (kept + 7) // 8
    if data.ndim != 1 or len(data) <= tail:
        raise ValueError(f"{data.size} bytes are too few for {kept} entries")
    head, rest = data[: len(data) - tail], data[len(data) - tail :]
    ones = np.flatnonzero(np.unpackbits(head, bitorder="little"))
    if len(ones) != kept or ones[-1] // 8 + 1 != len(head):
        raise ValueError(f"it should hold {kept} entries and holds {len(ones)}")
    low = _bits(rest[: (kept * r + 7) // 8], kept * r).reshape(kept, r)
    signs = _bits(rest[(kept * r + 7) // 8 :], kept)
    remainders = np.zeros(kept, dtype=np.int64)
    for bit in range(r):
        remainders |= low[:, bit].astype(np.int64) << bit
    # Whole numbers of any size, before anything is added up that could overflow.
    if ((int(ones[-1]) + 1 - kept) << r) + int(remainders.sum()) + kept > numel:
        raise ValueError(f"it has entries beyond its {numel}")
    quotients = np.diff(ones, prepend=-1) - 1
    positions = np.cumsum((quotients << r) + remainders + 1) - 1
    delta = torch.zeros(numel, dtype=torch.float32)
    values = np.where(signs, -scale, scale).astype(np.float32)
    delta[torch.from_numpy(positions)] = torch.from_numpy(values)
    return delta.reshape(packed.shape)


def _bits(section: Bytes, count: int) -> Bytes:
    """The first `count` bits. Raises ValueError if one of the others is set."""
    bits = np.unpackbits(section, bitorder="little")
    if bits[count:].any():
        raise ValueError("there are bits after the last entry")
    return bits[:count]


def _threshold(change: Change, wanted: int, progress: Callable[[float], None]) -> tuple[int, int]:
    """(bits of the `wanted`-largest absolute value as an int32, how many entries of just that value are among the
    `wanted` largest). The bits of floating-point numbers from 0 up are in the order of the numbers, so two passes
    find it exactly: one that counts by the upper half of the bits, one by the lower half."""
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for _, delta in tracked(change, lambda share: progress(share / 3.0)):
        for piece in torch.split(delta.abs().flatten().view(torch.int32), _PIECE):
            upper += torch.bincount(piece >> 16, minlength=1 << 15)
    high, wanted = _place_from_top(upper, wanted)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for _, delta in tracked(change, lambda share: progress((1.0 + share) / 3.0)):
        for piece in torch.split(delta.abs().flatten().view(torch.int32), _PIECE):
            lower += torch.bincount(piece[piece >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, wanted = _place_from_top(lower, wanted)
    return high << 16 | low, wanted


def _place_from_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Where the `wanted`-largest lies, and how many of those that lie there are among the `wanted` largest."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before


def _write(
    file: Path, packed: Mapping[str, Packed], *, density: float, scale: float, kept: int, total: int
) -> int:
    tensors = {
        name: {"shape": list(entry.shape), "kept": entry.kept, "remainder_bits": entry.remainder_bits}
        for name, entry in packed.items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "density": repr(density),
        "scale": repr(scale),
        "kept": str(kept),
        "total": str(total),
        "tensors": json.dumps(tensors, separators=(",", ":")),
    }
    layout = {name: (torch.uint8, (len(entry.data),)) for name, entry in packed.items()}
    data = ((name, torch.from_numpy(entry.data)) for name, entry in packed.items())
    return write_tensors(file, layout, data, metadata)


def _read_header(
    metadata: Mapping[str, str], stored: Mapping[str, Shape]
) -> tuple[float, dict[str, tuple[Shape, int, int]]]:
    """(scale, by weight: shape, number of kept entries, remainder bits). Raises ValueError, KeyError, TypeError or
    AttributeError."""
    scale, density = float(metadata["scale"]), float(metadata["density"])
    if not (0.0 < scale < math.inf and 0.0 < density <= 1.0):
        raise ValueError(f"scale {scale}, density {density}")
    entries: dict[str, tuple[Shape, int, int]] = {}
    for name, entry in json.loads(metadata["tensors"]).items():
        shape = tuple(_whole(size, 0) for size in entry["shape"])
        kept = _whole(entry["kept"], 1)
        if kept > math.prod(shape):
            raise ValueError(f"{name} keeps {kept} of {math.prod(shape)} entries")
        entries[name] = (shape, kept, _whole(entry["remainder_bits"], 0, _MOST_REMAINDER_BITS))
    if entries.keys() != stored.keys() or not entries:
        raise ValueError(f"it describes {len(entries)} weights, and the file has {len(stored)}")
    kept, total = sum(kept for _, kept, _ in entries.values()), int(metadata["total"])
    if kept != int(metadata["kept"]) or total < sum(math.prod(shape) for shape, _, _ in entries.values()):
        raise ValueError(f"{metadata['kept']} of {total} entries should be kept, and {kept} are")
    return scale, entries


def _whole(value: Any, least: int, most: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def _damaged(file: Path, what: str) -> LoadError:
    return LoadError(f"{file}: {what}; copy it again or make it again")
