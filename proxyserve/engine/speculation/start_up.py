"""What forwards cost before there is any request."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter, thread_time

import torch

from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner, probe_ids
from proxyserve.engine.speculation.costs import start_up_sizes
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork

#: The largest forward that is tried; what more tokens cost follows from it.
_MOST_TOKENS = 32
#: Rounds, of which the faster one counts: a forward may be held up, but nothing makes it faster.
_ROUNDS = 2


@torch.inference_mode()
def measure_forwards(runner: Runner, most: int) -> dict[int, float]:
    """Seconds of forwards of up to about `most` tokens, and not many more than 32. For a model that no step runs yet,
    and that has no storage."""
    sizes = start_up_sizes(min(most, _MOST_TOKENS))
    model = runner.model
    runner.attach(
        KVStorage(runner.shapes, num_blocks=max(sizes), block_size=1, dtype=model.dtype, device=model.device)
    )
    output: list[int] = []
    first = probe_ids(model)[:1]
    lanes = [Lane(model.key, first, output, blocks=[block]) for block in range(max(sizes))]
    try:
        _seconds(runner, lanes)  # memory, kernels and layouts that are made at their first use
        rounds = [{size: _seconds(runner, lanes[:size]) for size in sizes} for _ in range(_ROUNDS)]
    finally:
        runner.detach()
    return {size: min(found[size] for found in rounds) for size in sizes}


def _seconds(runner: Runner, lanes: Sequence[Lane]) -> float:
    """A forward with the only token of each lane."""
    request = ScheduledRequest("measure", tuple(lanes), lanes[0].output)
    work = [LaneWork(request, lane, 0, 1, rows=1) for lane in lanes]
    if runner.model.device.type != "cuda":
        started = thread_time()  # other programs do not count
        runner.run(work)
        return thread_time() - started
    torch.cuda.synchronize(runner.model.device)
    started = perf_counter()
    runner.run(work)
    torch.cuda.synchronize(runner.model.device)
    return perf_counter() - started
