"""Request bodies: strict JSON, parsed once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from proxyserve.api.errors import UnsupportedMediaType
from proxyserve.api.record import record_of
from proxyserve.errors import InvalidRequest


class _JsonRequest(Request):
    """A request whose body was parsed by `parse`."""

    _document: Any

    async def parse(self) -> None:
        """Raises UnsupportedMediaType or InvalidRequest."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise UnsupportedMediaType("Send the body as JSON, with 'Content-Type: application/json'.")
        try:
            self._document = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from error
        record = record_of(self.scope)
        model = self._document.get("model") if isinstance(self._document, dict) else None
        if record is not None and isinstance(model, str):  # before anything refuses it
            record.model = model

    async def json(self) -> Any:
        return self._document


class JsonRoute(APIRoute):
    """A route with a JSON body. Python's own parser, which FastAPI uses, takes NaN and Infinity, half surrogate pairs
    that no tokenizer can encode, and nesting up to the interpreter's limit; this one refuses them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def parse_and_handle(request: Request) -> Response:
            parsed = _JsonRequest(request.scope, request.receive)
            await parsed.parse()
            return await handle(parsed)

        return parse_and_handle
