"""Traces of requests, where the operator wants them. What sends them is in `otel`, which needs packages that are not
always there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from starlette.types import Scope

from proxyserve.api.errors import StartupError
from proxyserve.api.record import RequestRecord

if TYPE_CHECKING:
    from proxyserve.api.otel import OtelTracing


class RequestSpan(Protocol):
    """The span of one request."""

    @property
    def context(self) -> str:
        """Of the span, in the form of W3C's `traceparent`."""

    def end(self, record: RequestRecord) -> None:
        """The request is over."""


class Tracing(Protocol):
    """Thread-safe."""

    def begin(self, scope: Scope, record: RequestRecord) -> RequestSpan | None:
        """The span of a request that has just come, as a child of the one that its headers name; None for requests
        that are not traced. Sets the record's `trace_id`."""

    def close(self) -> None:
        """Send what is left, and nothing more."""


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Traces sent by OTLP over HTTP to the collector at `endpoint`; None without one. Raises StartupError if that
    cannot be done here."""
    return None if endpoint is None else _implementation(endpoint).to(endpoint)


def check_tracing(endpoint: str | None) -> None:
    """Raises what `open_tracing` would, and opens nothing."""
    if endpoint is not None:
        _implementation(endpoint)


def _implementation(endpoint: str) -> type[OtelTracing]:
    if not endpoint.startswith(("http://", "https://")):
        raise StartupError(
            f"--otlp-endpoint {endpoint} is no URL; write http://HOST:4318, where a collector takes OTLP over HTTP."
        )
    try:
        from proxyserve.api.otel import OtelTracing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise StartupError(
            "Traces need OpenTelemetry, which is not installed: pip install 'proxyserve[otel]', or leave "
            "--otlp-endpoint out (and OTEL_EXPORTER_OTLP_ENDPOINT unset)."
        ) from None
    return OtelTracing
