"""The Python client against a real server with a base and at least one expert, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest

from proxyserve_client import AsyncProxyServe, Fusion, FusionReport, ProxyServe

PROMPT = "Question: Where was Mira born?\nAnswer:"


@pytest.fixture(scope="module")
def client(live_url: str) -> Iterator[ProxyServe]:
    with ProxyServe(live_url) as client:
        yield client


@pytest.fixture(scope="module")
def base(client: ProxyServe) -> str:
    return client.models()[0]


@pytest.fixture(scope="module")
def experts(client: ProxyServe, base: str) -> list[str]:
    return [name.removeprefix(f"{base}+") for name in client.models()[1:]]


@pytest.fixture(scope="module")
def expert(experts: list[str]) -> str:
    return experts[0]


@pytest.fixture(scope="module")
def chatting_expert(client: ProxyServe, experts: list[str]) -> str:
    """An expert with a chat template."""
    for expert in experts:
        try:
            client.chat("Hello", fusion=Fusion.proxy({expert: 1.0}), max_tokens=1)
        except openai.BadRequestError as error:
            assert error.param == "messages", error
            continue
        return expert
    pytest.fail(f"no chat with any of {experts}")


def assert_same(one: FusionReport | None, other: FusionReport | None) -> None:
    """The same up to rounding: a prompt that comes from the prefix cache is computed in other chunks. How much was
    drafted goes by the clock."""
    assert one is not None and other is not None
    assert replace(one, mean_kl=0.0, more={}) == replace(other, mean_kl=0.0, more={})
    assert one.mean_kl == pytest.approx(other.mean_kl, abs=1e-4)


def test_plain_base(client: ProxyServe, base: str) -> None:
    reply = client.complete(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
    assert reply.model == base
    assert reply.fusion is None
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8
    assert set(reply.usage.lane_tokens) == {base}
    assert reply.finish_reason == "length"


def test_fused_answer_reports_what_fusion_did(client: ProxyServe, base: str, expert: str) -> None:
    reply = client.complete(
        PROMPT, fusion=Fusion.proxy({expert: 1.0}), max_tokens=8, temperature=0, ignore_eos=True
    )
    assert reply.fusion is not None
    assert reply.fusion.rule == "proxy"
    assert reply.fusion.generations == {expert: 1}
    assert reply.fusion.sum_of_weights == 1.0
    assert reply.fusion.mean_kl >= 0
    assert 0 <= reply.fusion.flips <= 8
    assert reply.usage is not None
    assert {base, f"{expert}.tuned"} <= set(reply.usage.lane_tokens)


def test_model_name_and_fusion_object_are_the_same_request(
    client: ProxyServe, base: str, experts: list[str]
) -> None:
    fusion = Fusion.proxy({expert: 0.5 + 0.25 * i for i, expert in enumerate(experts[:2])})
    by_object = client.complete(PROMPT, fusion=fusion, max_tokens=12, seed=7)
    by_name = client.complete(PROMPT, model=fusion.model_name(base), max_tokens=12, seed=7)
    assert by_name.text == by_object.text
    assert_same(by_name.fusion, by_object.fusion)


def test_weight_zero_is_the_base(client: ProxyServe, base: str, expert: str) -> None:
    plain = client.complete(PROMPT, max_tokens=12, temperature=0)
    zero = client.complete(PROMPT, fusion=Fusion.proxy({expert: 0.0}), max_tokens=12, temperature=0)
    assert zero.text == plain.text
    assert zero.usage is not None
    assert set(zero.usage.lane_tokens) == {base}


def test_chat_whole_streamed_and_async_agree(client: ProxyServe, chatting_expert: str) -> None:
    fusion = Fusion.proxy({chatting_expert: 1.0})
    whole = client.chat("Where was Mira born?", fusion=fusion, max_tokens=24, temperature=0)
    with client.stream_chat("Where was Mira born?", fusion=fusion, max_tokens=24, temperature=0) as stream:
        text = "".join(piece.text for piece in stream)
    assert text == whole.text == stream.reply.text
    assert stream.reply.finish_reason == whole.finish_reason
    assert_same(stream.reply.fusion, whole.fusion)
    assert stream.reply.usage is not None and whole.usage is not None
    assert stream.reply.usage.completion_tokens == whole.usage.completion_tokens


def test_completion_streamed(client: ProxyServe, expert: str) -> None:
    options = {"fusion": Fusion.proxy({expert: 1.0}), "max_tokens": 12, "temperature": 0}
    stream = client.stream_complete(PROMPT, **options)
    assert "".join(piece.text for piece in stream) == client.complete(PROMPT, **options).text


def test_several_choices(client: ProxyServe, expert: str) -> None:
    reply = client.complete(
        PROMPT, fusion=Fusion.proxy({expert: 1.0}), n=3, max_tokens=4, seed=1, ignore_eos=True, logprobs=2
    )
    assert len(reply.choices) == 3
    assert reply.raw is not None
    for choice in reply.raw.choices:
        assert choice.logprobs is not None


def test_scores_are_those_of_the_echo(client: ProxyServe, expert: str) -> None:
    fusion = Fusion.proxy({expert: 1.0})
    (score,) = client.score(PROMPT, [" Oakham."], fusion=fusion).texts
    choice = client.complete(
        PROMPT + " Oakham.",
        fusion=fusion,
        echo=True,
        logprobs=0,
        max_tokens=0,
        prompt_logprobs=0,
        temperature=0,
    )
    assert choice.text == PROMPT + " Oakham."
    places = choice.choices[0].prompt_logprobs
    assert places is not None and places[0] is None
    last = [place[0].logprob for place in places[-score.num_tokens :] if place is not None]
    assert list(score.token_logprobs) == pytest.approx(last, abs=1e-4)
    (whole,) = client.score_texts([PROMPT + " Oakham."], fusion=fusion).texts
    assert list(whole.token_logprobs[-score.num_tokens :]) == pytest.approx(last, abs=1e-4)
    labels = client.score_labels(PROMPT, [score.token_ids[0]], fusion=fusion, normalize=True).labels
    assert labels[0].logprob == pytest.approx(last[0], abs=1e-4)
    assert labels[0].probability == pytest.approx(1.0)


def test_leaving_a_stream_leaves_the_server_serving(client: ProxyServe) -> None:
    with client.stream_complete(PROMPT, max_tokens=64, ignore_eos=True) as stream:
        next(stream)
    assert client.complete(PROMPT, max_tokens=1).usage is not None


def test_errors_name_the_field(client: ProxyServe, expert: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.complete(PROMPT, fusion=Fusion.proxy({"nobody": 1.0}))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as heavy:
        client.complete(PROMPT, fusion=Fusion.proxy({expert: 99.0}))
    assert heavy.value.param == f"fusion.experts.{expert}"
    with pytest.raises(openai.BadRequestError) as empty:
        client.complete("")
    assert empty.value.param == "prompt"


async def test_async_client(live_url: str, base: str, expert: str) -> None:
    fusion = Fusion.proxy({expert: 1.0})
    async with AsyncProxyServe(live_url) as client:
        assert await client.ready()
        assert (await client.models())[0] == base
        whole = await client.complete(PROMPT, fusion=fusion, max_tokens=12, temperature=0)
        stream = client.stream_complete(PROMPT, fusion=fusion, max_tokens=12, temperature=0)
        assert "".join([piece.text async for piece in stream]) == whole.text
        assert_same(stream.reply.fusion, whole.fusion)
