"""Bytes that no client sends and bodies that no schema allows: every one is answered with a refusal or not at all, in
bounded time, and nothing is left behind. The seeds are fixed, so that a run is the same each time."""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from proxyserve.api.schemas.chat import ChatRequest
from proxyserve.api.schemas.completions import CompletionRequest
from proxyserve.api.schemas.other import DetokenizeRequest, TokenizeRequest
from proxyserve.api.schemas.responses_api import ResponsesRequest
from proxyserve.api.schemas.score import ScoreRequest
from proxyserve.config import ChatConfig, EngineConfig, Limits, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve, wait_until

BODY = json.dumps({"model": "atlas", "prompt": "a", "max_tokens": 1}).encode()
JSON = b"Content-Type: application/json\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + JSON
KEPT = HEAD.replace(b"Connection: close\r\n", b"") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY

#: Statuses that no input may bring about; 503 and 504 are documented.
BROKEN = {500, 501, 502, 505}

#: Seconds until the server gives up on a body, and until this test gives up on the server.
BODY_SECONDS, PATIENCE = 1.0, 8.0

#: Reads the tools and shows none of them, so that they fit a tiny context.
TEMPLATE = "{% if tools %}.{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}{{ x }}"

FUZZ = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)


@pytest.fixture(scope="module")
def shared_server(tiny_models: ModelSet) -> Iterator[Live]:
    """One that is quick to give up."""
    engine = AsyncEngine(
        Engine(tiny_models, EngineConfig(max_batch=8, max_batch_tokens=64, kv_memory=4 * 2**20))
    )
    engine.start()
    limits = Limits(max_body_bytes=2**20, header_seconds=BODY_SECONDS, body_seconds=BODY_SECONDS)
    chat = ChatConfig(template=TEMPLATE, tool_parser="hermes")
    with serve(engine, ServerConfig(limits=limits, chat=chat)) as live:
        # Begins the process that compiles grammars, which stays.
        form = {"structured_outputs": {"regex": "a"}}
        assert (
            live.post("/v1/completions", model="atlas", prompt="a", max_tokens=1, **form).status_code == 200
        )
        yield live
    engine.close()


@pytest.fixture
def server(shared_server: Live) -> Iterator[Live]:
    """It must answer as before, and hold no more threads and files than before."""
    assert shared_server.http.get("/health").status_code == 200
    threads, files = threading.active_count(), open_files()
    yield shared_server
    wait_until(lambda: open_files() <= files, seconds=PATIENCE)
    # Starlette's pool keeps its threads; there are at most 40.
    assert threading.active_count() <= max(threads, 60)
    answer = shared_server.post("/v1/completions", model="atlas", prompt="a", max_tokens=1)
    assert answer.status_code == 200
    assert_idle(shared_server.engine)


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


# Bytes -----------------------------------------------------------------------------------------------------------


def exchanged(server: Live, sent: bytes, *, patience: float = PATIENCE) -> bytes:
    """All that comes back until the server hangs up. After `patience` seconds the client does; a server that should
    have hung up long before then fails the test."""
    address = (server.http.base_url.host, server.http.base_url.port or 80)
    received = b""
    with socket.create_connection(address, timeout=patience) as connection:
        # It may hang up before it has read everything, which is its right.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        with suppress(ConnectionResetError, *(() if patience == PATIENCE else (TimeoutError,))):
            while piece := connection.recv(65536):
                received += piece
    return received


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


def check(received: bytes) -> list[int]:
    found = statuses(received)
    assert not BROKEN & set(found), received[:2000]
    return found


