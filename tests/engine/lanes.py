"""Lanes of one model without an engine: steps of decoding and verifying, run by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork

BLOCK = 4
BLOCKS = 36
#: Of three lanes, (lane, tokens) of each step that is recorded: decoding, verifying, a batch that shrinks.
STEPS = [[(0, 1), (1, 1), (2, 1)], [(0, 4), (1, 1), (2, 2)], [(2, 1)], [(1, 5), (2, 3)], [(0, 1), (1, 1)]]


class Lanes:
    """Three lanes of one model with their prompts run."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        storage = KVStorage(
            runner.shapes,
            num_blocks=BLOCKS,
            block_size=BLOCK,
            dtype=runner.model.dtype,
            device=runner.model.device,
            spare=True,
        )
        runner.attach(storage)
        self.storage = storage
        blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
        output: list[int] = []
        self.lanes: list[Lane] = []
        for number in range(3):
            lane = Lane(runner.model.key, tuple(5 + (number + 3) * k for k in range(40)), output)
            lane.blocks = blocks[12 * number : 12 * number + 12]
            self.lanes.append(lane)
        self.request = ScheduledRequest("r", tuple(self.lanes), output)
        self.runner.run(self.work([(0, 9), (1, 1), (2, 14)]))

    def work(self, step: Sequence[tuple[int, int]]) -> list[LaneWork]:
        work = []
        for number, count in step:
            lane = self.lanes[number]
            work.append(LaneWork(self.request, lane, lane.computed, count, rows=count))
            lane.computed += count
        return work


def plain_logits(runner: Runner) -> list[Tensor]:
    lanes = Lanes(runner)
    return [runner.run(lanes.work(step)) for step in STEPS]
