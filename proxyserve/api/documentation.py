"""What the OpenAPI document says beyond the types: error answers and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse

from proxyserve.api.auth import PUBLIC_PATHS
from proxyserve.api.reference import as_html, sections
from proxyserve.api.schemas.errors import ErrorBody

_DESCRIPTIONS: Mapping[int, str] = {
    400: "A field has a bad value, is unknown, or is not supported yet; `param` names it.",
    401: "The server has keys and the request has none of them.",
    403: "What is asked for is not allowed to this key, or takes an administrator's.",
    404: "There is no such model, expert or route.",
    405: "The route does not take this method.",
    408: "The body did not come in time.",
    413: "The body is above the server's limit.",
    415: "The body is not announced as `application/json`.",
    429: "Too much work is waiting; `Retry-After` says when to come back.",
    500: "The server failed on this request.",
    499: "The request was cancelled by its id.",
    503: "The server is loading, draining or dead.",
    504: "The request's `timeout`, or the server's, is over.",
}

#: For routes that take a body.
BODY_ERRORS = (400, 401, 408, 413, 415, 500)
#: For routes that put the engine to work.
ENGINE_ERRORS = (*BODY_ERRORS, 403, 404, 429, 499, 503, 504)


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route. `default` stands for what any route may answer; naming it also keeps FastAPI from
    adding its own 422, which this server never sends."""
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in sorted(statuses)
    }
    answers["default"] = {"model": ErrorBody, "description": "Any other refusal."}
    return answers


def event_stream(chunk: str, *, end: str = "then `[DONE]`, or an error in its place") -> dict[str, Any]:
    """The 200 of a route that streams on request, beside its JSON. `chunk` names the schema of each event's data, `end`
    says how the stream ends."""
    data = [{"$ref": f"#/components/schemas/{name}"} for name in (chunk, ErrorBody.__name__)]
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": data}}
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, json]} if "[DONE]" in end else json},
        "required": ["data"],
    }
    return {
        "description": f"The answer; with `stream`, server-sent events whose data is a `{chunk}` each, {end}.",
        # `schema` would describe the whole stream, which is no JSON.
        "content": {"text/event-stream": {"itemSchema": event}},
    }


def install_openapi(app: FastAPI, *, chunks: Sequence[type[BaseModel]], keys: bool) -> None:
    """Make `app.openapi` define the `chunks` of event streams, and say which routes need a key; show it as a page under
    `/docs`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            for chunk in chunks:
                _add_schema(document, chunk)
            if keys:
                _add_keys(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way

    # On threads of their own: the first one takes a second or so, in which no stream should stand still.
    @app.get("/openapi.json", include_in_schema=False)
    def document() -> JSONResponse:
        return JSONResponse(openapi())

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(as_html(list(sections(openapi())), app.title))


def _add_schema(document: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    schemas = document["components"]["schemas"]
    for name, part in schema.pop("$defs", {}).items():
        schemas.setdefault(name, part)
    schemas[model.__name__] = schema


def _add_keys(document: dict[str, Any]) -> None:
    document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path, operations in document["paths"].items():
        if path in PUBLIC_PATHS:
            for operation in operations.values():
                operation["security"] = []
