"""What an exchange says once it is decoded: how it ended, when its tokens came, and how many they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from proxyserve.bench.load.wire import Exchange
from proxyserve.bench.load.workload import Ask

_MESSAGE = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """An answered request. Times are seconds of one clock. `pieces` are the times at which text came; without streaming
    there is one. Counts of tokens are None where the server did not give them: `usage` its own, `ids` of the ids that
    it sent. `doubts` says what does not fit together."""

    model: str
    began: float
    ended: float
    pieces: tuple[float, ...]
    prompt_usage: int | None
    usage: int | None
    ids: int | None
    doubts: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the answer: what the server counted, or the ids, or else the pieces."""
        if self.usage is not None:
            return self.usage
        return len(self.pieces) if self.ids is None else self.ids


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without an answer. `kind` is "status NNN", "refused", "cut", "timeout", "malformed", "error event" or
    "empty"; `message` the beginning of what the server said."""

    model: str
    kind: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Checks:
    """What must hold for every answer. `prompt`: the server counts as many tokens as were sent, which it cannot where a
    template is around them. `length`: the answer has `max_tokens` tokens, since nothing may end it before."""

    prompt: bool = True
    length: bool = True


def read_answer(ask: Ask, record: Exchange, checks: Checks) -> Answer | Failure:
    """What came of `ask`."""
    body = b"".join(piece for _, piece in record.pieces)
    said = body[:_MESSAGE].decode(errors="replace")
    if record.failure is not None:
        return Failure(ask.model, record.failure, said if record.failure == "malformed" else "")
    if record.status != 200:
        return Failure(ask.model, f"status {record.status}", said)
    times: list[float] = []
    ids: int | None = None
    usage: dict[str, Any] = {}
    finished: str | None = None
    try:
        for time, event in _events(record):
            if event.get("error"):
                return Failure(ask.model, "error event", json.dumps(event["error"])[:_MESSAGE])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                finished = choice.get("finish_reason") or finished
                here = choice.get("token_ids")
                ids = ids if here is None else (ids or 0) + len(here)
                if here or _text(choice):
                    times.append(time)
        prompt_usage, answer_usage = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    except (ValueError, AttributeError, TypeError):
        return Failure(ask.model, "malformed", said)
    if not times:
        return Failure(ask.model, "empty", said)
    answer = Answer(ask.model, record.began, record.ended, tuple(times), prompt_usage, answer_usage, ids)
    return replace(answer, doubts=tuple(_doubts(answer, ask, checks, finished)))


def _events(record: Exchange) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON of a body: of each event of a stream, at the time when its end came, or of the whole."""
    if record.pieces and not record.pieces[0][1].lstrip().startswith(b"{"):
        rest = b""
        for time, piece in record.pieces:
            *lines, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    yield time, json.loads(data)
        return
    yield record.ended, json.loads(b"".join(piece for _, piece in record.pieces))


def _count(usage: dict[str, Any], name: str) -> int | None:
    """A number of `usage`. Raises TypeError where it is none."""
    number = usage.get(name)
    if number is not None and not isinstance(number, int):
        raise TypeError(name)
    return number


def _text(choice: dict[str, Any]) -> str:
    """Whatever of the answer a choice carries."""
    said = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or said.get("content") or said.get("reasoning_content") or ""


def _doubts(answer: Answer, ask: Ask, checks: Checks, finished: str | None) -> Iterator[str]:
    if checks.prompt and answer.prompt_usage not in (None, ask.prompt_tokens):
        yield "prompt not counted as sent"
    if answer.usage is not None and answer.ids not in (None, answer.usage):
        yield "usage is not the number of ids"
    if checks.length and answer.tokens != ask.max_tokens:
        yield "answer not as long as asked for"
    if finished is None:
        yield "no finish_reason"
