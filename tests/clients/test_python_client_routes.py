"""The Python client beyond plain answers, against a live server: rules, explanations, forms and tools, tokens,
cancelling, deadlines, loads that are followed. And its README."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from proxyserve_client import (
    AsyncProxyServe,
    ChatOptions,
    CompletionOptions,
    Contribution,
    ExpertGeneration,
    Fusion,
    ProxyServe,
    ScoreOptions,
)

README = (Path(__file__).parents[2] / "clients/python/README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
#: What each of them prints, among other things.
PRINTED = ("harp", "qa 0.", "(' harp',) -0.4", "finish_reason='stop'", "warming", "harp", "request_cancelled")

QUESTION = "Which instrument does Kustin play?"
PROMPT = f"Task: {QUESTION}\nReply:"
PLAY = {
    "type": "object",
    "properties": {"instrument": {"enum": ["harp", "flute"]}},
    "required": ["instrument"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(live_url: str) -> Iterator[ProxyServe]:
    with ProxyServe(live_url, model="atlas") as client:
        yield client


@pytest.mark.parametrize(
    "fusion",
    [
        Fusion.proxy(qa=1.0).with_parameters(
            support={"of": ["base", "tuned"], "min_p": 0.02}, gate={"confidence": 0.99}
        ),
        Fusion.upscale("qa", beta=1.5, top_p=0.95),
        Fusion.dynamic("qa", match="forward"),
        Fusion.dynamic({"qa": 1.0, "bio": 0.5}, max_weight=1.5),
        Fusion.dynamic("qa", mode="budget", kl=0.5),
        Fusion.contrast("qa", gamma=0.5),
        Fusion.unlearn("qa", alpha=2.0),
        Fusion.guidance("I do not know", scale=2.0),
        Fusion.guidance([1, 2, 3]),
        Fusion.mixture({"base": 0.5, "qa.tuned": 0.5}, r="-inf"),
        Fusion.arm(qa=0.5),
        Fusion.formula("base + 0.5*(qa.tuned - small)"),
    ],
    ids=lambda fusion: fusion.rule,
)
def test_every_rule(client: ProxyServe, fusion: Fusion) -> None:
    reply = client.complete(PROMPT, fusion=fusion, max_tokens=2)
    assert reply.fusion is not None and reply.fusion.rule == fusion.rule


def test_rule_edit_lacks_a_calibration_only(client: ProxyServe) -> None:
    with pytest.raises(openai.BadRequestError, match="has no calibration"):
        client.complete(PROMPT, fusion=Fusion.edit("qa", budget=0.02))


async def test_explanations_whole_streamed_and_async(client: ProxyServe, live_url: str) -> None:
    fusion = Fusion.proxy(qa=1.0, bio=0.25).with_parameters(explain=2)
    reply = client.chat(QUESTION, fusion=fusion, temperature=0, max_tokens=24)
    whole = reply.choices[0].explain
    assert whole is not None and reply.usage is not None and len(whole) == reply.usage.completion_tokens
    first = whole[0]
    assert {"base", "qa.tuned", "qa.untuned", "bio.tuned"} <= set(first.lanes)
    assert [len(law.top) for law in (first.fused, first.lanes["base"])] == [2, 2]
    assert first.contributions == tuple(
        Contribution(name, {"qa": 1.0, "bio": 0.25}[name], first.push[name])
        for name in sorted(first.push, key=lambda name: -abs(first.push[name]))
    )
    stream = client.stream_chat(QUESTION, fusion=fusion, temperature=0, max_tokens=24)
    assert [(token.token_id, token.flip) for token in stream.tokens()] == [
        (token.token_id, token.flip) for token in whole
    ]
    assert stream.reply.text == reply.text
    gathered = stream.reply.choices[0].explain
    assert gathered is not None and len(gathered) == len(whole)
    async with AsyncProxyServe(live_url, model="atlas") as other:
        tokens = other.stream_chat(QUESTION, fusion=fusion, temperature=0, max_tokens=24).tokens()
        assert [token.token async for token in tokens] == [token.token for token in whole]
    scored = client.complete(PROMPT, fusion=fusion, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert scored.prompt_explain is not None and scored.prompt_explain[0] is None


def test_forms_and_tools(client: ProxyServe) -> None:
    asked = {"model": "atlas+qa", "temperature": 0, "max_tokens": 99}
    form = {"type": "json_schema", "json_schema": {"name": "play", "strict": True, "schema": PLAY}}
    assert json.loads(client.chat(QUESTION, response_format=form, **asked).text)["instrument"] == "harp"
    chosen = client.chat(QUESTION, structured_outputs={"choice": ["flute", "drum"]}, **asked)
    assert chosen.text in ("flute", "drum")
    tools = [{"type": "function", "function": {"name": "play", "parameters": PLAY}}]
    forced = {**asked, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    (whole,) = client.chat(QUESTION, **forced).choices
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.tool_calls
    assert call.name == "play" and json.loads(call.arguments)["instrument"] in ("harp", "flute")
    stream = client.stream_chat(QUESTION, **forced)
    deltas = [call for piece in stream for call in piece.raw.choices[0].delta.tool_calls or ()]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.arguments
    (streamed,) = stream.reply.choices[0].tool_calls
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments) and streamed.id
    turns = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": "play", "arguments": call.arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "It sounds well."},
    ]
    assert client.chat(turns, model="atlas+qa", max_tokens=4).finish_reason


async def test_tokens_and_load(client: ProxyServe, live_url: str) -> None:
    tokens = client.tokenize(" harp", add_special_tokens=False, names=True)
    assert tokens.names == (" harp",) and client.detokenize(tokens.ids) == " harp"
    conversation = client.tokenize([{"role": "user", "content": QUESTION}], model="atlas+qa")
    assert QUESTION in client.detokenize(conversation.ids) and conversation.names is None
    info = client.tokenizer_info()
    assert info.max_model_len == tokens.max_model_len and info.vocab_size > max(tokens.ids)
    assert 0 <= client.load().kv_use <= 1
    async with AsyncProxyServe(live_url) as other:
        assert await other.tokenize(" harp", add_special_tokens=False, names=True) == tokens
        assert await other.detokenize(tokens.ids) == " harp"
        assert await other.tokenizer_info() == info
        assert (await other.load()).waiting == 0


async def test_cancelling(client: ProxyServe, live_url: str) -> None:
    # Enough work that it is not over before anybody can end it.
    busy = Fusion.proxy(qa=1.0, bio=0.5, record=0.5, guard=0.5)
    endless = {"max_tokens": 200, "ignore_eos": True, "n": 16, "fusion": busy}
    stream = client.stream_complete(PROMPT, **endless)
    next(stream)
    assert client.cancel(stream.id) == 1
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "request_cancelled"
    async with AsyncProxyServe(live_url, model="atlas") as other:
        named = other.stream_complete(PROMPT, request_id="mine-17", **endless)
        cancelled = 0
        with pytest.raises(openai.APIError) as ended:
            async for _ in named:
                cancelled = cancelled or await other.cancel("mine-17")
        assert (ended.value.code, cancelled) == ("request_cancelled", 1)
        with pytest.raises(openai.NotFoundError):
            await other.cancel("mine-17")
    with pytest.raises(ValueError, match="cannot be the id"):
        client.cancel("..")


def test_deadlines(live_url: str) -> None:
    with ProxyServe(live_url, model="atlas", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.complete(PROMPT, max_tokens=200, ignore_eos=True, deadline=0.001)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.InternalServerError):
            client.score(PROMPT, [" harp"], deadline=0.001, request_id="late")


def test_a_load_is_followed(client: ProxyServe) -> None:
    client.experts.put("followed", "experts/qa", "small", wait=False)
    seen: list[ExpertGeneration] = list(client.experts.follow("followed", every=0.01))
    assert seen[-1].phase == "published"
    assert client.experts.get("followed").generation == seen[-1].generation
    client.experts.delete("followed")
    with pytest.raises(openai.NotFoundError):
        next(client.experts.follow("followed"))


def test_options_are_those_of_the_server(openapi: bytes) -> None:
    """What a request may have, the client has; what the server refuses, it does not offer."""
    schemas = json.loads(openapi)["components"]["schemas"]
    own = {"timeout", "deadline", "request_id"}  # how it is sent; `deadline` is the server's `timeout`
    methods = {"model", "fusion", "messages", "prompt", "stream", "stream_options", "timeout"}
    methods |= {"continuations", "label_token_ids", "texts", "normalize"}
    for schema, options in (("ChatRequest", ChatOptions), ("CompletionRequest", CompletionOptions)):
        offered = options.__annotations__.keys() - own
        assert offered == _served(schemas[schema]) - methods - {"best_of"}, schema
    assert ScoreOptions.__annotations__.keys() - own == _served(schemas["ScoreRequest"]) - methods - {
        "logprobs"
    }


def _served(schema: dict) -> set[str]:
    return {
        name
        for name, value in schema["properties"].items()
        if "not supported" not in value.get("description", "").lower()
    }


@pytest.mark.parametrize("number", range(len(PRINTED)))
async def test_readme(live_url: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == len(PRINTED)
    source = EXAMPLES[number].replace("http://127.0.0.1:8000", live_url)
    running = eval(compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {})
    if running is not None:
        await running
    assert PRINTED[number] in capsys.readouterr().out
