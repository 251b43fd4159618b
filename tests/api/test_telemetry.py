"""Traces: what a span says, whose child it is, and that it reaches a collector."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from typer.testing import CliRunner

from proxyserve.api.app import create_app
from proxyserve.api.errors import StartupError
from proxyserve.api.otel import OtelTracing
from proxyserve.api.telemetry import open_tracing
from proxyserve.cli.main import app as command
from proxyserve.config import ServerConfig
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason, OutputEvent
from tests.api.fakes import FakeEngine
from tests.api.test_failures import ends_with

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CANARY = "xylophone-7261"


class Traced:
    """An application without a server around it, and its finished spans."""

    def __init__(self, engine: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self._app = create_app(engine, ServerConfig(), tracing=OtelTracing(provider))

    async def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    def one(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        self.exporter.clear()
        return span


@pytest.fixture
def traced(tiny_engine: AsyncEngine) -> Traced:
    return Traced(tiny_engine)


async def test_a_span_says_what_was_asked_and_what_came(traced: Traced) -> None:
    body = {"model": "atlas+qa:0.5", "prompt": CANARY, "max_tokens": 4, "n": 2, "ignore_eos": True}
    sampling = {"temperature": 0.7, "top_k": 5, "seed": 2**64 - 1, "stop": [CANARY], "user": CANARY}
    response = await traced.post("/v1/completions", {"authorization": f"Bearer {CANARY}"}, **body, **sampling)
    answer = response.json()
    span = traced.one()
    assert (span.name, span.kind, span.parent) == ("text_completion atlas+qa:0.5", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    found = dict(span.attributes or {})
    times = {name: found.pop(name) for name in [*found] if name.endswith(("_seconds", "first_token"))}
    assert found.pop("proxyserve.mean_kl") == pytest.approx(answer["fusion"]["mean_kl"])
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "proxyserve",
        "gen_ai.request.model": "atlas+qa:0.5",
        "gen_ai.response.model": "atlas+qa:0.5",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.seed": -1,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "proxyserve.request_id": response.headers["x-request-id"],
        "proxyserve.rule": "proxy",
        "proxyserve.experts": ("qa@1",),
        "proxyserve.flips": answer["fusion"]["flips"],
        **{
            f"proxyserve.lane_tokens.{model}": tokens
            for model, tokens in answer["usage"]["lane_tokens"].items()
        },
    }
    assert set(times) == {
        "proxyserve.queue_seconds",
        "proxyserve.prefill_seconds",
        "proxyserve.decode_seconds",
        "proxyserve.barrier_seconds",
        "proxyserve.time_to_first_token",
    }
    admitted, first = span.events
    assert (admitted.name, first.name) == ("admitted", "first_token")
    assert span.start_time is not None and span.end_time is not None
    assert span.start_time < admitted.timestamp < first.timestamp < span.end_time
    assert CANARY not in span.to_json()


async def test_the_caller_is_the_parent(traced: Traced) -> None:
    says = [{"role": "user", "content": CANARY}]
    headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
    response = await traced.post(
        "/v1/chat/completions", headers, model="atlas+qa", messages=says, max_tokens=2, stream=True
    )
    span = traced.one()
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == PARENT[3:35]
    assert f"{span.parent.span_id:016x}" == PARENT[36:52]
    assert response.headers["traceresponse"] == f"{PARENT[:36]}{span.context.span_id:016x}-01"
    assert span.name == "chat atlas+qa"
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert CANARY not in span.to_json()


async def test_who_does_not_sample_gets_no_span(traced: Traced) -> None:
    headers = {"traceparent": f"{PARENT[:-2]}00"}
    response = await traced.post("/v1/completions", headers, model="atlas", prompt="a", max_tokens=1)
    assert response.headers["traceresponse"].endswith("-00")
    assert traced.exporter.get_finished_spans() == ()


@pytest.mark.parametrize("given", ["", CANARY, "00-0-0-0", f"{PARENT}-x", "ff" + PARENT[2:], "0" * 600])
async def test_a_bad_parent_is_none(traced: Traced, given: str) -> None:
    await traced.post("/v1/completions", {"traceparent": given}, model="atlas", prompt="a", max_tokens=1)
    assert traced.one().parent is None


async def test_scores(traced: Traced) -> None:
    response = await traced.post("/v1/score", model="atlas+qa", prompt=CANARY, continuations=[" a", " b"])
    assert response.status_code == 200, response.text
    span = traced.one()
    assert span.name == "score atlas+qa"
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.usage.output_tokens"] == 0
    assert attributes["gen_ai.usage.input_tokens"] > 0
    assert attributes["proxyserve.prefill_seconds"] > 0
    assert "proxyserve.decode_seconds" not in attributes
    assert "proxyserve.mean_kl" not in attributes and "proxyserve.flips" not in attributes, (
        "nothing was drawn"
    )
    assert CANARY not in span.to_json()


async def test_refusals(traced: Traced) -> None:
    await traced.post("/v1/completions", model=CANARY, prompt="a")
    span = traced.one()
    assert span.name == "text_completion"
    assert span.status.status_code is StatusCode.UNSET, "it is the client's error"
    attributes = dict(span.attributes or {})
    assert (attributes["http.response.status_code"], attributes["error.type"]) == (404, "model_not_found")
    assert CANARY not in span.to_json()
    response = await traced.post("/tokenize", prompt="a")
    assert "traceresponse" not in response.headers
    assert traced.exporter.get_finished_spans() == (), "only what puts the engine to work is traced"


@pytest.mark.parametrize("stream", [False, True])
async def test_failures(tiny_models: ModelSet, stream: bool) -> None:
    failure = OutputEvent("", 0, finish_reason=FinishReason.ERROR, error=f"boom {CANARY}")
    traced = Traced(FakeEngine(tiny_models, ends_with(failure)))
    await traced.post("/v1/completions", model="atlas", prompt="a", stream=stream)
    span = traced.one()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "generation_failed")
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert attributes["gen_ai.usage.output_tokens"] == 1
    assert CANARY not in span.to_json()


# A collector ----------------------------------------------------------------------------------------------------


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """Its URL, and the paths and bodies that were posted there."""
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  likewise
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
async def test_spans_reach_a_collector(
    tiny_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with collector() as (url, received):
        tracing = open_tracing(url + path)
        assert tracing is not None
        app = create_app(tiny_engine, ServerConfig(), tracing=tracing)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for _ in range(3):
                await client.post("/v1/completions", json={"model": "atlas", "prompt": "a", "max_tokens": 1})
        tracing.close()
    assert {path for path, _ in received} == {"/v1/traces"}
    resources = [entry for _, body in received for entry in body.resource_spans]
    attributes = {entry.key: entry.value.string_value for entry in resources[0].resource.attributes}
    assert attributes["service.name"] == "proxyserve"
    assert attributes["deployment.environment.name"] == "test"
    spans = [span for entry in resources for scope in entry.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["text_completion atlas"] * 3
    assert len({span.trace_id for span in spans}) == 3


def test_a_collector_that_is_not_there_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxyserve.api.otel._FAREWELL_SECONDS", 0.05)
    tracing = open_tracing("http://127.0.0.1:9")
    assert tracing is not None
    tracing.close()


# Start-up -------------------------------------------------------------------------------------------------------


def test_without_an_endpoint_there_is_nothing() -> None:
    assert open_tracing(None) is None


def test_no_url() -> None:
    with pytest.raises(StartupError, match=r"http://HOST:4318"):
        open_tracing("localhost:4317")


def test_a_missing_package_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "opentelemetry":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "proxyserve.api.otel")
    arguments = ["serve", str(tmp_path)]  # no model
    result = CliRunner().invoke(
        command, arguments, env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    )
    assert isinstance(result.exception, StartupError)
    assert "proxyserve[otel]" in str(result.exception) and "--otlp-endpoint" in str(result.exception)
