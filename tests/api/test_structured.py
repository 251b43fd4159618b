"""Answers of a required form, over HTTP: the official client's helpers, vLLM's fields, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema_rs
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.api.live import Live, wait_until
from tests.tiny import make_tokenizer

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who?"}]
#: White space between the parts of JSON is free, and random models like it too much.
NO_SPACE = {str(make_tokenizer().get_vocab()[space]): -100 for space in "ĠĊĉč"}
CHAT = {"model": "atlas+qa:0.8", "messages": MESSAGES}
TEXT = {"model": "atlas+qa:0.8", "prompt": "Who?"}


class Job(BaseModel):
    title: Annotated[str, Field(max_length=5)]
    since: Annotated[int, Field(ge=1900, le=2030)]


class Person(BaseModel):
    name: Literal["Ada Lovelace", "nobody", "Zwölf 🙂"]
    jobs: Annotated[list[Job], Field(max_length=1)]
    alive: bool | None


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def check(choice: Any) -> Person:
    """The parsed answer; models are random, so that only the grammar can have made it."""
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)
    assert 0.0 < choice.model_extra["grammar"]["mean_removed_mass"] < 1.0
    return choice.message.parsed


def test_parse(client: openai.OpenAI) -> None:
    found = []
    for seed in range(2):
        answer = client.chat.completions.parse(
            model="atlas+qa:0.8",
            messages=MESSAGES,
            response_format=Person,
            temperature=1.0 + 0.3 * seed,
            seed=seed,
            n=2,
            max_tokens=200,
            logit_bias=NO_SPACE,
        )
        found += [check(choice) for choice in answer.choices]
    assert len({person.model_dump_json() for person in found}) > 1


async def test_parse_async_and_streamed(live: Live) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:

        async def whole(seed: int) -> str:
            answer = await client.chat.completions.parse(
                model="atlas+qa", messages=MESSAGES, response_format=Person, seed=seed, logit_bias=NO_SPACE
            )
            return check(answer.choices[0]).model_dump_json()

        async def streamed(seed: int) -> str:
            async with client.chat.completions.stream(
                model="atlas+qa", messages=MESSAGES, response_format=Person, seed=seed, logit_bias=NO_SPACE
            ) as stream:
                async for _ in stream:
                    pass
                choice = (await stream.get_final_completion()).choices[0]
            assert isinstance(choice.message.parsed, Person)
            return choice.message.parsed.model_dump_json()

        wholes = await asyncio.gather(*map(whole, range(3)))
        assert await asyncio.gather(*map(streamed, range(3))) == wholes


def test_fields_that_leave_no_token(live: Live) -> None:
    """The request's own fault: a 400 while nothing is sent, however late it shows, and the same body in a stream."""
    letter = make_tokenizer().get_vocab()["a"]
    asked = {**TEXT, "structured_outputs": {"regex": "ab"}}
    at_once = live.post("/v1/completions", **asked, allowed_token_ids=[letter + 4])
    assert at_once.status_code == 400, at_once.text
    assert at_once.json()["error"]["param"] == "allowed_token_ids"
    later = live.post("/v1/completions", **asked, allowed_token_ids=[letter])
    assert later.status_code == 400 and "allowed_token_ids" in later.json()["error"]["message"]
    assert {answer.json()["error"]["code"] for answer in (at_once, later)} == {"no_token_left"}
    streamed = live.post("/v1/completions", **asked, allowed_token_ids=[letter], stream=True)
    *_, last = streamed.text.split("data: ")
    assert json.loads(last)["error"] == later.json()["error"]
    infinite = {**TEXT, "model": "atlas", "fusion": {"rule": "formula", "formula": "1e38*base + qa"}}
    answer = live.post("/v1/completions", **infinite)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_token_left"


