"""Chat completions, whole and streamed, on tiny models."""

from __future__ import annotations

from typing import Any

import pytest

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, serve

USER = [{"role": "user", "content": "Who was born where?"}]
CHAT = "/v1/chat/completions"


def ask(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post(
        CHAT, **{"model": "atlas+qa", "messages": USER, "max_tokens": 8, "temperature": 0, **body}
    )
    assert response.status_code == 200, response.text
    return response.json()


def test_answer_has_openai_shape(live: Live) -> None:
    answer = ask(live)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "atlas+qa"
    [choice] = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert set(usage["lane_tokens"]) == {"atlas", "qa.tuned", "small"}
    assert (
        answer["fusion"].items() >= {"rule": "proxy", "sum_of_weights": 1.0, "generations": {"qa": 1}}.items()
    )
    assert answer["fusion"]["mean_kl"] > 0


def test_plain_base_has_no_fusion(live: Live) -> None:
    body = {"model": "atlas", "fusion": {"prompts": {"base": "plain"}}}
    answer = ask(live, **body)
    assert "fusion" not in answer
    assert set(answer["usage"]["lane_tokens"]) == {"atlas"}


def test_base_without_template_says_so(live: Live) -> None:
    response = live.post(CHAT, model="atlas", messages=USER)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_stream_joins_to_the_whole_answer(live: Live) -> None:
    body = {"model": "atlas+qa:0.7", "messages": USER, "max_tokens": 12, "seed": 3, "n": 3, "logprobs": True}
    whole = ask(live, **{**body, "temperature": 1})
    chunks = live.stream(CHAT, **body, temperature=1)
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert all("role" not in part["delta"] for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        streamed = [entry for part in parts for entry in part["logprobs"]["content"]]
        assert streamed == choice["logprobs"]["content"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert ["fusion" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["fusion"] == whole["fusion"]


def test_stream_usage_comes_last_and_alone(live: Live) -> None:
    body = {"model": "atlas+qa", "messages": USER, "max_tokens": 4}
    chunks = live.stream(CHAT, **body, stream_options={"include_usage": True})
    *others, last = chunks
    assert all(chunk["usage"] is None and chunk["choices"] and "fusion" not in chunk for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["fusion"]["rule"] == "proxy"


def test_logprobs(live: Live, tiny_models: ModelSet) -> None:
    answer = ask(live, logprobs=True, top_logprobs=3)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 8
    for entry in entries:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        top = entry["top_logprobs"]
        assert len(top) == 3
        assert [item["logprob"] for item in top] == sorted((item["logprob"] for item in top), reverse=True)
        # Greedy without bias: the chosen token is the likeliest, by the very same float.
        assert (top[0]["token"], top[0]["logprob"]) == (entry["token"], entry["logprob"])


def test_logprobs_without_top(live: Live) -> None:
    answer = ask(live, logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])


def test_default_length_is_what_is_left(live: Live) -> None:
    body = {"model": "atlas+qa", "messages": USER, "ignore_eos": True, "temperature": 0}
    answer = live.post(CHAT, **body).json()
    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


def test_default_length_is_what_memory_holds(tiny_models: ModelSet) -> None:
    """Three lanes of the experts' shape have room; a fourth, a model on a prompt of its own, shares it with them."""
    engine = AsyncEngine(Engine(tiny_models, EngineConfig(kv_memory=2**18)))
    pool = min(arena.tokens for arena in engine.engine.residents.arenas.values())
    assert pool < 256
    engine.start()
    body = {"model": "atlas+qa+record", "messages": USER, "ignore_eos": True}
    with serve(engine) as live:
        alone = live.post(CHAT, **body)
        shared = live.post(CHAT, **body, fusion={"prompts": {"qa.untuned": "plain"}})
    engine.close()
    assert alone.json()["usage"]["total_tokens"] == pool
    assert 0 < shared.json()["usage"]["completion_tokens"] <= pool * 3 // 4


def test_max_completion_tokens_is_max_tokens(live: Live) -> None:
    answer = ask(live, max_tokens=None, max_completion_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


def test_text_parts_are_joined(live: Live) -> None:
    parts = [{"type": "text", "text": "Who was"}, {"type": "text", "text": "born where?"}]
    joined = ask(live, messages=[{"role": "user", "content": "Who was\nborn where?"}])
    assert ask(live, messages=[{"role": "user", "content": parts}])["choices"] == joined["choices"]


def test_developer_is_system(live: Live) -> None:
    answers = [
        ask(live, messages=[{"role": role, "content": "Be brief."}, *USER])["choices"]
        for role in ("developer", "system", "assistant")
    ]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_assistant_message_can_be_sent_back(live: Live) -> None:
    message = ask(live)["choices"][0]["message"]
    again = ask(live, messages=[*USER, message, {"role": "user", "content": "And then?"}])
    assert again["usage"]["prompt_tokens"] > 0


def test_routes_give_lanes_different_prompts(live: Live) -> None:
    plain = ask(live, fusion={"prompts": {"base": "plain", "qa.untuned": "plain"}})
    chat = ask(live)
    assert plain["usage"]["prompt_tokens"] < chat["usage"]["prompt_tokens"]
    assert plain["choices"] != chat["choices"]


@pytest.mark.parametrize("model", ["atlas+qa:0.5", "atlas"])
def test_three_ways_to_name_experts_agree(live: Live, model: str) -> None:
    body = {"messages": USER, "max_tokens": 16, "temperature": 0}
    ways: list[Any] = [{"qa": 0.5}, {"qa": {"weight": 0.5}}, [{"expert": "qa", "weight": 0.5}]]
    named = ask(live, **body, model="atlas+qa:0.5")["choices"]
    for experts in ways:
        assert ask(live, **body, model="atlas", fusion={"experts": experts})["choices"] == named
    assert ask(live, **body, model="atlas", fusion={"experts": {"qa": 2}})["choices"] != named
