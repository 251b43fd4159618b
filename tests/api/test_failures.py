"""What clients see when the engine refuses, fails, stalls or stops midway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message

from proxyserve.api.app import create_app
from proxyserve.config import Limits, ServerConfig
from proxyserve.engine.submission import Submission
from proxyserve.errors import NotReady, QueueFull
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason, OutputEvent
from tests.api.fakes import FakeEngine, Script, last, token
from tests.api.live import serve

BODY = {"model": "atlas+qa", "prompt": "Hi"}
PATH = "/v1/completions"


async def post(engine: Any, **body: Any) -> httpx.Response:
    """One request to an application without a server around it."""
    transport = httpx.ASGITransport(create_app(engine, ServerConfig()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(PATH, json={**BODY, **body})


def events_of(response: httpx.Response) -> list[Any]:
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


def ends_with(event: OutputEvent | Exception) -> Script:
    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        yield token(submissions[0], "so far")
        if isinstance(event, Exception):
            raise event
        yield OutputEvent(submissions[0].request_id, 0, finish_reason=event.finish_reason, error=event.error)

    return script


FAILURES: list[tuple[OutputEvent | Exception, int, str]] = [
    (OutputEvent("", 0, finish_reason=FinishReason.ERROR, error="The engine died: boom"), 500, "boom"),
    (OutputEvent("", 0, finish_reason=FinishReason.CANCELLED), 503, "shutting down"),
    (RuntimeError("prompt text that nobody may see"), 500, "The server failed"),
]


@pytest.mark.parametrize(("failure", "status", "words"), FAILURES, ids=["error", "cancelled", "bug"])
async def test_failure_midway(
    tiny_models: ModelSet, failure: OutputEvent | Exception, status: int, words: str
) -> None:
    engine = FakeEngine(tiny_models, ends_with(failure))
    response = await post(engine)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert "nobody may see" not in response.text
    assert engine.open_streams == 0


@pytest.mark.parametrize(("failure", "status", "words"), FAILURES, ids=["error", "cancelled", "bug"])
async def test_failure_midway_of_a_stream(
    tiny_models: ModelSet, failure: OutputEvent | Exception, status: int, words: str
) -> None:
    engine = FakeEngine(tiny_models, ends_with(failure))
    response = await post(engine, stream=True)
    assert response.status_code == 200
    first, error = events_of(response)
    assert first["choices"][0]["text"] == "so far"
    assert words in error["error"]["message"]
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert "nobody may see" not in response.text
    assert engine.open_streams == 0


async def test_queue_full(tiny_models: ModelSet) -> None:
    response = await post(
        FakeEngine(tiny_models, refusal=QueueFull("too much", retry_after=2.2)), stream=True
    )
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"] == {
        "message": "too much",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


async def test_not_ready(tiny_models: ModelSet) -> None:
    response = await post(FakeEngine(tiny_models, refusal=NotReady("The server is loading.")))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "The server is loading."


@pytest.mark.parametrize("state", ["loading", "draining", "dead", "ready"])
async def test_readiness_follows_the_engine(tiny_models: ModelSet, state: str) -> None:
    engine: Any = FakeEngine(tiny_models, state=state)
    app = create_app(engine, ServerConfig())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        ready, health = await client.get("/ready"), await client.get("/health")
    assert ready.status_code == (200 if state == "ready" else 503)
    assert ready.json()["status"] == state
    assert bool(ready.json()["reason"]) == (state != "ready")
    assert health.status_code == 200


async def test_usage_and_fusion_add_up(tiny_models: ModelSet) -> None:
    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        for submission in submissions:
            yield last(submission, index=0, tokens=1)
            yield last(submission, index=1, tokens=3)

    answer = (await post(FakeEngine(tiny_models, script), prompt=["a", "b"], n=2)).json()
    assert answer["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 8,
        "total_tokens": 28,
        "prompt_tokens_details": {"cached_tokens": 8},
        "lane_tokens": {"atlas": 44},
    }
    assert answer["fusion"] == {
        "rule": "proxy",
        "sum_of_weights": 1.0,
        "generations": {"qa": 3},
        "mean_kl": (1 + 9) / 4,
        "flips": 8,
    }


async def test_large_bodies_are_prepared_alike(tiny_models: ModelSet) -> None:
    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        yield last(submissions[0])

    engine = FakeEngine(tiny_models, script)
    text = "Hello there, " * 4000
    assert (await post(engine, prompt=text)).status_code == 200
    assert (await post(engine, prompt=text, fusion={"experts": {"qa": 1}})).status_code == 400
    assert engine.submitted[0].prompts.default == tuple(tiny_models.base.tokenizer.encode(text))


def test_limits_are_the_configured_ones(tiny_models: ModelSet) -> None:
    config = ServerConfig(limits=Limits(max_body_bytes=1000, max_n=2, max_batched_prompts=2, max_logprobs=1))
    with serve(FakeEngine(tiny_models), config) as live:
        assert live.post(PATH, **BODY, n=3).json()["error"]["param"] == "n"
        assert live.post(PATH, model="atlas", prompt=["a", "b", "c"]).json()["error"]["param"] == "prompt"
        assert live.post(PATH, **BODY, logprobs=2).json()["error"]["param"] == "logprobs"
        announced = live.post(PATH, model="atlas", prompt="a" * 1000)
        pieces = (b" " * 100 for _ in range(11))
        unannounced = live.http.post(PATH, content=pieces, headers={"content-type": "application/json"})
        for response in (announced, unannounced):
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
            assert response.headers["x-request-id"]
        # The connection is still good for the next request.
        assert live.http.get("/health").status_code == 200


async def test_announced_size_is_refused_before_it_is_read(tiny_models: ModelSet) -> None:
    app = create_app(cast(Any, FakeEngine(tiny_models)), ServerConfig())
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    for length in (b"8388609", b"9" * 5000):
        sent.clear()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        assert sent[0]["status"] == 413


def test_request_ids_go_round(tiny_models: ModelSet) -> None:
    with serve(FakeEngine(tiny_models)) as live:
        given = live.http.get("/health", headers={"x-request-id": "abc-1.2:3_4"})
        assert given.headers["x-request-id"] == "abc-1.2:3_4"
        made = {
            live.http.get("/nothing", headers=headers).headers["x-request-id"]
            for headers in (
                {},
                {"x-request-id": "a b"},
                {"x-request-id": "x" * 129},
                {"x-request-id": "<script>"},
            )
        }
        assert len(made) == 4
        assert all(value.startswith("req-") for value in made)


async def test_bug_in_a_route_is_a_500_of_our_shape(
    tiny_models: ModelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("inner detail")

    engine = FakeEngine(tiny_models)
    monkeypatch.setattr(engine, "submit", broken)
    response = await post(engine)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "inner detail" not in response.text
    assert response.headers["x-request-id"]


async def test_prompt_text_is_not_logged(tiny_models: ModelSet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for failure, _, _ in FAILURES[:2]:
        await post(
            FakeEngine(tiny_models, ends_with(failure)), prompt="my secret diary", user="my secret name"
        )
    await post(FakeEngine(tiny_models), prompt="my secret diary", temperature="my secret diary")
    assert "my secret" not in caplog.text


async def test_abandoned_generation_leaves_nothing(tiny_models: ModelSet) -> None:
    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        await asyncio.sleep(60)
        yield last(submissions[0])

    for stream in (False, True):
        engine = FakeEngine(tiny_models, script)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(engine, stream=stream), 0.05)
        assert engine.open_streams == 0
