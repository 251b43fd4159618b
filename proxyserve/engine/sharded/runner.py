"""Rank 0's part of a base: every forward of it is one message to the followers, and then the same forward here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from proxyserve.engine.attention import Plan
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.packed_row import PackedRow
from proxyserve.engine.runner import Runner
from proxyserve.engine.sharded.messages import row_to_json
from proxyserve.engine.sharded.ranks import Ranks
from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel


class ShardedRunner(Runner):
    """`Runner` for a base that `ranks` have together. What fails here in a forward has left the ranks out of step: it
    raises RankLost, after which nothing can be run. `messages` counts those sent."""

    def __init__(self, model: LoadedModel, ranks: Ranks) -> None:
        self.ranks = ranks
        self.messages = 0
        with self._together("prepare"):
            super().__init__(model)

    @contextmanager
    def _together(self, name: str, *arguments: object) -> Iterator[None]:
        self.messages += 1
        self.ranks.send(name, *arguments)
        try:
            yield
        except LoadError:
            raise
        except Exception as error:
            raise self.ranks.failed(error) from error

    def attach(self, storage: KVStorage) -> None:
        """Followers make blocks of their own, with the same numbers."""
        with self._together("attach", storage.num_blocks, storage.block_size):
            super().attach(storage)

    def detach(self) -> None:
        with self._together("detach"):
            super().detach()

    def clear(self, blocks: Sequence[int], start: int = 0) -> None:
        with self._together("clear", list(blocks), start):
            super().clear(blocks, start)

    def rehearse(self, tokens: int) -> None:
        with self._together("rehearse", tokens):
            super().rehearse(tokens)

    def compute(self, row: PackedRow, plan: Plan) -> Tensor:
        with self._together("compute", row_to_json(row, plan.storage.block_size)):
            return super().compute(row, plan)
