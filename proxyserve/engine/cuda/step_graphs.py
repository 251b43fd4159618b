"""Steps of decoding and verifying, recorded once and replayed: the host launches one graph instead of every kernel of
every layer of every model.

A recording is of one model, or of several side by side, and of so many tokens; a step takes the smallest that its
tokens fit into. What a step is about (ids, positions, where KV lies) is copied into tensors that never move, and the
logits come out of one. Whatever does not fit runs as it always does: prompts, adapters, differences of hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock
from time import perf_counter
from types import MappingProxyType

import torch
from torch import Tensor

from proxyserve.engine.attention import Span
from proxyserve.engine.cuda.graph_device import GraphDevice, Work
from proxyserve.engine.cuda.singles import Reserved
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey

logger = logging.getLogger(__name__)

#: Steps of more tokens are bound by arithmetic, not by launches, and gain little.
MOST_TOKENS = 256

#: Recordings of several models are replayed one at a time, and share their memory.
_TOGETHER = "together"

#: A model, and the tokens that its part of a recording has room for.
Part = tuple[ModelKey, int]


def sizes_for(most: int) -> tuple[int, ...]:
    """Powers of two until `most` tokens fit, or `MOST_TOKENS`."""
    return tuple(1 << power for power in range((min(most, MOST_TOKENS) - 1).bit_length() + 1))


@dataclass(frozen=True, slots=True)
class _Model:
    """What recordings of one model share. `logits` [most tokens, width]: the first rows are those of a step."""

    runner: Runner
    logits: Tensor
    reserved: dict[int, Reserved] = field(default_factory=dict)

    def part(self, tokens: int) -> Work:
        plan = self.reserved[tokens]

        def run() -> None:
            self.logits[:tokens].copy_(self.runner.run_reserved(plan))

        return run


class StepGraphs:
    """The recordings. One thread runs steps; another may record models meanwhile that no step runs yet. `recorded` and
    `replayed` count."""

    def __init__(self, device: GraphDevice, sizes: Sequence[int]) -> None:
        if not sizes or any(low >= high for low, high in pairwise(sizes)):
            raise ValueError("sizes must be ascending numbers of tokens")
        self.sizes = tuple(sizes)
        self.recorded = 0
        self.replayed = 0
        self._device = device
        self._models: Mapping[ModelKey, _Model] = MappingProxyType({})
        self._graphs: Mapping[frozenset[Part], Work] = MappingProxyType({})
        self._recording = Lock()
        self._changing = Lock()

    def __len__(self) -> int:
        """Recordings that are there now."""
        return len(self._graphs)

    @torch.inference_mode()
    def record(self, runner: Runner, storage: KVStorage) -> bool:
        """Record a model that no step runs yet, in every size. False if it cannot be: its steps run without, and the
        log says why."""
        key, context = runner.model.key, runner.model.context_length
        with self._recording:
            logits: Tensor | None = None
            graphs: dict[frozenset[Part], Work] = {}
            reserved: dict[int, Reserved] = {}
            for tokens in reversed(self.sizes):  # the largest first: the others fit into its memory
                try:
                    plan = reserved[tokens] = runner.attention.reserve(tokens, storage, context)
                    plan.fill([], [], self._device.upload)
                    if logits is None:
                        logits = torch.empty_like(runner.run_reserved(plan))
                    part = _Model(runner, logits, reserved).part(tokens)
                    self._device.warm(part)
                    graphs[frozenset({(key, tokens)})] = self._device.record([part], key)
                except (
                    Exception
                ) as error:  # of kernels, their compilers, and models that look at their tensors
                    logger.warning("%s runs without recorded steps: %s", key, error)
                    return False
            assert logits is not None
            with self._changing:
                self._models = MappingProxyType({**self._models, key: _Model(runner, logits, reserved)})
                self._add(graphs)
                runner.graphs = self
        return True

    @torch.inference_mode()
    def record_together(self, trunks: Sequence[ModelKey]) -> None:
        """Record steps in which these models, which are recorded already, run side by side, each on as many tokens; the
        first goes before the others. Nothing happens if one of them is not."""
        trunks = tuple(dict.fromkeys(trunks))
        with self._recording:
            models = [self._models[trunk] for trunk in trunks if trunk in self._models]
            if len(models) < max(2, len(trunks)):
                return
            graphs = {}
            for tokens in reversed(self.sizes):
                parts = [model.part(tokens) for model in models]
                name = frozenset((trunk, tokens) for trunk in trunks)
                if name not in self._graphs:
                    # Nothing is run, so that steps may run these models meanwhile.
                    graphs[name] = self._device.record(parts, _TOGETHER)
            with self._changing:
                if all(trunk in self._models for trunk in trunks):  # none of them has left meanwhile
                    self._add(graphs)

    def _add(self, graphs: Mapping[frozenset[Part], Work]) -> None:
        self.recorded += len(graphs)
        self._graphs = MappingProxyType({**self._graphs, **graphs})

    def drop(self, trunk: ModelKey) -> None:
        """Forget all recordings with this model. Nothing happens if there are none."""
        with self._changing:  # which takes no time, whatever is being recorded
            if trunk in self._models:
                self._models[trunk].runner.graphs = None
            self._models = MappingProxyType({key: m for key, m in self._models.items() if key != trunk})
            self._graphs = MappingProxyType(
                {name: graph for name, graph in self._graphs.items() if all(key != trunk for key, _ in name)}
            )

    def run(
        self, work: Mapping[ModelKey, Sequence[LaneWork]], differences: Mapping[ModelKey, Sequence[object]]
    ) -> dict[ModelKey, Tensor]:
        """The logits of those models of a step whose work is recorded: what `Runner.run` would return."""
        started = perf_counter()
        parts: dict[ModelKey, int] = {}
        for trunk, items in work.items():
            tokens = None if differences.get(trunk) else self._size(trunk, items)
            if tokens is not None:
                parts[trunk] = tokens
        for trunk, tokens in parts.items():
            self._fill(self._models[trunk].reserved[tokens], work[trunk])
        self._replay(list(parts.items()))
        logits = {}
        for trunk in parts:
            count = sum(item.rows for item in work[trunk])
            logits[trunk] = self._models[trunk].logits[:count].clone()
        for trunk, rows in logits.items():
            stats = self._models[trunk].runner.stats
            for item in work[trunk]:
                stats.tokens[item.lane.model.name] += item.count
            stats.ran(len(rows), (perf_counter() - started) / len(logits))
        return logits

    def _size(self, trunk: ModelKey, items: Sequence[LaneWork]) -> int | None:
        """Of the recording that this work fits into. None if there is none, or if not all rows are wanted."""
        model = self._models.get(trunk)
        if model is None:
            return None
        adapters = model.runner.adapters
        if any(item.rows != item.count or item.lane.model in adapters for item in items):
            return None
        count = sum(item.count for item in items)
        tokens = next((size for size in self.sizes if size >= count), None)
        return None if tokens is None or not model.reserved[tokens].fits(_spans(items)) else tokens

    def _fill(self, plan: Reserved, items: Sequence[LaneWork]) -> None:
        ids = [token for item in items for token in item.lane.tokens(item.start, item.start + item.count)]
        plan.fill(ids, _spans(items), self._device.upload)

    def _replay(self, parts: Sequence[Part]) -> None:
        if not parts:
            return
        graphs = self._graphs
        whole = graphs.get(frozenset(parts))
        replays = [graphs[frozenset({part})] for part in parts] if whole is None else [whole]
        self.replayed += len(replays)
        self._device.together(replays)


def _spans(items: Sequence[LaneWork]) -> list[Span]:
    return [Span(item.lane.blocks, item.start, item.count) for item in items]