ODD: dict[str, tuple[bytes, set[int]]] = {
    "nothing": (b"", set()),  # a connection that says nothing is closed as well
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), {400}),
    "zeros": (b"\x00" * 10_000, {400}),
    "newlines": (b"\r\n" * 10_000, {400, 408}),
    "version 1.0": (b"GET /health HTTP/1.0\r\n\r\n", {200}),
    "version 9": (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", {400, 505}),
    "method": (b"BREW /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {400, 405}),
    "trace": (b"TRACE /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {400, 405}),
    "connect": (
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {400, 404, 405},
    ),
    "absolute target": (
        b"GET http://example.org/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {200, 404},
    ),
    "long path": (
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {400, 404, 414, 431},
    ),
    "long query": (
        b"GET /health?" + b"a=%41&" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {200, 400, 414, 431},
    ),
    "broken escapes": (
        b"GET /v1/models/%zz%ff%00%0d%0a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        {400, 404},
    ),
    "many headers": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + b"X-A: b\r\n" * 5_000 + b"\r\n",
        {400, 431},
    ),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n" + BODY, {400}),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n" + BODY, {400}),
    "huge length": (HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n" + BODY, {400, 413}),
    "length and chunks": (
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        {400},
    ),
    "chunk of no number": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", {400}),
    "huge chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc", {400, 413}),
    "chunks above the limit": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 20,
        {400, 413},
    ),
    "a body that stops": (HEAD + b"Content-Length: 1000\r\n\r\n" + BODY[:10], {408}),
    "headers that stop": (HEAD, {408}),
    "announced above the limit": (HEAD + b"Content-Length: 99999999\r\n\r\n", {413}),
    "two types": (HEAD + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", {400, 415}),
    "expectation": (
        HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
        {100, 200},
    ),
    "upgrade": (
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        {200, 400, 403, 404, 426},
    ),
    "pipeline": (KEPT * 2 + WHOLE, {200}),
    "pipeline of good and bad": (KEPT + b"\x00\x01" + WHOLE, {200, 400}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_bytes(server: Live, name: str) -> None:
    sent, expected = ODD[name]
    found = check(exchanged(server, sent))
    assert set(found) <= expected, found
    assert found or not expected, "no answer"
    if name == "pipeline":
        assert found == [200, 200, 200]


def mangled() -> st.SearchStrategy[bytes]:
    """A request with some of its bytes taken away, doubled or replaced."""

    def change(pieces: list[tuple[int, int, bytes]]) -> bytes:
        sent = WHOLE
        for start, length, put in pieces:
            at = start % len(sent) if sent else 0
            sent = sent[:at] + put + sent[at + length :]
        return sent

    piece = st.tuples(st.integers(0, 10_000), st.integers(0, 20), st.binary(max_size=12))
    return st.lists(piece, min_size=1, max_size=4).map(change)


@seed(1)
@FUZZ
@given(sent=st.one_of(st.binary(max_size=300), mangled()))
def test_random_bytes(server: Live, sent: bytes) -> None:
    check(exchanged(server, sent, patience=0.04))


# Bodies ----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {
            "model": "atlas+qa",
            "prompt": ["a", "bc"],
            "n": 2,
            "echo": True,
            "logprobs": 1,
            "prompt_logprobs": 1,
            "logprob_token_ids": [5],
            "structured_outputs": {"choice": ["yes", "no"]},
            "stream": True,
        },
    ),
    (
        "/v1/completions",
        {
            "model": "atlas",
            "prompt": [1, 2],
            "fusion": {"rule": "dynamic", "experts": {"qa": 1.0}, "explain": 1, "gate": {"confidence": 0.5}},
            "bad_words": ["a"],
            "allowed_token_ids": [5, 6, 7],
            "min_tokens": 1,
            "logit_bias": {"5": 1},
            "stop": ["x"],
            "return_token_ids": True,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "atlas",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "tools": [TOOL],
            "tool_choice": "required",
            "logprobs": True,
            "top_logprobs": 2,
            "parallel_tool_calls": False,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "atlas+qa",
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "s",
                    "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
                },
            },
            "fusion": {"support": {"of": ["base"], "top_p": 0.5}, "target_entropy": 1.0},
            "stream": True,
            "stream_options": {"include_usage": True},
            "priority": 5,
            "metadata": {"a": "b"},
        },
    ),
    (
        "/v1/score",
        {"model": "atlas+qa", "prompt": "a", "label_token_ids": [1, 2], "normalize": True, "timeout": 5},
    ),
    ("/v1/score", {"model": "atlas", "texts": ["ab", [1, 2, 3]], "logprobs": 2}),
    (
        "/v1/completions",
        {"model": "atlas", "prompt": "a", "fusion": {"rule": "formula", "formula": "base + 0.5*qa.tuned"}},
    ),
    (
        "/v1/completions",
        {
            "model": "atlas",
            "prompt": "a",
            "fusion": {
                "rule": "mixture",
                "models": {"base": 0.5, "qa.tuned": 0.5},
                "r": 0,
                "prompts": {"qa.tuned": {"text": "b"}},
            },
        },
    ),
    ("/v1/responses", {"model": "atlas+qa", "input": "a", "max_output_tokens": 2, "stream": True}),
    ("/tokenize", {"model": "atlas+qa", "messages": [{"role": "user", "content": "a"}]}),
    ("/tokenize", {"prompt": "a", "add_special_tokens": False, "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


FIELDS = {
    "/v1/completions": CompletionRequest.model_fields,
    "/v1/chat/completions": ChatRequest.model_fields,
    "/v1/score": ScoreRequest.model_fields,
    "/tokenize": TokenizeRequest.model_fields,
    "/detokenize": DetokenizeRequest.model_fields,
    "/v1/responses": ResponsesRequest.model_fields,
}


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


ODD_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    16,
    1.5,
    -0.0,
    1e-300,
    5e-324,
    1e308,
    2**31 - 1,
    2**63,
    10**40,
    "",
    "a",
    " ",
    "\x00",
    "\u202e\ufeff\u2028",
    "🙂" * 50,
    "atlas",
    "a" * 5000,
    "x: {{ messages }} {% for a in b %}",
    [],
    {},
    [[]],
    [None],
    [0],
    [383, 384],
    [2**31],
    {"": None},
    {"5": 1},
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"type": 5},
    ["a", 1],
    "(((((((((a{1,99}){1,99}){1,99}){1,99}",
    nested(60),
]

