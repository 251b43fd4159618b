"""Metrics of experts that come and go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxyserve.api.families import counter_family

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
        yield _by_phase("phases", "Generations that have gone through a phase.", counters.phases)
        yield _by_phase("phase_seconds", "Time that generations spent in a phase.", counters.seconds)
        yield _by_phase("failures", "Loads that failed, by the phase that they failed in.", counters.failures)
        yield counter_family("expert_rollbacks", "Rollbacks.", counters.rollbacks)
        yield counter_family(
            "expert_evictions", "Generations taken out of memory to make room.", counters.evictions
        )
        yield counter_family("expert_wakes", "Parked experts that a request had loaded.", counters.wakes)

    def _generations(self) -> Iterator[Metric]:
        labels = ["expert", "generation"]
        info = GaugeMetricFamily(
            "proxyserve_expert_generation_info",
            "1 for each generation that is not over, with its phase.",
            labels=[*labels, "phase"],
        )
        running = GaugeMetricFamily(
            "proxyserve_expert_requests_running", "Choices in flight on a generation.", labels=labels
        )
        progress = GaugeMetricFamily(
            "proxyserve_expert_load_progress", "How much of a load is done, from 0 to 1.", labels=labels
        )
        size = GaugeMetricFamily(
            "proxyserve_expert_bytes", "Weights that were loaded for a generation.", labels=labels
        )
        for expert in self._experts.experts():
            for generation in expert.generations:
                if not generation.phase.is_over:
                    names = [expert.name, str(generation.generation)]
                    info.add_metric([*names, generation.phase], 1)
                    running.add_metric(names, generation.requests)
                    size.add_metric(names, generation.bytes)
                    if generation.progress is not None:
                        progress.add_metric(names, generation.progress)
        yield from (info, running, size, progress)


def _by_phase(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"proxyserve_expert_{name}", text, labels=["phase"])
    for phase, value in dict(values).items():
        family.add_metric([phase], value)
    return family
