"""Prometheus metrics. Names follow those of other servers, with the prefix `proxyserve_`; models are labelled with the
names that lanes have (`atlas`, `qa.tuned`), pools of KV blocks with the first model that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool

from proxyserve.api.expert_metrics import ExpertCollector
from proxyserve.api.families import counter_family, gauge_family
from proxyserve.api.state import server_state
from proxyserve.types import FinishReason

if TYPE_CHECKING:
    from proxyserve.engine.loop import EngineStats, PoolStats, TrunkStats
    from proxyserve.experts.manager import ExpertManager

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_FIRST_TOKEN_SECONDS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUEST_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0)

_SUCCESSES = frozenset({FinishReason.STOP.value, FinishReason.LENGTH.value})

router = APIRouter(tags=["operation"])


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def read_metrics(request: Request) -> Response:
    """Prometheus text format. Needs a key where the server has any, since labels name models."""
    text = await run_in_threadpool(server_state(request).metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class Metrics:
    """What the HTTP layer measures itself, and on top of it, at each scrape, what `snapshot` says of the engine and
    `experts` of swaps."""

    def __init__(self, snapshot: Callable[[], EngineStats], experts: ExpertManager | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(snapshot))
        if experts is not None:
            self._registry.register(ExpertCollector(experts))
        self.first_token_seconds = Histogram(
            "proxyserve_time_to_first_token_seconds",
            "From a request's arrival to the first token of each choice.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self.inter_token_seconds = Histogram(
            "proxyserve_inter_token_latency_seconds",
            "Between successive tokens of a choice.",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "proxyserve_e2e_request_latency_seconds",
            "From a request's arrival to the end of each choice that was finished.",
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )
        self._rejections = Counter(
            "proxyserve_requests_rejected",
            "Requests that were refused, by reason.",
            ["reason"],
            registry=self._registry,
        )

    def rejected(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's numbers when Prometheus asks, so that nothing is counted twice."""

    def __init__(self, snapshot: Callable[[], EngineStats]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # registering must not ask an engine that is still loading

    def collect(self) -> Iterator[Metric]:
        stats = self._snapshot()
        yield gauge_family("num_requests_running", "Choices that hold KV blocks.", stats.running)
        yield gauge_family("num_requests_waiting", "Choices that wait to be admitted.", stats.waiting)
        yield counter_family("engine_steps", "Steps of the engine.", stats.steps)
        yield counter_family("prompt_tokens", "Prompt tokens of finished choices.", stats.prompt_tokens)
        yield counter_family(
            "prompt_tokens_cached", "Those of them that came from the prefix cache.", stats.cached_tokens
        )
        yield counter_family("generation_tokens", "Tokens generated.", stats.tokens_generated)
        yield counter_family(
            "fused_tokens", "Those of them that were drawn from a fused law.", stats.fused_tokens
        )
        yield counter_family("gated_tokens", "Tokens that a gate left to the base alone.", stats.gated_tokens)
        yield counter_family("flips", "Those of them where the fused argmax is not the base's.", stats.flips)
        yield counter_family(
            "kl_nats", "Sum of KL(fused || base) over fused tokens, in nats.", stats.kl_total
        )
        yield counter_family(
            "num_preemptions", "Choices whose blocks were taken back for a while.", stats.preemptions
        )
        yield counter_family(
            "kernel_compilations",
            "Kernels compiled after the warm-up; should stay 0.",
            stats.kernel_compilations,
        )
        yield from _finished(stats.finished)
        yield from _memory(stats.pools)
        yield from _models(stats.lane_tokens, stats.trunks)
        yield gauge_family("memory_bytes", "Weights and KV of all models.", stats.memory)
        requests = CounterMetricFamily(
            "proxyserve_expert_requests",
            "Choices that ended, by the generation of each expert that they had.",
            labels=["expert", "generation"],
        )
        for (expert, generation), count in stats.by_generation.items():
            requests.add_metric([expert, str(generation)], count)
        yield requests


def _finished(finished: Mapping[str, int]) -> Iterator[Metric]:
    success = CounterMetricFamily(
        "proxyserve_request_success", "Choices finished, by reason.", labels=["finished_reason"]
    )
    failure = CounterMetricFamily(
        "proxyserve_request_failure", "Choices ended early, by reason.", labels=["finished_reason"]
    )
    for reason in FinishReason:
        family = success if reason.value in _SUCCESSES else failure
        family.add_metric([reason.value], finished.get(reason.value, 0))
    yield success
    yield failure


def _memory(pools: Mapping[str, PoolStats]) -> Iterator[Metric]:
    gauges: Mapping[str, tuple[str, Callable[[PoolStats], float]]] = {
        "kv_blocks": ("KV blocks of a pool.", lambda pool: pool.blocks_total),
        "kv_blocks_in_use": ("KV blocks that lanes hold.", lambda pool: pool.blocks_in_use),
        "kv_blocks_cached": (
            "KV blocks that no lane holds but a prompt may find.",
            lambda pool: pool.blocks_cached,
        ),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(f"proxyserve_{name}", text, labels=["pool"])
        for label, pool in pools.items():
            gauge.add_metric([label], value(pool))
        yield gauge


def _models(lane_tokens: Mapping[str, int], trunks: Mapping[str, TrunkStats]) -> Iterator[Metric]:
    tokens = CounterMetricFamily(
        "proxyserve_lane_tokens", "Tokens that ran through a model.", labels=["model"]
    )
    for name, count in lane_tokens.items():
        tokens.add_metric([name], count)
    yield tokens
    seconds = CounterMetricFamily(
        "proxyserve_lane_seconds",
        "Time spent running a model and the adapters over it.",
        labels=["model"],
    )
    for name, trunk in trunks.items():
        seconds.add_metric([name], trunk.seconds_run)
    yield seconds