#: Values that are good in themselves, so that rare combinations of fields come as far as the engine.
GOOD: dict[str, list[Any]] = {
    "temperature": [0, 5e-324, 1, 100.0],
    "top_p": [5e-324, 0.5, 1],
    "top_k": [1, 2**31 - 1],
    "min_p": [0, 1.0],
    "seed": [0, -1, 2**63],
    "max_tokens": [0, 1, 3],
    "min_tokens": [0, 1, 2, 3],
    "n": [1, 3],
    "best_of": [1, 3],
    "stream": [True],
    "stop": ["a", ["a", "\x00"]],
    "stop_token_ids": [[0], [5, 6]],
    "logprobs": [0, 2, True],
    "top_logprobs": [0, 2],
    "prompt_logprobs": [0, 2],
    "logprob_token_ids": [[0], [383, 5]],
    "echo": [True],
    "bad_words": [["a"], [" "], ["\ufffd", "ab"]],
    "allowed_token_ids": [[0], [5], [5, 6, 383]],
    "logit_bias": [{"0": 100}, {"5": -100, "383": 100}],
    "repetition_penalty": [0.01, 10],
    "presence_penalty": [-2, 2],
    "ignore_eos": [True],
    "skip_special_tokens": [False],
    "return_token_ids": [True],
    "priority": [-1000, 1000],
    "timeout": [1e-9, 5],
    "structured_outputs": [
        {"choice": ["a", "bc"]},
        {"regex": "[ab]{0,3}"},
        {"json": {"type": "integer"}},
        {"grammar": 'start: "a" | "b" start'},
        {"json": False},
    ],
    "fusion": [
        {"experts": {"qa": -4.0, "record": 4}},
        {"rule": "contrast", "experts": {"qa": 1}, "alpha": 1.0, "gamma": 4},
        {"rule": "unlearn", "experts": {"qa": 1}, "alpha": 50},
        {"rule": "guidance", "negative_prompt": [0], "scale": 10},
        {"rule": "formula", "formula": "4*base - 4*qa.tuned"},
        {"rule": "mixture", "models": {"base": 1e-9, "qa.tuned": 1}, "r": "-inf"},
        {"experts": {"qa": 1}, "target_entropy": 1e9},
        {"experts": {"qa": 1}, "support": {"of": ["qa.untuned"], "top_k": 1}},
        {"experts": {"qa": [1]}},
        {"explain": 2, "experts": {"qa": {"weight": 1, "schedule": [[0, 1], [1, 0]]}}},
    ],
    "model": ["atlas", "atlas+qa:-4+record:4", "atlas+qa"],
    "tools": [[TOOL]],
    "tool_choice": ["required", "auto", "none"],
    "response_format": [{"type": "json_object"}, {"type": "text"}],
    "chat_template_kwargs": [{"messages": "a"}, {"tools": "a", "bos_token": 5}, {"x": True}],
    "thinking_budget": [0, 5],
    "continue_final_message": [True],
    "add_generation_prompt": [False],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a body."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good body with further good fields, and at most one odd value."""
    path, body = draw(st.sampled_from(BODIES))
    body = copy.deepcopy(body)
    if "completions" in path:
        body["max_tokens"] = 2
    known = [name for name in GOOD if name in FIELDS[path]]
    for name in draw(st.lists(st.sampled_from(known), max_size=5, unique=True)) if known else ():
        body[name] = copy.deepcopy(draw(st.sampled_from(GOOD[name])))
    if draw(st.booleans()):
        where = draw(st.sampled_from(list(places(body))))
        target: Any = body
        for key in where[:-1]:
            target = target[key]
        target[where[-1]] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 3:
        body["max_tokens"] = 3  # the tests' time, not the server's
    return path, body


@seed(2)
@settings(FUZZ, max_examples=400)
@given(asked=mutations())
def test_mutated_bodies(server: Live, asked: tuple[str, dict[str, Any]]) -> None:
    path, body = asked
    response = server.post(path, **body)
    assert response.status_code in (200, 400, 404, 504), (response.status_code, response.text, body)
    if response.headers["content-type"].startswith("text/event-stream"):
        *_, last = [line for line in response.text.splitlines() if line.startswith("data: ")]
        if path == "/v1/responses":
            assert '"code":"server_error"' not in last, (last, body)
        elif last != "data: [DONE]":
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["type"] in ("invalid_request_error", "timeout_error"), (error, body)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize"]
)
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model": "atlas", "model": "atlas", "prompt": ' + b"[" * 50_000,
        b'{"prompt": "\\ud83d"}',
        b'{"prompt": "' + b"\\u0000" * 1000 + b'\\udc00"}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": 1' + b"0" * 100_000 + b"}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_documents_that_are_none(server: Live, path: str, content: bytes) -> None:
    response = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert len(response.content) < 2000
