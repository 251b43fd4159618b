"""Request ids, and the answer of last resort."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxyserve.api.errors import error_response, problem_of

logger = logging.getLogger("proxyserve.api")

_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class RequestIdMiddleware:
    """The outermost layer. Takes the client's `x-request-id` if it is harmless, else makes one; sends it back on every
    answer; and turns an exception that nothing handled into a 500 in OpenAI's shape, logged under that id.

    Sets `state.request_id` and `state.arrived` (`time.perf_counter` at arrival).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(request_id=request_id, arrived=time.perf_counter())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if started:  # the server closes the connection, which is all the client can still be told
                raise
            await error_response(problem_of(error))(scope, receive, send_with_id)
