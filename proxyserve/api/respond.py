"""From a running generation to an HTTP response, streamed or whole. What the two routes' JSON looks like is in their
`ResponseShape`s."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from proxyserve import __version__
from proxyserve.api.generate import Answer, Generation, collect
from proxyserve.api.presence import while_present
from proxyserve.api.record import RequestRecord
from proxyserve.api.schemas.common import GenerationRequest, SampledRequest
from proxyserve.api.sse import EventStream, event_frame
from proxyserve.api.state import server_state
from proxyserve.types import OutputEvent

T = TypeVar("T")

#: Fields of a chunk or response, by name.
Fields = Mapping[str, Any]


class ResponseShape(Protocol):
    """How one route writes its responses, whose `id` it has. Fields that are not given to a model are left out of the
    JSON."""

    id: str

    def chunks(self, number: int, event: OutputEvent, *, each: Fields, last: Fields) -> Sequence[BaseModel]:
        """What to send for an event of choice `number`; nothing where the event says nothing that can be told yet. A
        choice's events come in their order. `each` are top-level fields of all chunks, `last` of the last one."""

    def closing(self, **more: Any) -> BaseModel:
        """A chunk without choices, after all others; `more` are top-level fields."""

    def whole(self, answers: Sequence[Answer], **more: Any) -> BaseModel:
        """The complete response; answer `i` is choice `i`."""


def unique_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def response_head(prefix: str, model: str) -> dict[str, Any]:
    """The fields that a response and all of its chunks begin with; `id` is `prefix` and something unique."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"proxyserve-{__version__}",
    }


async def respond(
    request: Request, body: GenerationRequest, generation: Generation, shape: ResponseShape
) -> Response:
    """Answer `body` with `generation`. Raises ClientDisconnect if the client goes away, which ends the generation."""
    note_work(request, body, generation, shape.id)
    stopping = server_state(request).stopping
    if body.stream:
        return EventStream(_chunks(generation, shape, body.include_usage), stopping=stopping)
    answers = await while_present(collect(generation), request.receive, stopping)

    def write() -> str:
        return as_json(shape.whole(answers, usage=generation.usage(), **_fusion(generation)))

    long = any(answer.prompt_logprobs for answer in answers)
    return Response(await written(write, long=long), media_type="application/json")


def note_work(request: Request, body: SampledRequest, generation: Generation, response_id: str) -> None:
    """Tell log and traces of it, and let it be cancelled by the response's id."""
    generation.known_as(response_id)
    record: RequestRecord = request.state.record
    record.work, record.stream = generation.work, bool(body.stream)
    record.metadata = body.metadata or {}


async def _chunks(
    generation: Generation, shape: ResponseShape, include_usage: bool
) -> AsyncGenerator[str, None]:
    """A frame per chunk. `usage` comes last, in a chunk without choices; `fusion` comes with the last chunk."""
    usage: Fields = {"usage": None} if include_usage else {}
    async with aclosing(generation.events()) as events:
        async for number, event in events:
            fusion = _fusion(generation) if generation.finished and not include_usage else {}
            write = partial(_frames, shape, number, event, each=usage, last=fusion)
            for frame in await written(write, long=bool(event.prompt_logprobs)):
                yield frame
    if include_usage:
        closing = shape.closing(usage=generation.usage(), **_fusion(generation))
        yield event_frame(as_json(closing))


def _frames(
    shape: ResponseShape, number: int, event: OutputEvent, *, each: Fields, last: Fields
) -> list[str]:
    return [event_frame(as_json(chunk)) for chunk in shape.chunks(number, event, each=each, last=last)]


async def written(write: Callable[[], T], *, long: bool) -> T:
    """What `write` makes; on another thread if it is `long`, as answers with log-probabilities of prompts are, since
    everybody's streams would wait for it."""
    return await run_in_threadpool(write) if long else write()


def _fusion(generation: Generation) -> dict[str, Any]:
    fusion = generation.fusion()
    return {} if fusion is None else {"fusion": fusion}


def as_json(model: BaseModel) -> str:
    return model.model_dump_json(exclude_unset=True)
