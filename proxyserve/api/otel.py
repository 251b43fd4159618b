"""Traces of requests by OpenTelemetry: one server span for each request that puts the engine to work, with our own
attributes and those of the semantic conventions for generative AI, as of November 2026
(github.com/open-telemetry/semantic-conventions-genai). Never text of prompts or answers, nor stop strings, which are
the client's text too.

The SDK's environment variables hold, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import Scope

from proxyserve import __version__
from proxyserve.api.record import RequestRecord, Work

#: What the conventions call the operation of each route that is traced.
_OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/score": "score",
}

#: Sampling fields whose names are the conventions' as well.
_SAMPLING = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty")

#: How long the last spans may take to reach their collector.
_FAREWELL_SECONDS = 5.0


class OtelTracing:
    """A `Tracing` over a provider, which this owns."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("proxyserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> OtelTracing:
        """Sends spans in batches, from a thread of its own, to a collector's URL (with or without `/v1/traces`)."""
        path = urlsplit(endpoint).path.rstrip("/")
        url = endpoint if path.endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
        resource = Resource({"service.name": "proxyserve", "service.version": __version__})
        provider = TracerProvider(
            resource=Resource.get_empty().merge(resource).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        return cls(provider)

    def begin(self, scope: Scope, record: RequestRecord) -> OtelSpan | None:
        operation = _OPERATIONS.get(scope["path"])
        if operation is None:
            return None
        span = self._tracer.start_span(
            operation,
            context=self._propagator.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "proxyserve",
                "http.request.method": record.method,
                "http.route": scope["path"],
            },
            start_time=record.began,
        )
        if span.get_span_context().is_valid:
            record.trace_id = f"{span.get_span_context().trace_id:032x}"
        return OtelSpan(span, operation)

    def close(self) -> None:
        # The SDK would wait for half a minute where a collector does not answer.
        closing = threading.Thread(target=self._provider.shutdown, name="proxyserve-traces", daemon=True)
        closing.start()
        closing.join(_FAREWELL_SECONDS)


class OtelSpan:
    """A `RequestSpan`."""

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation

    @property
    def context(self) -> str:
        carrier = self._span.get_span_context()
        return f"00-{carrier.trace_id:032x}-{carrier.span_id:016x}-{carrier.trace_flags:02x}"

    def end(self, record: RequestRecord) -> None:
        span = self._span
        if span.is_recording():
            if record.work is not None and record.model is not None:
                span.update_name(f"{self._operation} {record.model}")
            span.set_attributes(_attributes(record))
            if record.work is not None:
                self._add_events(record, record.work)
            if (
                record.error is not None and not 400 <= (record.status or 0) < 500
            ):  # else it is the client's error
                span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(record.nanoseconds(record.ended))

    def _add_events(self, record: RequestRecord, work: Work) -> None:
        timing = work.timing
        if timing is not None and timing.admitted_at is not None:
            self._span.add_event("admitted", timestamp=record.nanoseconds(timing.admitted_at))
        if work.first_token_at is not None:
            self._span.add_event("first_token", timestamp=record.nanoseconds(work.first_token_at))


def _attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue | None] = {
        "proxyserve.request_id": record.request_id,
        "proxyserve.key": record.key or None,
        "http.response.status_code": record.status,
        "error.type": record.error,
        "proxyserve.disconnected": True if record.disconnected else None,
        **({} if record.work is None else _of_work(record, record.work)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_work(record: RequestRecord, work: Work) -> dict[str, AttributeValue | None]:
    sampling, timing = work.sampling, work.timing
    return {
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        **{f"gen_ai.request.{name}": getattr(sampling, name) for name in _SAMPLING},
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.seed": None if sampling.seed is None else _int64(sampling.seed),
        "gen_ai.request.choice.count": work.choices if work.choices != 1 else None,
        "gen_ai.request.stream": True if record.stream else None,
        "gen_ai.response.finish_reasons": [reason.value for reason in work.finish_reasons] or None,
        "gen_ai.response.time_to_first_chunk": record.first_token_seconds if record.stream else None,
        "gen_ai.usage.input_tokens": work.prompt_tokens,
        "gen_ai.usage.output_tokens": work.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": work.cached_tokens,
        "proxyserve.rule": work.rule,
        "proxyserve.experts": [f"{name}@{number}" for name, number in work.generations.items()] or None,
        "proxyserve.mean_kl": work.mean_kl,
        "proxyserve.flips": work.flips,
        "proxyserve.drafted": work.drafted,
        "proxyserve.accepted": work.accepted,
        "proxyserve.time_to_first_token": record.first_token_seconds,
        "proxyserve.queue_seconds": None if timing is None else timing.queue_seconds,
        "proxyserve.prefill_seconds": None if timing is None else timing.prefill_seconds,
        "proxyserve.decode_seconds": None if timing is None else timing.decode_seconds,
        "proxyserve.barrier_seconds": None if timing is None else timing.barrier_seconds,
        **{f"proxyserve.lane_tokens.{model}": count for model, count in work.lane_tokens.items()},
    }


def _int64(seed: int) -> int:
    """OTLP has no larger integers; seeds may have 64 bits without a sign."""
    return seed - 2**64 if seed >= 2**63 else seed
