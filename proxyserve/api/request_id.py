"""The outermost layer: request ids, what is recorded of each request, and the answer of last resort."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxyserve.api.errors import error_response, problem_of
from proxyserve.api.record import RequestRecord
from proxyserve.api.request_log import RequestLog
from proxyserve.api.telemetry import Tracing

logger = logging.getLogger("proxyserve.api")

_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class RequestIdMiddleware:
    """Takes the client's `x-request-id` if it is harmless, else makes one; sends it back on every answer; turns an
    exception that nothing handled into a 500 in OpenAI's shape, logged under that id; and hands the record of every
    request, when it is over, to the log and the traces.

    Sets `state.request_id`, `state.arrived` (`time.perf_counter` at arrival) and `state.record`.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._log = RequestLog()
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        record = RequestRecord(request_id, scope["method"], scope["path"])
        scope.setdefault("state", {}).update(request_id=request_id, arrived=record.arrived, record=record)
        span = None if self._tracing is None else self._tracing.begin(scope, record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if span is not None:
                    headers["traceresponse"] = span.context
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                record.complete = True

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            record.error = "internal"
            if (
                record.status is not None
            ):  # the server closes the connection, which is all the client can be told
                raise
            await error_response(problem_of(error))(scope, receive, send_with_id)
        finally:
            record.end(scope)
            self._log.write(record)
            if span is not None:
                span.end(record)
