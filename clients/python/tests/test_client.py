"""Both clients against the stub: what they send, and what they make of the answers."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from proxyserve_client import (
    AsyncProxyServe,
    Fusion,
    FusionReport,
    LabelScore,
    PromptToken,
    ProxyServe,
    TextScore,
    Usage,
)

REPORT = FusionReport("proxy", 1.0, {"qa": 2}, 0.25, 1, {"drafted": 0})
SCORE = TextScore(-0.5, 1, -0.5, None, True, (5, 6), ("a", "b"), (None, -0.5), (None, {"b": -0.5}))
USAGE = Usage(7, 3, 10, 4, {"atlas": 6, "qa.tuned": 10, "small": 10})


@pytest.fixture
def client(stub: Any) -> Iterator[ProxyServe]:
    with ProxyServe(stub.url, model="atlas", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(stub: Any) -> AsyncIterator[AsyncProxyServe]:
    async with AsyncProxyServe(stub.url, model="atlas", max_retries=0) as client:
        yield client


def test_chat(stub: Any, client: ProxyServe) -> None:
    reply = client.chat("Where was Mira born?", fusion=Fusion.proxy(qa=0.8), max_tokens=8, top_k=5, seed=1)
    assert stub.body == {
        "model": "atlas",
        "messages": [{"role": "user", "content": "Where was Mira born?"}],
        "fusion": {"rule": "proxy", "experts": {"qa": 0.8}},
        "max_tokens": 8,
        "top_k": 5,
        "seed": 1,
    }
    assert (reply.text, reply.finish_reason, reply.model) == ("Oakham.", "stop", "atlas")
    assert reply.fusion == REPORT
    assert reply.usage == USAGE
    assert reply.raw is not None and reply.raw.id == "x-1"


def test_messages_and_plain_base(stub: Any, client: ProxyServe) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    reply = client.chat(messages, n=2)
    assert stub.body == {"model": "atlas", "messages": messages, "n": 2}
    assert [choice.text for choice in reply.choices] == ["Oakham.", "Oakham."]
    assert reply.fusion is None


def test_complete(stub: Any, client: ProxyServe) -> None:
    reply = client.complete([5, 6], fusion=Fusion.proxy(qa=1), ignore_eos=True, stop_token_ids=[2])
    assert stub.body == {
        "model": "atlas",
        "prompt": [5, 6],
        "fusion": {"rule": "proxy", "experts": {"qa": 1}},
        "ignore_eos": True,
        "stop_token_ids": [2],
    }
    assert (reply.text, reply.finish_reason) == (" Oakham.", "length")
    assert reply.fusion == REPORT


def test_what_is_told_of_tokens(stub: Any, client: ProxyServe) -> None:
    reply = client.complete(
        [5, 6],
        echo=True,
        prompt_logprobs=0,
        return_token_ids=True,
        logprob_token_ids=[9],
        metadata={"team": "search"},
        cache_salt="secret",
        priority=3,
    )
    assert stub.body == {
        "model": "atlas",
        "prompt": [5, 6],
        "echo": True,
        "prompt_logprobs": 0,
        "return_token_ids": True,
        "logprob_token_ids": [9],
        "metadata": {"team": "search"},
        "cache_salt": "secret",
        "priority": 3,
    }
    (choice,) = reply.choices
    assert (choice.prompt_token_ids, choice.token_ids, choice.stop_reason) == ((5, 6), (7,), None)
    assert choice.prompt_logprobs == (None, (PromptToken(6, "b", -0.5, None),))
    assert choice.listed_logprobs == ({9: -2.0},)
    plain = client.complete("Hello").choices[0]
    assert (plain.prompt_token_ids, plain.prompt_logprobs, plain.listed_logprobs) == (None, None, None)


def test_scores(stub: Any, client: ProxyServe) -> None:
    scores = client.score(
        "Where?", [" Oakham", (5, 6)], top_logprobs=1, fusion=Fusion.proxy(qa=0.8), priority=2
    )
    assert stub.body == {
        "model": "atlas",
        "prompt": "Where?",
        "continuations": [" Oakham", [5, 6]],
        "logprobs": 1,
        "priority": 2,
        "fusion": {"rule": "proxy", "experts": {"qa": 0.8}},
    }
    assert scores.texts == 2 * (SCORE,)
    assert (scores.labels, scores.usage, scores.fusion) == ((), USAGE, REPORT)
    labels = client.score_labels((1, 2), [7, 8], normalize=True, model="atlas+qa")
    assert stub.body == {"model": "atlas+qa", "prompt": [1, 2], "label_token_ids": [7, 8], "normalize": True}
    assert labels.labels == (LabelScore(7, "x", -1.5, 0.25), LabelScore(8, "x", -1.5, 0.25))
    assert labels.fusion is None
    assert client.score_labels("a", [7]).labels == (LabelScore(7, "x", -1.5),)
    texts = client.score_texts(["Mira was born."])
    assert stub.body == {"model": "atlas", "texts": ["Mira was born."]}
    assert texts.texts == (replace(SCORE, top_logprobs=None),)
    with pytest.raises(TypeError, match="temprature"):
        client.score_texts(["a"], temprature=0.0)


async def test_async_scores(stub: Any, async_client: AsyncProxyServe) -> None:
    assert (await async_client.score("Where?", [" Oakham"], top_logprobs=1)).texts == (SCORE,)
    assert (await async_client.score_labels("Where?", [7])).labels == (LabelScore(7, "x", -1.5),)
    assert (await async_client.score_texts(["a", "b"], timeout=5)).usage == USAGE
    stub.refusal = (400, {"message": "No.", "type": "invalid_request_error", "param": "texts", "code": "why"})
    with pytest.raises(openai.BadRequestError, match=r"No\."):
        await async_client.score_texts(["a"])


@pytest.mark.parametrize("method", ["stream_chat", "stream_complete"])
def test_stream(stub: Any, client: ProxyServe, method: str) -> None:
    stream = getattr(client, method)("Where?", fusion=Fusion.proxy(qa=0.8))
    assert stub.bodies == []  # nothing is sent before it is used
    pieces = list(stream)
    assert stub.body["stream"] is True
    assert stub.body["stream_options"] == {"include_usage": True}
    assert [piece.text for piece in pieces] == ["Oak", "ham", ".", ""]
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "stop"]
    assert stream.reply.text == "Oakham."
    assert stream.reply.finish_reason == "stop"
    assert stream.reply.usage == USAGE
    assert stream.reply.fusion == REPORT


def test_leaving_a_stream_early_ends_the_request(stub: Any, client: ProxyServe) -> None:
    stub.endless = True
    with client.stream_chat("Go on") as stream:
        for _, piece in zip(range(5), stream, strict=False):
            assert piece.finish_reason is None
        assert stream.reply.usage is None
    assert stub.left_early.wait(timeout=10)


def test_default_model_is_the_first_one_listed(stub: Any) -> None:
    with ProxyServe(stub.url) as client:
        assert client.models() == ("atlas", "atlas+qa")
        client.chat("Hello")
        client.complete("Hello", model="atlas+qa")
    assert [body["model"] for body in stub.bodies] == ["atlas", "atlas+qa"]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_url_with_and_without_v1(stub: Any, suffix: str) -> None:
    with ProxyServe(stub.url + suffix) as client:
        assert client.ready()
        assert client.models()[0] == "atlas"


def test_key(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "must-not-leave")
    monkeypatch.delenv("PROXYSERVE_API_KEY", raising=False)
    with ProxyServe(stub.url) as client:
        client.chat("Hello")
    monkeypatch.setenv("PROXYSERVE_API_KEY", "from-environment")
    with ProxyServe(stub.url) as client:
        client.chat("Hello")
    with ProxyServe(stub.url, api_key="given") as client:
        client.chat("Hello")
    assert [headers["authorization"] for headers in stub.headers] == [
        "Bearer no-key",
        "Bearer from-environment",
        "Bearer given",
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
def test_errors_are_those_of_openai(
    stub: Any, client: ProxyServe, status: int, kind: type[openai.APIStatusError]
) -> None:
    error = {"message": "No.", "type": "invalid_request_error", "param": "fusion.experts.qa", "code": "why"}
    stub.refusal = (status, error)
    for call in (client.chat, client.complete, lambda text: list(client.stream_chat(text))):
        with pytest.raises(kind, match="No\\.") as caught:
            call("Hello")
        assert (caught.value.param, caught.value.code) == ("fusion.experts.qa", "why")


def test_what_is_too_much_is_tried_again(stub: Any) -> None:
    stub.refusal = (
        429,
        {"message": "Full.", "type": "rate_limit_error", "param": None, "code": "queue_full"},
    )
    with ProxyServe(stub.url, model="atlas", max_retries=1) as client, pytest.raises(openai.RateLimitError):
        client.chat("Hello", request_id="mine", deadline=5)
    assert len(stub.bodies) == 2
    assert stub.body["timeout"] == 5
    assert {headers["x-request-id"] for headers in stub.headers} == {"mine"}


def test_an_unknown_option_is_refused_here(stub: Any, client: ProxyServe) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.chat("Hello", temprature=0.0)
    assert stub.bodies == []


def test_ready(stub: Any, client: ProxyServe) -> None:
    assert client.ready()
    stub.status = "loading"
    state = client.ready()
    assert not state
    assert state.reason == "The server is loading."
    with pytest.raises(TimeoutError, match=r"is loading\."):
        client.wait_until_ready(timeout=0)
    timer = threading.Timer(0.1, setattr, (stub, "status", "ready"))
    timer.start()
    client.wait_until_ready(timeout=10)
    timer.join()


def test_no_server_is_not_ready() -> None:
    with ProxyServe("http://127.0.0.1:9", timeout=2) as client:
        assert client.ready().reason == "Connection error."


def test_ready_of_something_else_is_an_error(stub: Any) -> None:
    with ProxyServe(f"{stub.url}/elsewhere") as client, pytest.raises(openai.NotFoundError):
        client.ready()


async def test_async_chat_and_complete(stub: Any, async_client: AsyncProxyServe) -> None:
    reply = await async_client.chat("Hello", fusion=Fusion.proxy(qa=0.8), min_p=0.1)
    assert stub.body["min_p"] == 0.1
    assert (reply.text, reply.fusion, reply.usage) == ("Oakham.", REPORT, USAGE)
    assert (await async_client.complete("Hello")).text == " Oakham."


@pytest.mark.parametrize("method", ["stream_chat", "stream_complete"])
async def test_async_stream(stub: Any, async_client: AsyncProxyServe, method: str) -> None:
    stream = getattr(async_client, method)("Where?", fusion=Fusion.proxy(qa=0.8))
    assert [piece.text async for piece in stream] == ["Oak", "ham", ".", ""]
    assert (stream.reply.text, stream.reply.usage, stream.reply.fusion) == ("Oakham.", USAGE, REPORT)


async def test_leaving_an_async_stream_early_ends_the_request(
    stub: Any, async_client: AsyncProxyServe
) -> None:
    stub.endless = True
    async with async_client.stream_chat("Go on") as stream:
        async for _ in stream:
            break
    assert stub.left_early.wait(timeout=10)


async def test_async_errors_models_and_readiness(stub: Any, async_client: AsyncProxyServe) -> None:
    assert await async_client.models() == ("atlas", "atlas+qa")
    assert await async_client.ready()
    stub.status = "draining"
    assert (await async_client.ready()).reason == "The server is draining."
    stub.refusal = (400, {"message": "No.", "type": "invalid_request_error", "param": "n", "code": "x"})
    with pytest.raises(openai.BadRequestError) as caught:
        async for _ in async_client.stream_chat("Hello"):
            pass
    assert caught.value.param == "n"


async def test_async_default_model(stub: Any) -> None:
    async with AsyncProxyServe(stub.url) as client:
        await client.wait_until_ready(timeout=5)
        await client.chat("Hello")
        [piece async for piece in client.stream_chat("Hello")]
    assert [body["model"] for body in stub.bodies] == ["atlas", "atlas"]
