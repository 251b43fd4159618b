"""The official `openai` package, unmodified, against a live server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from proxyserve.config import EngineConfig, Limits, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve, wait_until

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Who was born where?"},
]
FUSION = {"fusion": {"experts": {"qa": 0.8, "record": {"weight": 0.2}}}}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def async_client(live: Live) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="atlas+qa:0.8+record:0.2",
        messages=MESSAGES,
        max_completion_tokens=8,
        temperature=0.9,
        seed=4,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stop=["\x00"],
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.role == "assistant" for choice in answer.choices)
    first = answer.choices[0]
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    joined = b"".join(bytes(entry.bytes or ()) for entry in first.logprobs.content)
    if first.finish_reason == "length":
        assert joined.decode(errors="replace") == first.message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.model_extra is not None
    assert answer.model_extra["fusion"]["generations"] == {"qa": 1, "record": 1}
    named = client.chat.completions.create(
        model="atlas", messages=MESSAGES, max_tokens=8, temperature=0.9, seed=4, n=2, extra_body=FUSION
    )
    assert [choice.message.content for choice in named.choices] == [c.message.content for c in answer.choices]


def test_chat_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="atlas+qa", messages=MESSAGES, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model="atlas+qa",
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None  # what was cached depends on what ran before
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="atlas+qa", messages=MESSAGES, max_tokens=12, temperature=0)
    text = whole.choices[0].message.content or ""
    with client.chat.completions.stream(
        model="atlas+qa",
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        n=2,
        stop=[text[-2:]],
        logprobs=True,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    before_stop = text[: text.index(text[-2:])]
    assert sorted("".join(deltas)) == sorted(2 * before_stop)
    assert [choice.index for choice in final.choices] == [0, 1]
    assert {choice.message.content for choice in final.choices} == {before_stop}
    assert final.choices[0].logprobs is not None


def test_completions(client: openai.OpenAI) -> None:
    prompts = ["The quick", "name:"]
    answer = client.completions.create(
        model="atlas+qa", prompt=prompts, n=2, seed=1, max_tokens=6, logprobs=2, logit_bias={"0": -100}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 6
    stream = client.completions.create(
        model="atlas+qa", prompt=prompts, n=2, seed=1, max_tokens=6, stream=True, logit_bias={"0": -100}
    )
    texts = ["", "", "", ""]
    for chunk in stream:
        for part in chunk.choices:
            texts[part.index] += part.text
    assert texts == [choice.text for choice in answer.choices]


def test_completions_of_token_ids(client: openai.OpenAI) -> None:
    ids = client.post("/../tokenize", body={"prompt": "The quick"}, cast_to=object)
    assert isinstance(ids, dict)
    prompts: list[Any] = ["The quick", ids["tokens"], [ids["tokens"]]]
    answers = [
        client.completions.create(model="atlas", prompt=prompt, max_tokens=6, temperature=0)
        for prompt in prompts
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1


def test_echo_and_prompt_logprobs(client: openai.OpenAI) -> None:
    echoed = client.completions.create(
        model="atlas+qa",
        prompt=["The quick", "name: Ada"],
        echo=True,
        logprobs=1,
        max_tokens=2,
        temperature=0,
        extra_body={"prompt_logprobs": 1, "return_token_ids": True, "ignore_eos": True},
    )
    for choice, prompt in zip(echoed.choices, ("The quick", "name: Ada"), strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.model_extra is not None
        ids = [*choice.model_extra["prompt_token_ids"], *choice.model_extra["token_ids"]]
        assert len(choice.logprobs.token_logprobs) == len(ids)
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.model_extra["prompt_logprobs"]) == len(ids) - 2
    stream = client.completions.create(
        model="atlas+qa", prompt="The quick", echo=True, max_tokens=2, temperature=0, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text
    assert chunks[0].choices[0].text.startswith("The quick")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["atlas", "atlas+qa", "atlas+record"]
    for name in ("atlas", "atlas+qa", "atlas+qa:0.5+record:-1"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("atlas+ghost")


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="Hi")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="atlas+qa", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as fused:
        client.chat.completions.create(
            model="atlas", messages=MESSAGES, stream=True, extra_body={"fusion": {"experts": {"qa": "x"}}}
        )
    assert fused.value.param == "fusion.experts.qa"


def test_keys_and_full_queue(tiny_models: ModelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("sk-right\n")
    engine = AsyncEngine(
        Engine(tiny_models, EngineConfig(kv_memory=4 * 2**20)), Limits(max_waiting_requests=1)
    )
    engine.start()
    with closing(engine), serve(engine, ServerConfig(api_key_file=key_file)) as live:
        url = f"{live.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="sk-wrong") as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            wrong.models.list()
        with openai.OpenAI(base_url=url, api_key="sk-right", max_retries=0) as right:
            assert right.completions.create(model="atlas", prompt="Hi", max_tokens=1).choices
            with pytest.raises(openai.BadRequestError, match="never more than 1 may wait"):
                right.completions.create(model="atlas", prompt="Hi", max_tokens=1, n=2)
            going_on, step = threading.Event(), engine.engine.step
            monkeypatch.setattr(engine.engine, "step", lambda: (going_on.wait(20), step())[1])
            with ThreadPoolExecutor() as pool:
                first = pool.submit(right.completions.create, model="atlas", prompt="Hi", max_tokens=1)
                wait_until(lambda: engine.snapshot().waiting_tokens > 0)
                with pytest.raises(openai.RateLimitError) as full:
                    right.completions.create(model="atlas", prompt="Hi", max_tokens=1)
                going_on.set()
                assert first.result().choices
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_leaving_a_stream(client: openai.OpenAI, live: Live) -> None:
    stream = client.completions.create(
        model="atlas+qa", prompt="Hi", n=8, max_tokens=240, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_until(lambda: live.engine.snapshot().running > 0)
    stream.close()
    assert_idle(live.engine)


async def test_async(async_client: openai.AsyncOpenAI) -> None:
    async with async_client as client:

        async def whole(seed: int) -> str:
            answer = await client.chat.completions.create(
                model="atlas+qa", messages=MESSAGES, max_tokens=10, seed=seed
            )
            return answer.choices[0].message.content or ""

        async def streamed(seed: int) -> str:
            stream = await client.chat.completions.create(
                model="atlas+qa", messages=MESSAGES, max_tokens=10, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        seeds = range(6)
        wholes = await asyncio.gather(*map(whole, seeds))
        assert await asyncio.gather(*map(streamed, seeds)) == wholes
        assert len(set(wholes)) > 1
