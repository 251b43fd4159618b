"""Drafts change what an answer costs and nothing else: the demo family behind two servers, one that never drafts and
one that always does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from proxyserve.config import ChatConfig, EngineConfig, ServerConfig, Speculate
from proxyserve.demo.family import family_paths
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve
from tests.text import chat_templates

PAGE = "Page: Kronur\n"
QUESTION = "Task: Where was Kronur born?\nReply:"
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Kronur", "Kustin"]},
        "pets": {"type": "array", "items": {"enum": ["goose", "wolf"]}, "minItems": 1, "maxItems": 3},
        "years": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "pets", "years"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
#: White space between the parts of JSON is free, and these models like it too much.
_IDS = json.loads((family_paths().base / "tokenizer.json").read_text())["model"]["vocab"]
NO_SPACE = {"logit_bias": {str(_IDS[space]): -100 for space in "ĠĊĉč" if space in _IDS}}
ASKS = [{"role": "user", "content": "Kronur"}]


@pytest.fixture(scope="module")
def family() -> ModelSet:
    paths = family_paths()
    experts = [ExpertSource(name, paths.experts[name], paths.untuned) for name in ("record", "qa", "bio")]
    return load_family(paths.base, experts, base_name="atlas")


def served(models: ModelSet, speculate: Speculate) -> Iterator[Live]:
    engine = AsyncEngine(
        Engine(models, EngineConfig(kv_memory=32 * 2**20, dtype="float32", speculate=speculate))
    )
    engine.start()
    chat = ChatConfig(template=chat_templates.HERMES, tool_parser="hermes")
    with serve(engine, ServerConfig(chat=chat)) as live:
        yield live
        assert_idle(engine)
    engine.close()


@pytest.fixture(scope="module")
def plain(family: ModelSet) -> Iterator[Live]:
    yield from served(family, "off")


@pytest.fixture(scope="module")
def drafting(family: ModelSet) -> Iterator[Live]:
    yield from served(family, 3)


BODIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {"model": "atlas+record", "prompt": PAGE, "temperature": 0, "logprobs": 2}),
    "sampled": (COMPLETIONS, {"model": "atlas+bio:0.8", "prompt": "Text: Kronur\n", "seed": 5, "n": 3, "top_p": 0.9}),
    "penalised": (
        COMPLETIONS,
        {
            "model": "atlas+bio",
            "prompt": "Text: Kronur\n",
            "seed": 3,
            "frequency_penalty": 0.7,
            "repetition_penalty": 1.2,
            "bad_words": ["goose"],
            "min_tokens": 30,
        },
    ),
    "stop string": (COMPLETIONS, {"model": "atlas+record", "prompt": PAGE, "temperature": 0, "stop": ["pet: go", "x"]}),
    "two experts": (COMPLETIONS, {"model": "atlas+qa:0.5+record:0.5", "prompt": [PAGE, QUESTION], "seed": 1}),
    "explained": (
        COMPLETIONS,
        {"model": "atlas", "fusion": {"experts": {"bio": 1}, "explain": 2}, "prompt": "Text: Kronur\n", "seed": 8},
    ),
    "schema": (
        COMPLETIONS,
        {"model": "atlas+record", "prompt": PAGE, "seed": 2, "structured_outputs": {"json": SCHEMA}, **NO_SPACE},
    ),
    "schema, chat": (
        CHAT,
        {
            "model": "atlas+record",
            "messages": ASKS,
            "seed": 4,
            "n": 2,
            **NO_SPACE,
            "response_format": {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}},
        },
    ),
    "forced tool": (
        CHAT,
        {"model": "atlas+record", "messages": ASKS, "seed": 6, "tools": [TOOL], "tool_choice": "required"},
    ),
    "one tool at most": (
        CHAT,
        {"model": "atlas+record", "messages": ASKS, "seed": 7, "tools": [TOOL], "parallel_tool_calls": False},
    ),
    "responses": (
        RESPONSES,
        {
            "model": "atlas+record",
            "input": "Kronur",
            "temperature": 0,
            "text": {"format": {"type": "json_schema", "name": "one", "schema": SCHEMA}},
        },
    ),
}  # fmt: skip


def ask(live: Live, name: str, **more: Any) -> dict[str, Any]:
    path, body = BODIES[name]
    longest = "max_output_tokens" if path == RESPONSES else "max_tokens"
    response = live.post(path, **{longest: 60, **body, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


#: Which differ from answer to answer, or say what it cost; `fusion` is looked at by itself.
_OTHERS = frozenset({"id", "created", "created_at", "call_id", "item_id", "usage", "fusion"})


def check_alike(got: Any, expected: Any) -> None:
    """Numbers to what the floats of forwards of different shapes agree on."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected.keys() - _OTHERS:
            check_alike(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            check_alike(one, other)
    else:
        assert got == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", BODIES)
def test_the_answer_is_the_same(plain: Live, drafting: Live, name: str) -> None:
    expected, got = ask(plain, name), ask(drafting, name)
    check_alike(got, expected)
    assert 0 < got["fusion"]["accepted"] <= got["fusion"]["drafted"]
    check_alike(
        {**expected["fusion"], **{key: got["fusion"][key] for key in ("drafted", "accepted")}}, got["fusion"]
    )
    for key in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"):
        assert got["usage"].get(key) == expected["usage"].get(key)
    if "schema" in name:
        for choice in got["choices"]:
            assert json.loads(choice["text"] if "text" in choice else choice["message"]["content"])


def test_streams_have_a_token_for_each_draft(plain: Live, drafting: Live) -> None:
    """Tokens that come together are told one by one, and the last chunk says what was drafted."""
    path, body = BODIES["greedy"]
    chunks = [live.stream(path, **body, max_tokens=40) for live in (plain, drafting)]
    texts = [[choice["text"] for chunk in found for choice in chunk["choices"]] for found in chunks]
    assert "".join(texts[0]) == "".join(texts[1])
    assert chunks[1][-1]["fusion"]["accepted"] > 0


def test_counters_add_up(drafting: Live) -> None:
    before = drafting.engine.snapshot()
    answer = ask(drafting, "greedy")
    after = drafting.engine.snapshot()

    def grown(counts: str) -> int:
        return int(getattr(after, counts)["record.tuned"] - getattr(before, counts).get("record.tuned", 0))

    fusion, tokens = answer["fusion"], answer["usage"]["completion_tokens"]
    assert grown("draft_tokens") == fusion["drafted"] <= 3 * grown("drafts")
    assert grown("accepted_tokens") == fusion["accepted"]
    # Each step gives a token, and the drafts that stood before it.
    assert after.steps - before.steps == tokens - fusion["accepted"] < tokens / 2


def test_the_plain_base_finds_drafts_in_its_text(plain: Live, drafting: Live) -> None:
    line = "pet: goose\n"
    body = {
        "model": "atlas",
        "prompt": PAGE + line * 2,
        "structured_outputs": {"regex": f"({line})+"},
        "max_tokens": 24,
    }
    before = drafting.engine.snapshot().accepted_tokens.get("lookup", 0)
    expected, got = (live.post(COMPLETIONS, **body, seed=1).json() for live in (plain, drafting))
    check_alike(got, expected)
    assert line in got["choices"][0]["text"] and "fusion" not in got
    assert drafting.engine.snapshot().accepted_tokens["lookup"] > before
