"""The same work on ever other logits: what a serving step finds is not in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from proxyserve_kernels import PickControls
from proxyserve_kernels.bench.inputs import fused_batch, lanes
from proxyserve_kernels.triton_backend.launch import Buffers, Wishes, launch_pick
from proxyserve_kernels.triton_backend.run import wishes_of
from proxyserve_kernels.triton_backend.table import RowTable, build_table
from proxyserve_kernels.triton_backend.tuning import Tile

#: Bytes that a rotation reads before it comes back to its first set: five times the largest L2 cache there is.
COLD = 300_000_000
FEWEST = 5


def sets_needed(batch: int, vocabulary: int, dtype: torch.dtype, sources: int, cold: float = COLD) -> int:
    """Batches of which a rotation consists."""
    return max(FEWEST, -(-int(cold) // input_bytes(batch, vocabulary, dtype, sources)))


def input_bytes(batch: int, vocabulary: int, dtype: torch.dtype, sources: int) -> int:
    """What one step must read: every logit once."""
    return batch * vocabulary * dtype.itemsize * sources


class Rotation:
    """`sets` batches of `batch` rows (a power of two) with `terms` pairs, as tables on the device."""

    def __init__(
        self,
        sources: list[torch.Tensor],
        batch: int,
        terms: int,
        sets: int,
        asked: Callable[[int], PickControls],
    ) -> None:
        rows = sets * batch
        self.sources = [source[:rows] for source in sources[: 1 + 2 * terms]]
        self.batch = batch
        controls = asked(rows)
        self.wishes: Wishes = wishes_of(controls)
        whole = build_table(fused_batch(self.sources), controls)
        # Copies, because each table of a server has an allocation of its own, which is aligned.
        self.tables: list[RowTable] = [
            replace(
                whole,
                ints=whole.ints[first : first + batch].clone(),
                floats=whole.floats[first : first + batch].clone(),
                rows=batch,
            )
            for first in range(0, rows, batch)
        ]
        table = self.tables[0]
        self.buffers = Buffers.allocate(table.bucket, table.blocks, self.wishes, whole.ints.device)

    @property
    def calls(self) -> int:
        return len(self.tables)

    def pick(self, tile: Tile | None = None) -> None:
        """One whole pick on every set."""
        for table in self.tables:
            launch_pick(table, self.buffers, self.wishes, tile)


class Pools:
    """Logits for rotations, kept for one (vocabulary, dtype, shape) at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[object, ...] = ()
        self._sources: list[torch.Tensor] = []

    def sources(
        self, rows: int, vocabulary: int, dtype: torch.dtype, count: int, shape: str
    ) -> list[torch.Tensor]:
        """At least `count` models' logits of at least `rows` rows."""
        key = (vocabulary, dtype, shape)
        if key != self._key or len(self._sources) < count or self._sources[0].shape[0] < rows:
            self._sources = []
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._sources = lanes(rows, vocabulary, dtype, self.device, count, shape=shape)
            self._key = key
        return self._sources
