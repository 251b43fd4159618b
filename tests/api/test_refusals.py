"""Nothing is ignored and nothing is a 500: every bad or unsupported request is refused, naming the field."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from proxyserve.api.schemas.chat import ChatRequest
from proxyserve.api.schemas.completions import CompletionRequest
from tests.api.live import Live

CHAT = {"model": "atlas+qa", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"model": "atlas+qa", "prompt": "Hi", "max_tokens": 2}
BASE = {"model": "atlas", "prompt": "Hi", "max_tokens": 2}
PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


def send(live: Live, body: dict[str, Any]) -> Any:
    return live.post(PATHS["messages" if "messages" in body else "prompt"], **body)


def refusal(live: Live, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    response = send(live, body)
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


UNSUPPORTED = [
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "function_call", "auto"),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "audio", {"voice": "x"}),
    (CHAT, "prediction", {"type": "content", "content": "x"}),
    (CHAT, "store", True),
    (CHAT, "verbosity", "low"),
    (CHAT, "web_search_options", {}),
    (CHAT, "service_tier", "flex"),
    (CHAT, "moderation", {}),
    (CHAT, "prompt_cache_options", {}),
    (CHAT, "prompt_cache_retention", "24h"),
    (TEXT, "suffix", "end"),
]


@pytest.mark.parametrize(("body", "field", "value"), UNSUPPORTED, ids=str)
def test_unsupported_field_is_named(live: Live, body: dict[str, Any], field: str, value: Any) -> None:
    error = refusal(live, {**body, field: value})
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"
    assert "not supported yet" in error["message"]


@pytest.mark.parametrize(
    ("body", "extra"),
    [
        (CHAT, {"tools": None, "tool_choice": None, "functions": [], "function_call": None}),
        (CHAT, {"response_format": {"type": "text"}, "store": False, "modalities": ["text"]}),
        (
            CHAT,
            {"metadata": {}, "service_tier": "auto", "parallel_tool_calls": None, "stream_options": None},
        ),
        (
            CHAT,
            {"temperature": None, "stop": None, "n": None, "logit_bias": None, "stream": None, "user": None},
        ),
        (CHAT, {"top_logprobs": 0, "logprobs": False, "seed": None, "fusion": None}),
        (TEXT, {"echo": False, "suffix": None, "best_of": 1, "logprobs": None, "stop": []}),
        (TEXT, {"fusion": {"support": None, "explain": 0, "on_expert_failure": "fail", "rule": "proxy"}}),
    ],
    ids=str,
)
def test_values_that_ask_for_nothing_are_accepted(
    live: Live, body: dict[str, Any], extra: dict[str, Any]
) -> None:
    assert send(live, {**body, **extra}).status_code == 200


@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "completions"])
def test_unknown_field_is_named(live: Live, body: dict[str, Any]) -> None:
    error = refusal(live, {**body, "temprature": 1})
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


FUSION_REFUSALS = [
    ({"support": {"of": ["base"]}}, "fusion.support", "top_p"),
    ({"support": {"of": [], "top_k": 3}}, "fusion.support.of", ""),
    ({"support": {"of": ["tuned"], "top_k": 3}}, "fusion.support.of", "no expert"),
    ({"support": {"of": ["base"], "top_k": 0}}, "fusion.support.top_k", ""),
    ({"support": {"of": ["base"], "top_k": 3, "outside": "zero"}}, "fusion.support.outside", ""),
    ({"support": {"of": ["base"], "topk": 3}}, "fusion.support.topk", ""),
    ({"explain": -1}, "fusion.explain", ""),
    ({"explain": 21}, "fusion.explain", "at most 20"),
    ({"on_expert_failure": "base_only"}, "fusion.on_expert_failure", "not supported yet"),
    ({"target_entropy": -1.0}, "fusion.target_entropy", ""),
    ({"gate": {"confidence": 1.5}}, "fusion.gate.confidence", ""),
    ({"gate": {}}, "fusion.gate.confidence", "required"),
    ({"beta": 1}, "fusion.beta", "belongs to rule upscale"),
    ({"temprature": 1}, "fusion.temprature", "no parameter"),
    ({"rule": "dynamite"}, "fusion.rule", "the rules are"),
    ({"rule": 7}, "fusion.rule", ""),
    ({"rule": "upscale", "experts": {"qa": 1}, "gamma": 1}, "fusion.gamma", "belongs to rule contrast"),
    ({"rule": "upscale", "experts": {"qa": 1}, "beta": 11}, "fusion.beta", ""),
    ({"rule": "upscale", "experts": {"qa": 1}, "top_p": 0}, "fusion.top_p", "above 0"),
    ({"rule": "upscale", "experts": {"qa": 0.5}}, "fusion.experts.qa", "beta"),
    ({"rule": "upscale", "experts": {"qa": 1, "record": 1}}, "fusion.experts", "exactly one"),
    ({"rule": "upscale"}, "fusion.experts", "exactly one"),
    ({"rule": "dynamic"}, "fusion.experts", "at least one"),
    ({"rule": "dynamic", "experts": {"qa": 2}}, "fusion.experts.qa", "solves the weight"),
    ({"rule": "dynamic", "experts": {"qa": 1}, "kl": 1}, "fusion.kl", "budget"),
    ({"rule": "dynamic", "experts": {"qa": 1}, "mode": "budget"}, "fusion.kl", "needs 'kl'"),
    ({"rule": "dynamic", "experts": {"qa": 1}, "mode": "fast"}, "fusion.mode", ""),
    ({"rule": "dynamic", "experts": {"qa": 1}, "max_weight": 5}, "fusion.max_weight", "allows 4"),
    ({"rule": "dynamic", "experts": {"qa": 1, "record": 1}, "mode": "exact"}, "fusion.mode", "ray"),
    ({"rule": "guidance"}, "fusion.negative_prompt", "negative_messages"),
    ({"rule": "guidance", "negative_prompt": 5}, "fusion.negative_prompt", "token ids"),
    ({"rule": "guidance", "negative_prompt": "a", "experts": {"qa": 1}}, "fusion.experts", "no parameter"),
    ({"rule": "mixture", "models": {"base": 0.5}}, "fusion.models", "sum to 1"),
    ({"rule": "mixture", "models": {"base": 2, "qa.tuned": -1}}, "fusion.models.qa.tuned", "0 or more"),
    ({"rule": "mixture", "models": {"base": 1}, "r": "big"}, "fusion.r", "inf"),
    ({"rule": "mixture", "models": {"base": 1}, "r": 101}, "fusion.r", "between"),
    ({"rule": "mixture", "models": {"base": 1}, "r": 1e-5}, "fusion.r", "0.01"),
    ({"rule": "formula", "formula": "base + * qa"}, "fusion.formula", "character 8"),
    ({"rule": "formula", "formula": "base + 9*qa"}, "fusion.formula", "-4 to 4"),
    ({"rule": "formula", "formula": "base - base"}, "fusion.formula", ""),
    ({"rule": "formula"}, "fusion.formula", ""),
    ({"rule": "edit", "experts": {"qa": 1}}, "fusion.experts.qa", "calibrat"),
    (
        {"rule": "contrast", "experts": {"qa": 1}, "support": {"of": ["base"], "top_k": 3}},
        "fusion.support",
        "of its own",
    ),
    ({"experts": {"qa": {"weight": 1, "schedule": [[1, 1]]}}}, "fusion.experts.qa.schedule", "token 0"),
    ({"experts": {"qa": {"weight": 1, "schedule": [[0, 9]]}}}, "fusion.experts.qa", "-4 to 4"),
    ({"experts": [{"expert": "qa", "schedule": []}]}, "fusion.experts[0].schedule", "list of"),
    ({"experts": "qa"}, "fusion.experts", ""),
    ({"experts": {"qa": "1"}}, "fusion.experts.qa", "number"),
    ({"experts": {"qa": True}}, "fusion.experts.qa", "number"),
    ({"experts": {"qa": None}}, "fusion.experts.qa", "number"),
    ({"experts": {"qa": [1]}}, "fusion.experts.qa", "number"),
    ({"experts": {"qa": {"weight": "1"}}}, "fusion.experts.qa.weight", "number"),
    ({"experts": {"qa": {"weight": False}}}, "fusion.experts.qa.weight", "number"),
    ({"experts": {"qa": 4.5}}, "fusion.experts.qa", "-4 to 4"),
    ({"experts": {"qa": -1e300}}, "fusion.experts.qa", "-4 to 4"),
    ({"experts": {"qa": 10**400}}, "fusion.experts.qa", "too large"),
    ({"experts": ["qa"]}, "fusion.experts[0]", ""),
    ({"experts": [{"weight": 1}]}, "fusion.experts[0].expert", ""),
    ({"experts": [{"expert": 5}]}, "fusion.experts[0].expert", ""),
    ({"rule": "r" * 65}, "fusion.rule", ""),
    ({"experts": [{"expert": ""}]}, "fusion.experts", "empty"),
    ({"experts": [{"expert": "qa"}, {"expert": "qa"}]}, "fusion.experts", "twice"),
    ({"prompts": {"base": "chat"}}, "fusion.prompts.base", "this request has none"),
    ({"prompts": {"base": {}}}, "fusion.prompts", "exactly one"),
    ({"prompts": {"base": {"text": "a", "prefix": "b"}}}, "fusion.prompts", "exactly one"),
    ({"prompts": {"qa.tuned": {"text": "a"}}}, "fusion.prompts.qa.tuned", "no lane"),
    ([], "fusion", ""),
    ("proxy", "fusion", ""),
]


@pytest.mark.parametrize(("fusion", "param", "words"), FUSION_REFUSALS, ids=str)
def test_fusion_refusals(live: Live, fusion: Any, param: str, words: str) -> None:
    error = refusal(live, {**BASE, "fusion": fusion})
    assert error["param"] == param
    assert words in error["message"]


def test_too_many_experts(live: Live) -> None:
    names = {"qa": 1, **{f"x{number}": 1 for number in range(9)}}
    assert refusal(live, {**BASE, "fusion": {"experts": names}}, 404)["param"] == "fusion.experts.x0"


def test_experts_in_two_places(live: Live) -> None:
    error = refusal(live, {**TEXT, "fusion": {"experts": {"record": 1}}})
    assert error["param"] == "fusion.experts"
    assert "'model'" in error["message"]
    assert "'fusion.experts'" in error["message"]


def test_prompt_route_of_a_lane_that_does_not_run(live: Live) -> None:
    error = refusal(live, {**CHAT, "fusion": {"prompts": {"record.tuned": "chat"}}})
    assert error["param"] == "fusion.prompts.record.tuned"
    error = refusal(live, {**CHAT, "fusion": {"prompts": {"base": "raw"}}})
    assert error["param"] == "fusion.prompts.base.route"


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("gpt-5", 404),
        ("atlas+nope", 404),
        ("atlas+qa:x", 400),
        ("atlas+qa:nan", 400),
        ("atlas+qa:\n0.5", 400),
        ("atlas+qa:1_0", 400),
        ("atlas+qa:inf", 400),
        ("atlas+qa:\u0663", 400),
        ("atlas+qa:1e9", 400),
        ("", 400),
    ],
)
def test_bad_model_names(live: Live, model: str, status: int) -> None:
    error = refusal(live, {**TEXT, "model": model}, status)
    if status == 404:
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_unknown_expert_in_fusion(live: Live) -> None:
    assert refusal(live, {**BASE, "fusion": {"experts": {"x" * 9999: 1}}}, 404)["param"] == "fusion.experts"
    support = {"of": ["ghost.tuned"], "top_k": 3}
    assert refusal(live, {**BASE, "fusion": {"support": support}}, 404)["param"] == "fusion.support.of"
    error = refusal(live, {**BASE, "fusion": {"experts": {"ghost": 1}}}, 404)
    assert error["param"] == "fusion.experts.ghost"
    assert "qa" not in error["message"]  # a key may not know it


VALUES: list[tuple[dict[str, Any], str, Any, str]] = [
    (TEXT, "temperature", -0.1, "temperature"),
    (TEXT, "temperature", "hot", "temperature"),
    (TEXT, "temperature", True, "temperature"),
    (TEXT, "temperature", 10**400, "temperature"),
    (TEXT, "top_p", 0, "top_p"),
    (TEXT, "top_p", 1.1, "top_p"),
    (TEXT, "top_k", -1, "top_k"),
    (TEXT, "top_k", 1.5, "top_k"),
    (TEXT, "top_k", 10**30, "top_k"),
    (TEXT, "min_p", 2, "min_p"),
    (TEXT, "seed", 2**64, "seed"),
    (TEXT, "seed", 1.0, "seed"),
    (TEXT, "presence_penalty", 2.1, "presence_penalty"),
    (TEXT, "frequency_penalty", -2.1, "frequency_penalty"),
    (TEXT, "repetition_penalty", 0, "repetition_penalty"),
    (TEXT, "repetition_penalty", 1e-300, "repetition_penalty"),
    (TEXT, "max_tokens", 0, "max_tokens"),
    (TEXT, "max_tokens", -1, "max_tokens"),
    (CHAT, "max_tokens", 0, "max_tokens"),
    (TEXT, "metadata", {"a": 1}, "metadata.a"),
    (TEXT, "metadata", {"": "b"}, "metadata"),
    (TEXT, "metadata", {"k" * 65: "b"}, "metadata"),
    (TEXT, "metadata", {"a": "v" * 513}, "metadata.a"),
    (CHAT, "metadata", {str(number): "v" for number in range(17)}, "metadata"),
    (TEXT, "safety_identifier", "u" * 513, "safety_identifier"),
    (TEXT, "prompt_cache_key", 5, "prompt_cache_key"),
    (TEXT, "cache_salt", "", "cache_salt"),
    (TEXT, "cache_salt", "s" * 1025, "cache_salt"),
    (TEXT, "priority", 1001, "priority"),
    (TEXT, "priority", 0.5, "priority"),
    (TEXT, "timeout", 0, "timeout"),
    (TEXT, "timeout", "soon", "timeout"),
    (TEXT, "echo", 1, "echo"),
    (TEXT, "best_of", True, "best_of"),
    (TEXT, "min_tokens", -1, "min_tokens"),
    (TEXT, "min_tokens", 3, "min_tokens"),
    (TEXT, "skip_special_tokens", "no", "skip_special_tokens"),
    (TEXT, "return_token_ids", 1, "return_token_ids"),
    (TEXT, "prompt_logprobs", True, "prompt_logprobs"),
    (TEXT, "bad_words", "x", "bad_words"),
    (TEXT, "allowed_token_ids", [-1], "allowed_token_ids[0]"),
    (TEXT, "logprob_token_ids", ["5"], "logprob_token_ids[0]"),
    (TEXT, "max_tokens", 10**30, "max_tokens"),
    (TEXT, "max_tokens", 100_000, "max_tokens"),
    (TEXT, "n", 0, "n"),
    (TEXT, "n", 17, "n"),
    (TEXT, "n", 2**31, "n"),
    (TEXT, "stop", "", "stop"),
    (TEXT, "stop", 5, "stop"),
    (TEXT, "stop", ["a", 5], "stop[1]"),
    (TEXT, "stop", ["a"] * 17, "stop"),
    (TEXT, "stop", "a" * 201, "stop"),
    (TEXT, "stop_token_ids", [-1], "stop_token_ids[0]"),
    (TEXT, "stop_token_ids", [383_000], "stop_token_ids"),
    (TEXT, "stop_token_ids", list(range(17)), "stop_token_ids"),
    (TEXT, "ignore_eos", "yes", "ignore_eos"),
    (TEXT, "logit_bias", {"x": 1}, "logit_bias"),
    (TEXT, "logit_bias", {"5": 1, "05": 2}, "logit_bias"),
    (TEXT, "logit_bias", {"5": 101}, "logit_bias[5]"),
    (TEXT, "logit_bias", {"5": "1"}, "logit_bias[5]"),
    (TEXT, "logit_bias", {"99999": 1}, "logit_bias.99999"),
    (TEXT, "logit_bias", {str(token): 1 for token in range(1025)}, "logit_bias"),
    (TEXT, "logit_bias", [1], "logit_bias"),
    (TEXT, "logprobs", -1, "logprobs"),
    (TEXT, "return_tokens_as_token_ids", True, "return_tokens_as_token_ids"),
    (TEXT, "return_tokens_as_token_ids", 1, "return_tokens_as_token_ids"),
    (TEXT, "logprobs", 21, "logprobs"),
    (TEXT, "logprobs", True, "logprobs"),
    (TEXT, "stream", "true", "stream"),
    (TEXT, "stream_options", {"include_usage": True}, "stream_options"),
    (TEXT, "stream_options", {"include_obfuscation": True}, "stream_options.include_obfuscation"),
    (TEXT, "user", 5, "user"),
    (TEXT, "user", "u" * 513, "user"),
    (TEXT, "model", "m" * 513, "model"),
    (TEXT, "model", None, "model"),
    (TEXT, "prompt", "", "prompt"),
    (TEXT, "prompt", [], "prompt"),
    (TEXT, "prompt", [[]], "prompt"),
    (TEXT, "prompt", [""], "prompt"),
    (TEXT, "prompt", ["a", 1], "prompt"),
    (TEXT, "prompt", [1, [1]], "prompt"),
    (TEXT, "prompt", [True], "prompt"),
    (TEXT, "prompt", [1.0], "prompt"),
    (TEXT, "prompt", [-1], "prompt"),
    (TEXT, "prompt", [10**30], "prompt"),
    (TEXT, "prompt", [100_000], "prompt"),
    (TEXT, "prompt", None, "prompt"),
    (TEXT, "prompt", {"text": "a"}, "prompt"),
    (TEXT, "prompt", "word " * 2000, "prompt"),
    (TEXT, "prompt", ["a"] * 257, "prompt"),
    (CHAT, "messages", [], "messages"),
    (CHAT, "messages", "hi", "messages"),
    (CHAT, "messages", [{"role": "user"}], "messages[0].content"),
    (CHAT, "messages", [{"role": "critic", "content": "x"}], "messages[0].role"),
    (CHAT, "tools", [{}], "tools[0].type"),
    (CHAT, "tool_choice", "auto", "tool_choice"),
    (CHAT, "tool_choice", "none", "tool_choice"),
    (CHAT, "parallel_tool_calls", "yes", "parallel_tool_calls"),
    (CHAT, "parallel_tool_calls", False, "parallel_tool_calls"),
    (CHAT, "reasoning_effort", "high", "reasoning_effort"),
    (CHAT, "thinking_budget", 1.5, "thinking_budget"),
    (CHAT, "chat_template_kwargs", [], "chat_template_kwargs"),
    (CHAT, "add_generation_prompt", "no", "add_generation_prompt"),
    (CHAT, "continue_final_message", True, "continue_final_message"),
    (CHAT, "messages", [{"role": "user", "content": None}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": 5}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": ["x"]}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": [{"type": None, "text": "a"}]}], "messages[0].content"),
    (CHAT, "messages", [{"role": "user", "content": "a", "name": ""}], "messages[0].name"),
    (
        CHAT,
        "messages",
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        "messages[0].tool_calls[0].id",
    ),
    (CHAT, "messages", [{"role": "user", "content": "word " * 2000}], "messages"),
    (CHAT, "logprobs", 3, "logprobs"),
    (CHAT, "top_logprobs", 3, "top_logprobs"),
    (CHAT | {"logprobs": True}, "top_logprobs", 21, "top_logprobs"),
    (CHAT, "max_completion_tokens", 5, "max_completion_tokens"),
    (CHAT | {"max_tokens": None}, "max_completion_tokens", 100_000, "max_completion_tokens"),
    (CHAT, "response_format", {"type": "xml"}, "response_format"),
    (CHAT, "response_format", {"type": "json_schema"}, "response_format.json_schema"),
    (TEXT, "structured_outputs", {}, "structured_outputs"),
    (TEXT, "structured_outputs", {"regex": "a", "choice": ["a"]}, "structured_outputs"),
    (TEXT, "structured_outputs", {"regex": 1}, "structured_outputs.regex"),
]


@pytest.mark.parametrize(("body", "field", "value", "param"), VALUES, ids=lambda value: str(value)[:40])
def test_bad_values(live: Live, body: dict[str, Any], field: str, value: Any, param: str) -> None:
    assert refusal(live, {**body, field: value})["param"] == param


@pytest.mark.parametrize(
    ("body", "field"), [(CHAT, "messages"), (CHAT, "model"), (TEXT, "prompt"), (TEXT, "model")]
)
def test_required_fields(live: Live, body: dict[str, Any], field: str) -> None:
    response = live.post(
        PATHS["messages" if body is CHAT else "prompt"], **{k: v for k, v in body.items() if k != field}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"{'model': 'atlas'}",
        b'{"model": "atlas", "prompt": "a", "temperature": NaN}',
        b'{"model": "atlas", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "atlas", "prompt": "a", "temperature": 1e999}',
        b'{"model": "atlas", "prompt": "a", "fusion": {"experts": {"qa": 1e999}}}',
        b'{"model": "atlas", "prompt": "\\ud800"}',
        b'{"model": "atlas", "prompt": "\xff"}',
        b'{"model": "atlas", "prompt": ' + b"[" * 100_000,
        b'{"model": "atlas", "prompt": "a", "seed": ' + b"1" * 10_000 + b"}",
        b"\x00" * 1000,
        json.dumps({"x" * 1_000_000: 1}).encode(),
    ],
    ids=lambda content: repr(content[:50]),
)
@pytest.mark.parametrize("path", [*PATHS.values(), "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(live: Live, path: str, content: bytes) -> None:
    response = live.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert len(response.json()["error"]["message"]) < 1000
    if b"NaN" in content or b"Infinity" in content:
        assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_body_must_be_announced_as_json(live: Live, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = live.http.post(PATHS["prompt"], content=json.dumps(TEXT).encode(), headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_route_and_method_errors_have_the_same_shape(live: Live) -> None:
    assert live.http.get("/v2/nothing").json()["error"]["code"] == "route_not_found"
    response = live.http.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_random_mutations_are_never_a_500(live: Live) -> None:
    """Puts odd values at random places of valid requests."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1.5,
        10**40,
        -1e308,
        "",
        "a",
        "\u0000",
        [],
        {},
        [[]],
        [None],
        {"": None},
    ]
    chance = random.Random(7)
    plain = [
        CHAT | {"logprobs": True, "fusion": {"prompts": {}}},
        CHAT
        | {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto",
        },
        TEXT | {"logit_bias": {"1": 1}, "stop": ["x"]},
        TEXT | {"fusion": {"rule": "dynamic", "mode": "budget", "kl": 0.1, "explain": 1}},
        BASE | {"fusion": {"rule": "mixture", "models": {"base": 0.5, "qa.tuned": 0.5}, "r": 0}},
        BASE | {"fusion": {"rule": "guidance", "negative_prompt": "no", "scale": 2}},
        BASE | {"fusion": {"rule": "formula", "formula": "base + qa", "gate": {"confidence": 0.5}}},
        BASE | {"fusion": {"experts": {"qa": 1}, "support": {"of": ["base"], "top_p": 0.5}}},
    ]
    for _ in range(300):
        body = json.loads(json.dumps(chance.choice(plain)))
        fields = [*ChatRequest.model_fields, *CompletionRequest.model_fields]
        for _ in range(chance.randint(1, 2)):
            where: Any = body
            key: Any = chance.choice([*where, chance.choice(fields)])
            while (
                isinstance(where.get(key) if isinstance(where, dict) else None, dict)
                and chance.random() < 0.5
            ):
                where = where[key]
                key = chance.choice([*where, "weight"])
            where[key] = chance.choice(odd)
        body["max_tokens"] = 1
        response = send(live, body)
        assert response.status_code in (200, 400, 404), (response.status_code, response.text, body)
