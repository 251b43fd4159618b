"""Turns every exception into OpenAI's error shape. Handlers and middleware answer through `error_response` only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from proxyserve.api.deadline import DeadlineExceeded
from proxyserve.api.record import CLIENT_CLOSED_REQUEST, note_error
from proxyserve.api.running import RequestCancelled
from proxyserve.api.schemas.errors import ErrorBody, ErrorDetail, ErrorType
from proxyserve.api.state import server_state
from proxyserve.errors import (
    Forbidden,
    InvalidRequest,
    NotReady,
    ProxyserveError,
    QueueFull,
    SwapConflict,
    UnknownModel,
)

#: Names that clients invent are repeated in messages only up to this many characters.
_LONGEST_NAME = 100

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")

_TYPES: Mapping[int, ErrorType] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

#: The label of `proxyserve_requests_rejected_total` for each status that refuses a request.
_REJECTIONS: Mapping[int, str] = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    503: "not_ready",
}


class StartupError(ProxyserveError):
    """The server cannot start as configured; the message says what to change."""


class BodyTooLarge(ProxyserveError):
    """The request's body is above `Limits.max_body_bytes`."""


class BodyTooSlow(ProxyserveError):
    """The request's body did not come within `Limits.body_seconds`."""


class RequestNotFound(ProxyserveError):
    """The request that the path names is not being answered, or is not the caller's."""


class UnsupportedMediaType(ProxyserveError):
    """The request's body is not announced as JSON."""


class Unauthorized(ProxyserveError):
    """The request has no key, or one that this server does not know."""


class GenerationFailed(ProxyserveError):
    """The engine took the request and could not finish it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a client is told: a status, the error itself and headers that go with it."""

    status: int
    detail: ErrorDetail
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Problem:
        kind = _TYPES.get(status, "invalid_request_error")
        detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        return cls(status, detail, dict(headers or {}))

    @property
    def body(self) -> str:
        return ErrorBody(error=self.detail).model_dump_json()


def problem_of(error: Exception) -> Problem:
    """What to tell the client about `error`. An exception that nobody raised on purpose tells nothing of itself."""
    match error:
        case UnknownModel():
            return Problem.of(404, error.message, param=error.param, code=error.code)
        case Forbidden():
            return Problem.of(403, error.message, param=error.param, code=error.code)
        case InvalidRequest():
            return Problem.of(400, error.message, param=error.param, code=error.code)
        case SwapConflict():
            return Problem.of(409, error.message, code=error.code)
        case QueueFull():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return Problem.of(429, error.message, code=error.code, headers=headers)
        case NotReady():
            return Problem.of(503, error.message, code="not_ready", headers={"Retry-After": "1"})
        case Unauthorized():
            headers = {"WWW-Authenticate": "Bearer"}
            return Problem.of(401, error.message, code="invalid_api_key", headers=headers)
        case BodyTooLarge():
            return Problem.of(413, error.message, code="body_too_large")
        case BodyTooSlow():  # the rest of the body may still come: it must not be taken for another request
            return Problem.of(408, error.message, code="body_too_slow", headers={"Connection": "close"})
        case RequestNotFound():
            return Problem.of(404, error.message, code="request_not_found")
        case RequestCancelled():
            return Problem.of(CLIENT_CLOSED_REQUEST, error.message, code="request_cancelled")
        case DeadlineExceeded():
            return Problem.of(504, error.message, code="deadline_exceeded")
        case UnsupportedMediaType():
            return Problem.of(415, error.message, code="unsupported_media_type")
        case ProxyserveError():
            return Problem.of(500, error.message, code="generation_failed")
        case RequestValidationError():
            return validation_problem(error.errors())
        case HTTPException():
            return _problem_of_http(error)
        case _:
            return Problem.of(500, "The server failed on this request; its log says more.", code="internal")


class ProblemResponse(Response):
    """Tells the client of a problem, and the request's record of its code."""

    media_type = "application/json"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.body, problem.status, headers=dict(problem.headers))
        self._problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._problem.detail.code)
        await super().__call__(scope, receive, send)


def error_response(problem: Problem) -> Response:
    return ProblemResponse(problem)


#: What `rejection_reason` may say.
REJECTION_REASONS = (*_REJECTIONS.values(), "queue_full", "key_limit", "rate_limit")


def rejection_reason(problem: Problem) -> str | None:
    """The metrics label for a refusal, None where it is none. Of too much work, it tells whose limit it was."""
    return problem.detail.code if problem.status == 429 else _REJECTIONS.get(problem.status)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception raised by a route, and 404 and 405 of the router, in OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if problem.status == 405:
            problem = replace(problem, headers={"Allow": ", ".join(_methods(app, request.scope))})
        reason = rejection_reason(problem)
        if reason is not None:
            server_state(request).metrics.rejected(reason)
        return error_response(problem)

    async def forget(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (ProxyserveError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(ClientDisconnect, forget)


def _methods(app: FastAPI, scope: Scope) -> list[str]:
    """What the path takes. Starlette names those of the first route of that path alone."""
    return [
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.router.routes)
    ]


def field_path(location: Sequence[int | str]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{shorten(step)}" if path else shorten(step)
    return path


def shorten(name: str) -> str:
    """`name` as it may be repeated to the client."""
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."


def _problem_of_http(error: HTTPException) -> Problem:
    messages = {
        404: ("There is no such route; /docs lists them.", "route_not_found"),
        405: ("This route does not take this method; /docs lists the methods.", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), None))
    return Problem.of(error.status_code, message, code=code, headers=error.headers)


def _is_tag(step: int | str) -> bool:
    """Whether a step is no field but the kind of object, `<function_call>`, that the validator took one for."""
    return isinstance(step, str) and step.startswith("<") and step.endswith(">")


def validation_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """The first of the validator's findings; values that the client sent are never repeated."""
    first = errors[0]
    where = tuple(first["loc"])[1:]  # drops "body", "path" or "query"
    if where[:1] in (("fusion",), ("response_format",)):
        # Leaves out the rule or the type, by which the validator chose how to read the object.
        where = (*where[:1], *where[2:])
    if where[-1:] == ("[key]",):
        where = where[:-2]  # a name in the object, which may be anything
    where = tuple(step for step in where if not _is_tag(step))
    param = field_path(where) or None
    if param is None:
        return Problem.of(400, "The body must be a JSON object.", code="invalid_body")
    match first["type"]:
        case "missing":
            return Problem.of(400, f"'{param}' is required.", param=param, code="missing_required_parameter")
        case "extra_forbidden":
            message = f"There is no field '{param}' in this request."
            return Problem.of(400, message, param=param, code="unknown_parameter")
        case "not_supported_yet":
            message = f"'{param}' is not supported yet. {first['msg']}"
            return Problem.of(400, message, param=param, code="unsupported_parameter")
        case kind:
            code = "invalid_type" if kind.endswith("_type") else "invalid_value"
            return Problem.of(400, f"'{param}': {first['msg']}.", param=param, code=code)
