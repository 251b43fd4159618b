"""Prometheus metrics; `families` says which there are. Models are labelled with the names that lanes have (`atlas`,
`qa.tuned`), pools of KV blocks with the first model that uses them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import torch
import transformers
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool

from proxyserve import __version__
from proxyserve.api import families
from proxyserve.api.documentation import error_answers
from proxyserve.api.errors import REJECTION_REASONS
from proxyserve.api.expert_metrics import ExpertCollector
from proxyserve.api.state import server_state
from proxyserve.engine.histogram import Histogram
from proxyserve.types import FinishReason

if TYPE_CHECKING:
    from proxyserve.engine.loop import EngineStats
    from proxyserve.experts.manager import ExpertManager

_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 2, 5, 10, 20, 40, 80)
_REQUEST_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 480)
_COMPILE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_SUCCESSES = (FinishReason.STOP, FinishReason.LENGTH)

#: What can come of a grammar that a request asks for: it was compiled, or found in the cache, or is refused because it
#: is wrong or too large, or because compiling it took too long.
GrammarOutcome = Literal["compiled", "cached", "refused", "timed_out"]

router = APIRouter(tags=["operation"])


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_answers(401, 403)},
)
async def read_metrics(request: Request) -> Response:
    """Prometheus text format. Where the server has keys, it takes an administrator's or a monitor's: labels name
    models and whose keys there are."""
    text = await run_in_threadpool(server_state(request).metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class Metrics:
    """What the HTTP layer measures itself, and on top of it, at each scrape, what `snapshot` says of the engine and
    `experts` of swaps."""

    def __init__(self, snapshot: Callable[[], EngineStats], experts: ExpertManager | None = None) -> None:
        self.first_token_seconds = Histogram(_FIRST_TOKEN_SECONDS)
        self.request_seconds = Histogram(_REQUEST_SECONDS)
        # From 0 on: Prometheus sees no increase in a series that begins at 1.
        self._rejections: Counter[str] = Counter(dict.fromkeys(REJECTION_REASONS, 0))
        self._grammars: Counter[str] = Counter()
        self._grammar_seconds = Histogram(_COMPILE_SECONDS)
        self._lock = threading.Lock()  # of those that other threads than the event loop's may write
        self._registry = CollectorRegistry()
        self._registry.register(_HttpCollector(self))
        self._registry.register(_EngineCollector(snapshot))
        if experts is not None:
            self._registry.register(ExpertCollector(experts))
        ProcessCollector(registry=self._registry)

    def rejected(self, reason: str) -> None:
        """`reason` is one of few."""
        with self._lock:
            self._rejections[reason] += 1

    def grammar(self, outcome: GrammarOutcome, seconds: float | None = None) -> None:
        """A request asked for a grammar; `seconds` is what compiling it took, also where that failed, None where
        nothing was compiled. From any thread."""
        with self._lock:
            self._grammars[outcome] += 1
            if seconds is not None:
                self._grammar_seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        yield families.FIRST_TOKEN.histogram(self.first_token_seconds.stats())
        yield families.END_TO_END.histogram(self.request_seconds.stats())
        yield families.REJECTED.by(self._rejections.copy())
        yield families.GRAMMAR_COMPILATIONS.by(self._grammars.copy())
        yield families.GRAMMAR_SECONDS.histogram(self._grammar_seconds.stats())
        versions = (__version__, torch.__version__, transformers.__version__)
        yield families.BUILD_INFO.samples([(versions, 1)])

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _HttpCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()


class _EngineCollector(Collector):
    """Reads the engine's numbers when Prometheus asks, so that nothing is counted twice."""

    def __init__(self, snapshot: Callable[[], EngineStats]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # registering must not ask an engine that is still loading

    def collect(self) -> Iterator[Metric]:
        stats = self._snapshot()
        yield families.READY.one(stats.ready)
        yield families.RUNNING.one(stats.running)
        yield families.WAITING.one(stats.waiting)
        yield families.WAITING_TOKENS.one(stats.waiting_tokens)
        yield families.STEPS.one(stats.steps)
        yield families.STEP_FAILURES.one(stats.step_failures)
        yield families.NONFINITE.one(stats.nonfinite_choices)
        yield families.PROMPT_TOKENS.one(stats.prompt_tokens)
        yield families.PROMPT_TOKENS_CACHED.one(stats.cached_tokens)
        yield families.GENERATION_TOKENS.one(stats.tokens_generated)
        yield families.FUSED_TOKENS.one(stats.fused_tokens)
        yield families.GATED_TOKENS.one(stats.gated_tokens)
        yield families.FLIPS.one(stats.flips)
        yield families.PREEMPTIONS.one(stats.preemptions)
        yield families.SAMPLING_SECONDS.one(stats.sampling_seconds)
        yield families.KERNEL_COMPILATIONS.one(stats.kernel_compilations)
        yield families.MEMORY.one(stats.memory)
        yield families.BASE_PARTS.one(stats.base_parts)
        yield families.LANE_TOKENS.by(stats.lane_tokens)
        yield families.LANE_SECONDS.by({name: trunk.seconds_run for name, trunk in stats.trunks.items()})
        yield families.PREFIX_QUERIES.by(stats.prefix_queries)
        yield families.PREFIX_HITS.by(stats.prefix_hits)
        yield families.DRAFTS.by(stats.drafts)
        yield families.DRAFT_TOKENS.by(stats.draft_tokens)
        yield families.ACCEPTED_TOKENS.by(stats.accepted_tokens)
        yield families.EXPERT_REQUESTS.samples(stats.by_generation.items())
        yield from _finished(stats)
        yield from _pools(stats)
        yield from _keys(stats)
        for family in families.all_families():
            histogram = stats.histograms.get(family.name.removeprefix("proxyserve_"))
            if histogram is not None:
                yield family.histogram(histogram)


def _finished(stats: EngineStats) -> Iterator[Metric]:
    for family, success in ((families.SUCCESS, True), (families.FAILURE, False)):
        reasons = [reason.value for reason in FinishReason if (reason in _SUCCESSES) == success]
        yield family.by({reason: stats.finished.get(reason, 0) for reason in reasons})


def _pools(stats: EngineStats) -> Iterator[Metric]:
    pools = stats.pools.items()
    yield families.KV_BLOCKS.by({name: pool.blocks_total for name, pool in pools})
    yield families.KV_BLOCKS_IN_USE.by({name: pool.blocks_in_use for name, pool in pools})
    yield families.KV_BLOCKS_CACHED.by({name: pool.blocks_cached for name, pool in pools})
    yield families.KV_USAGE.by({name: pool.blocks_in_use / pool.blocks_total for name, pool in pools})


def _keys(stats: EngineStats) -> Iterator[Metric]:
    keys = stats.by_key.items()
    yield families.KEY_REQUESTS.by({name: counts.choices for name, counts in keys})
    prompts = [((name, "prompt"), counts.prompt_tokens) for name, counts in keys]
    generations = [((name, "generation"), counts.generation_tokens) for name, counts in keys]
    yield families.KEY_TOKENS.samples([*prompts, *generations])