def test_report_comes_once_in_a_stream(live: Live) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        asked = {**body, "structured_outputs": {"choice": ["quick", "brown fox"]}, "temperature": 0}
        whole = live.post(path, **asked).json()["choices"][0]
        chunks = [choice for event in live.stream(path, **asked) for choice in event["choices"]]
        reports = [chunk["grammar"] for chunk in chunks if "grammar" in chunk]
        assert reports == [whole["grammar"]]
        assert "grammar" in chunks[-1]
        free = live.post(path, **body, max_tokens=2).json()["choices"][0]
        assert "grammar" not in free


def test_json_object(live: Live) -> None:
    """Any object; where room runs out, the beginning of one."""
    id_of = make_tokenizer().get_vocab()
    ended = 0
    for seed in range(3):
        choice = live.post(
            "/v1/chat/completions",
            **CHAT,
            response_format={"type": "json_object"},
            logit_bias={**NO_SPACE, **{id_of[mark]: 6.0 for mark in '{}":'}},
            seed=seed,
            max_tokens=100,
        ).json()["choices"][0]
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
            ended += 1
    assert ended


LARK = 'start: "name: " WORD ", " YEAR\nWORD: /[A-Z][a-z]{1,6}/\nYEAR: /[0-9]{4}/'
FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"json": SCHEMA}, lambda text: jsonschema_rs.is_valid(SCHEMA, json.loads(text))),
    ({"regex": "[a-c]{2,4}-(日本|🙂)"}, lambda text: re.fullmatch("[a-c]{2,4}-(日本|🙂)", text)),
    ({"choice": ["The quick", "The", "Zwölf"]}, lambda text: text in ("The quick", "The", "Zwölf")),
    ({"grammar": LARK}, lambda text: re.fullmatch("name: [A-Z][a-z]{1,6}, [0-9]{4}", text)),
    (
        {"structural_tag": {"structures": [{"begin": "Q", "schema": SCHEMA, "end": "!"}], "triggers": ["Q"]}},
        lambda text: all(re.match(r'\s*\{[^{}]*\}\s*!', part) for part in text.split("Q")[1:-1]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "valid"), FORMS, ids=[next(iter(form)) for form, _ in FORMS])
def test_each_form_on_both_routes(live: Live, form: dict[str, Any], valid: Any) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        asked = {**body, "structured_outputs": form, "max_tokens": 60, "n": 2, "seed": 7, "temperature": 1.3}
        asked["logit_bias"] = {**NO_SPACE, make_tokenizer().get_vocab()["Q"]: 4.0}
        response = live.post(path, **asked)
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            text = choice.get("text", choice.get("message", {}).get("content"))
            assert valid(text), text
            assert choice["finish_reason"] == "stop" or "structural_tag" in form


def test_form_of_logprobs_is_the_free_law(live: Live) -> None:
    """What the grammar rules out still has its probability in `logprobs`."""
    asked = {**TEXT, "temperature": 0, "max_tokens": 1, "logprobs": 3}
    free = live.post("/v1/completions", **asked).json()["choices"][0]
    bound = live.post("/v1/completions", **asked, structured_outputs={"regex": "[0-9]+"}).json()["choices"][0]
    assert bound["logprobs"]["top_logprobs"][0].items() >= free["logprobs"]["top_logprobs"][0].items()
    assert bound["text"].isdigit() and not free["text"].isdigit()
    assert bound["finish_reason"] == "length"


