"""Metrics of experts that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from proxyserve.api import families
from proxyserve.experts.generation import Phase

if TYPE_CHECKING:
    from proxyserve.experts.manager import ExpertManager


class ExpertCollector(Collector):
    """Reads the manager's numbers when Prometheus asks."""

    def __init__(self, experts: ExpertManager) -> None:
        self._experts = experts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._generations()
        counters = self._experts.counters
        # Those that count seldom begin at 0: Prometheus sees no increase in a series that begins at 1.
        yield families.EXPERT_PHASES.by({phase: counters.phases.get(phase, 0) for phase in Phase})
        yield families.EXPERT_PHASE_SECONDS.by({phase: counters.seconds.get(phase, 0.0) for phase in Phase})
        failures: dict[str, float] = {phase: 0 for phase in Phase if phase.is_loading}
        yield families.EXPERT_FAILURES.by(failures | counters.failures)
        yield families.EXPERT_ROLLBACKS.one(counters.rollbacks)
        yield families.EXPERT_EVICTIONS.one(counters.evictions)
        yield families.EXPERT_WAKES.one(counters.wakes)

    def _generations(self) -> Iterator[Metric]:
        live = {
            (expert.name, str(generation.generation)): generation
            for expert in self._experts.experts()
            for generation in expert.generations
            if not generation.phase.is_over
        }
        yield families.EXPERT_INFO.samples([((*names, found.phase), 1) for names, found in live.items()])
        yield families.EXPERT_RUNNING.samples([(names, found.requests) for names, found in live.items()])
        yield families.EXPERT_BYTES.samples([(names, found.bytes) for names, found in live.items()])
        yield families.EXPERT_PROGRESS.samples(
            [(names, found.progress) for names, found in live.items() if found.progress is not None]
        )
