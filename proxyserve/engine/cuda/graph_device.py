"""What can record work and replay it: a CUDA device. Tests have one that only pretends."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class GraphDevice(Protocol):
    """Records work on tensors that stay where they are. Work that is recorded must not look at what is in tensors."""

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor of the host to one of the device, in order with replays but without waiting for it."""

    def warm(self, work: Work) -> None:
        """Do work once as it is, so that nothing of it is compiled or allocated for the first time in a recording."""

    def record(self, work: Sequence[Work], pool: Hashable) -> Work:
        """What does all of `work` again, side by side, the first before the others where there is not room for all.
        Recordings with one `pool` share the memory that they need meanwhile: they must not be replayed at a time.
        Raises RuntimeError for work that cannot be recorded."""

    def together(self, replays: Sequence[Work]) -> None:
        """Start several recordings side by side; what comes after them on the device waits for all."""


def graph_device_for(device: torch.device) -> GraphDevice | None:
    """None for devices that cannot record."""
    return CudaGraphDevice(device) if device.type == "cuda" else None


class CudaGraphDevice:
    """`GraphDevice` by CUDA graphs. Recording may go on in one thread while others run and replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # What is recorded on a stream keeps the stream's priority: -1 goes before 0.
        self._first = torch.cuda.Stream(device, priority=-1)
        # A stream that one thread records on must not be replayed on by another meanwhile.
        self._recorded_sides: list[torch.cuda.Stream] = []
        self._replayed_sides: list[torch.cuda.Stream] = []
        self._pools: dict[Hashable, Any] = {}

    def upload(self, source: Tensor, target: Tensor) -> None:
        """See `GraphDevice`. Pinned memory goes back to its pool only after the copy."""
        target.copy_(source.pin_memory(), non_blocking=True)

    def warm(self, work: Work) -> None:
        """See `GraphDevice`."""
        self._first.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._first):
            work()
        self._first.synchronize()

    def record(self, work: Sequence[Work], pool: Hashable) -> Work:
        """See `GraphDevice`."""
        graph = torch.cuda.CUDAGraph()
        if pool not in self._pools:
            self._pools[pool] = torch.cuda.graph_pool_handle()
        self._first.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._first):
            # "thread_local": what other threads do with the device meanwhile is theirs.
            graph.capture_begin(pool=self._pools[pool], capture_error_mode="thread_local")
            try:
                self._side_by_side(work, self._recorded_sides)
            except BaseException:
                with suppress(RuntimeError):  # a broken capture cannot be ended, only left
                    graph.capture_end()
                raise
            graph.capture_end()
        replay: Work = graph.replay
        return replay

    def together(self, replays: Sequence[Work]) -> None:
        """See `GraphDevice`."""
        self._side_by_side(replays, self._replayed_sides)

    def _side_by_side(self, work: Sequence[Work], sides: list[torch.cuda.Stream]) -> None:
        """The first on the current stream, the others on `sides`, which begin and end with it; missing ones are
        made."""
        while len(sides) < len(work) - 1:
            sides.append(torch.cuda.Stream(self._device))
        current = torch.cuda.current_stream(self._device)
        used = sides[: len(work) - 1]
        for stream, other in zip(used, work[1:], strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                other()
        work[0]()
        for stream in used:
            current.wait_stream(stream)