def named(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


def structured(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


def tagged(trigger: str, *begins: str) -> dict[str, Any]:
    structures = [{"begin": begin, "schema": {}, "end": "."} for begin in begins]
    return structured(structural_tag={"structures": structures, "triggers": [trigger]})


_FORMAT = "response_format.json_schema"
_OUTPUTS = "structured_outputs"
REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (CHAT, {"response_format": {"type": "xml"}}, "response_format", ""),
    (CHAT, {"response_format": {}}, "response_format", ""),
    (CHAT, {"response_format": {"type": "json_schema"}}, _FORMAT, "required"),
    (CHAT, named(name="x"), f"{_FORMAT}.schema", "required"),
    (CHAT, named(name="a b", schema={}), f"{_FORMAT}.name", ""),
    (CHAT, named(name="x", schema={"not": {}}), f"{_FORMAT}.schema", "'not'"),
    (CHAT, named(name="x", schema={"items": {"$ref": "http://h/s"}}), f"{_FORMAT}.schema", "fetched"),
    (CHAT, {**named(name="x", schema={}), **structured(regex="a")}, _OUTPUTS, "both"),
    (TEXT, {"response_format": {"type": "json_object"}}, "response_format", "no field"),
    (TEXT, structured(), _OUTPUTS, "exactly one"),
    (TEXT, structured(regex="a", choice=["b"]), _OUTPUTS, "exactly one"),
    (TEXT, structured(guidance="a"), f"{_OUTPUTS}.guidance", ""),
    (TEXT, structured(json="{}"), f"{_OUTPUTS}.json", ""),
    (TEXT, structured(regex="(a"), f"{_OUTPUTS}.regex", "unclosed"),
    (TEXT, structured(choice=["a", ""]), f"{_OUTPUTS}.choice[1]", ""),
    (TEXT, structured(grammar='root ::= "a"'), f"{_OUTPUTS}.grammar", "GBNF"),
    (TEXT, structured(grammar="start: b"), f"{_OUTPUTS}.grammar", '"b"'),
    (TEXT, tagged("a"), f"{_OUTPUTS}.structural_tag.structures", ""),
    (TEXT, tagged("c", "a"), f"{_OUTPUTS}.structural_tag", "exactly one"),
    (TEXT, {**structured(regex="a"), "ignore_eos": True}, "ignore_eos", "end"),
]


@pytest.mark.parametrize(("body", "fields", "param", "words"), REFUSALS, ids=str)
def test_refusals(live: Live, body: dict[str, Any], fields: dict[str, Any], param: str, words: str) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    response = live.post(path, **body, max_tokens=3, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_hostile_bodies_are_no_500(live: Live) -> None:
    """As they come over the wire: surrogates, NULs, depth, size."""
    bodies = [
        '{"regex": "\\ud800"}',
        '{"regex": "a\\u0000b"}',
        '{"grammar": "start: \\u0000"}',
        '{"choice": ["\\ufffe"]}',
        '{"json": ' + '{"items":' * 5000 + "{}" + "}" * 5001 + "}",
        '{"json": ' + '{"items":' * 90 + "{}" + "}" * 90 + "}",
        '{"json": {"minimum": 1e999}}',
        '{"json": {"maxLength": 99999999999999999999999, "type": "string"}}',
        '{"json": {"type": "object", "properties": {'
        + ",".join(f'"p{i}": {{}}' for i in range(6000))
        + "}}}",
        '{"json": {"enum": [' + "1," * 6000 + "1]}}",
    ]
    for body in bodies:
        document = f'{{"model": "atlas", "prompt": "x", "max_tokens": 1, "structured_outputs": {body}}}'
        response = live.http.post(
            "/v1/completions", content=document, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (200, 400), (body[:60], response.text)


def test_a_killed_helper_is_no_outage(live: Live) -> None:
    gatekeeper = live.server._state.grammars.gatekeeper
    for number in range(2):
        response = live.post("/v1/completions", **TEXT, structured_outputs={"regex": f"x{number}"})
        assert response.json()["choices"][0]["text"] == f"x{number}"
        helper = gatekeeper.pid
        assert helper is not None
        os.kill(helper, signal.SIGKILL)
        wait_until(lambda: gatekeeper.pid is None)


def test_metrics_count_grammars(live: Live) -> None:
    for _ in range(2):
        live.post("/v1/completions", **TEXT, max_tokens=2, structured_outputs={"regex": "counted"})
    live.post("/v1/completions", **TEXT, structured_outputs={"regex": "(counted"})
    text = live.http.get("/metrics").text
    for outcome in ("compiled", "cached", "refused"):
        assert re.search(rf'grammar_compilations_total{{outcome="{outcome}"}} [1-9]', text), text[:3000]
