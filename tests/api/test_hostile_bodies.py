"""Bodies that are made to keep the event loop busy. What they cost is counted in the errors that validation collects,
each of which takes tens of microseconds; no limit on seconds would hold on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from proxyserve.api.schemas import admin
from proxyserve.api.schemas.base import MAX_ENTRIES, RequestModel
from proxyserve.api.schemas.chat import ChatRequest
from proxyserve.api.schemas.completions import CompletionRequest
from proxyserve.api.schemas.other import DetokenizeRequest, TokenizeRequest
from proxyserve.api.schemas.responses_api import ResponsesRequest
from proxyserve.api.schemas.score import ScoreRequest
from proxyserve.config import GrammarLimits, Limits
from proxyserve.errors import InvalidRequest

BODIES = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    ScoreRequest,
    TokenizeRequest,
    DetokenizeRequest,
    admin.ExpertRequest,
)

MANY = 2 * MAX_ENTRIES
MODEL = {"model": "atlas"}
PROMPT = {**MODEL, "prompt": "a"}


def loops(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lists and maps in a core schema whose entries are looked at, with where they are. Dataclasses are what
    parsers of our own have made of a body."""
    if isinstance(schema, dict) and schema.get("type") != "dataclass":
        kind = schema.get("type")
        if kind in ("list", "tuple", "set", "frozenset") or (
            kind == "dict" and schema.get("values_schema", {}).get("type") != "any"
        ):
            yield path, schema
        for name, inner in schema.items():
            if name not in ("serialization", "metadata"):
                yield from loops(inner, f"{path}.{name}")
    elif isinstance(schema, list | tuple):
        for number, inner in enumerate(schema):
            yield from loops(inner, f"{path}[{number}]")


@pytest.mark.parametrize("body", BODIES)
def test_every_list_and_map_ends_with_its_first_error(body: type[RequestModel]) -> None:
    """`AtMost` sees to that, and bounds it."""
    assert [
        path for path, schema in loops(body.__pydantic_core_schema__, "") if not schema.get("fail_fast")
    ] == []


@pytest.mark.parametrize(
    ("body", "given"),
    [
        pytest.param(CompletionRequest, {**PROMPT, "stop_token_ids": [-1] * MANY}, id="too many"),
        pytest.param(CompletionRequest, {**PROMPT, "stop_token_ids": [-1] * 1000}, id="all bad"),
        pytest.param(CompletionRequest, {**PROMPT, "allowed_token_ids": [0] * MANY}, id="allowed_token_ids"),
        pytest.param(
            CompletionRequest, {**PROMPT, "logit_bias": {str(i): "x" for i in range(1000)}}, id="map"
        ),
        pytest.param(CompletionRequest, {**PROMPT, **{f"x{i}": 0 for i in range(1000)}}, id="unknown fields"),
        pytest.param(
            CompletionRequest, {**PROMPT, "metadata": {f"x{i}": 0 for i in range(1000)}}, id="metadata"
        ),
        pytest.param(CompletionRequest, {**MODEL, "prompt": ["a"] * MANY}, id="prompts"),
        pytest.param(CompletionRequest, {**MODEL, "prompt": [1] * 2**21}, id="ids"),
        pytest.param(
            CompletionRequest,
            {**PROMPT, "fusion": {"experts": {f"x{i}": 1 for i in range(MANY)}}},
            id="experts",
        ),
        pytest.param(
            CompletionRequest,
            {**PROMPT, "fusion": {"experts": {"qa": {"schedule": [[0, 1]] * MANY}}}},
            id="schedule",
        ),
        pytest.param(
            CompletionRequest, {**PROMPT, "fusion": {"prompts": dict.fromkeys("abcdefg", 1)}}, id="lanes"
        ),
        pytest.param(
            CompletionRequest, {**PROMPT, "structured_outputs": {"choice": [""] * 1000}}, id="choice"
        ),
        pytest.param(ChatRequest, {**MODEL, "messages": [{"role": "x"}] * 1000}, id="messages"),
        pytest.param(
            ChatRequest,
            {**MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * MANY}]},
            id="parts",
        ),
        pytest.param(ChatRequest, {**MODEL, "messages": [{"role": "user"}], "tools": [1] * 1000}, id="tools"),
        pytest.param(ResponsesRequest, {**MODEL, "input": [1] * 1000}, id="items"),
        pytest.param(ScoreRequest, {**PROMPT, "continuations": [1] * 1000}, id="continuations"),
        pytest.param(DetokenizeRequest, {"tokens": [-1] * 1000}, id="tokens"),
        pytest.param(TokenizeRequest, {"messages": [1] * 1000}, id="tokenize"),
    ],
)
def test_one_error_is_enough(body: type[RequestModel], given: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, InvalidRequest)) as refusal:
        body.model_validate(given)
    if isinstance(refusal.value, ValidationError):
        assert refusal.value.error_count() == 1


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValidationError) as refusal:
        CompletionRequest.model_validate({**PROMPT, **{f"x{i}": 0 for i in range(1000)}})
    assert refusal.value.errors()[0]["loc"] == ("x0",)


def test_limits_are_below_what_bodies_may_have() -> None:
    """Else the message would name another bound than the server's."""
    counts = (
        "max_choices",
        "max_stop",
        "max_logit_bias",
        "max_bad_words",
        "max_logprob_token_ids",
        "max_tools",
    )
    assert all(getattr(Limits(), name) <= MAX_ENTRIES for name in (*counts, "max_batched_prompts"))
    assert {limit.name for limit in fields(Limits)} >= set(counts)
    assert GrammarLimits().max_choices <= MAX_ENTRIES
