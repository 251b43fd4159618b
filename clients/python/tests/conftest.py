"""A small server on a thread that answers with the shapes that proxyserve answers with, and remembers what it got."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
    "lane_tokens": {"atlas": 6, "qa.tuned": 10, "small": 10},
}
FUSION = {
    "rule": "proxy",
    "sum_of_weights": 1.0,
    "generations": {"qa": 2},
    "mean_kl": 0.25,
    "flips": 1,
    "drafted": 0,
}
EXPERT = {
    "object": "expert",
    "name": "qa",
    "state": "published",
    "generation": 2,
    "previous": 1,
    "protected": False,
    "last_error": None,
    "generations": [
        {"generation": 2, "phase": "published", "seconds": {"loading": 0.5}},
        {"generation": 1, "phase": "standby", "seconds": {}},
    ],
}
HEAD = {"id": "x-1", "created": 1, "model": "atlas", "system_fingerprint": "proxyserve"}


class Stub:
    """What the server got, and what it is to answer."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = "ready"
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.endless = False
        self.left_early = threading.Event()

    @property
    def body(self) -> dict[str, Any]:
        """The last request's body."""
        return self.bodies[-1]


def make_app(stub: Stub) -> FastAPI:
    app = FastAPI()

    @app.get("/ready")
    async def ready() -> Response:
        if stub.status == "ready":
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": stub.status, "reason": f"The server is {stub.status}."}, 503)

    @app.get("/v1/models")
    async def models() -> Response:
        data = [
            {"id": name, "object": "model", "created": 1, "owned_by": "proxyserve", "max_model_len": 256}
            for name in ("atlas", "atlas+qa")
        ]
        return JSONResponse({"object": "list", "data": data})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, whole_chat, chat_chunk, "chat.completion.chunk")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, whole_completion, completion_chunk, "text_completion")

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        body = await request.json()
        stub.bodies.append(body)
        if stub.refusal is not None:
            status, error = stub.refusal
            return JSONResponse({"error": error}, status)
        extra = {"fusion": FUSION} if "fusion" in body else {}
        return JSONResponse({**HEAD, "object": "score", **scores(body), "usage": USAGE, **extra})

    @app.put("/admin/v1/experts/{name}")
    @app.post("/admin/v1/experts/{name}/rollback")
    async def change_expert(name: str) -> Response:
        return JSONResponse({**EXPERT, "name": name})

    @app.put("/admin/v1/presets/{name}")
    async def put_preset(name: str, request: Request) -> Response:
        return JSONResponse({"object": "preset", "name": name, "fusion": await request.json()})

    async def answer(request: Request, whole: Any, chunk: Any, kind: str) -> Response:
        body = await request.json()
        stub.bodies.append(body)
        stub.headers.append(dict(request.headers))
        if stub.refusal is not None:
            status, error = stub.refusal
            return JSONResponse({"error": error}, status)
        if body.get("stream"):
            events = stream(request, body, chunk, kind)
            return StreamingResponse(events, media_type="text/event-stream")
        extra = {"fusion": FUSION} if "fusion" in body else {}
        return JSONResponse({**HEAD, **whole(body), "usage": USAGE, **extra})

    async def stream(request: Request, body: dict[str, Any], chunk: Any, kind: str) -> AsyncIterator[str]:
        try:
            for text in ("Oak", "ham", "."):
                yield event(kind, choices=[chunk(text, None)])
            while stub.endless:
                yield event(kind, choices=[chunk(" again", None)])
                await asyncio.sleep(0.01)
            yield event(kind, choices=[chunk("", "stop")])
            extra = {"fusion": FUSION} if "fusion" in body else {}
            yield event(kind, choices=[], usage=USAGE, **extra)
            yield "data: [DONE]\n\n"
        finally:
            if stub.endless:
                stub.left_early.set()

    return app


def whole_chat(body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Oakham."}
    choice = {"message": message, "logprobs": None, "finish_reason": "stop"}
    return {
        "object": "chat.completion",
        "choices": [{"index": index, **choice} for index in range(body.get("n", 1))],
    }


def scores(body: dict[str, Any]) -> dict[str, Any]:
    if "label_token_ids" in body:
        more = {"probability": 0.25} if body.get("normalize") else {}
        labels = [
            {"index": index, "token_id": token, "token": "x", "logprob": -1.5, **more}
            for index, token in enumerate(body["label_token_ids"])
        ]
        return {"labels": labels}
    kind = "texts" if "texts" in body else "continuations"
    more = {"top_logprobs": [None, {"b": -0.5}]} if "logprobs" in body else {}
    entry = {
        "logprob": -0.5,
        "num_tokens": 1,
        "mean_logprob": -0.5,
        "perplexity": None,
        "is_greedy": True,
        "token_ids": [5, 6],
        "tokens": ["a", "b"],
        "token_logprobs": [None, -0.5],
    }
    return {kind: [{"index": index, **entry, **more} for index in range(len(body[kind]))]}


def whole_completion(body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"text": " Oakham.", "logprobs": None, "finish_reason": "length"}
    if body.get("return_token_ids"):
        choice |= {"stop_reason": None, "prompt_token_ids": [5, 6], "token_ids": [7]}
    if "prompt_logprobs" in body:
        choice["prompt_logprobs"] = [None, {"6": {"logprob": -0.5, "rank": None, "decoded_token": "b"}}]
    if "logprob_token_ids" in body:
        choice["listed_logprobs"] = [{str(token): -2.0 for token in body["logprob_token_ids"]}]
    return {
        "object": "text_completion",
        "choices": [{"index": index, **choice} for index in range(body.get("n", 1))],
    }


def chat_chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
    delta = {"content": text} if text else {}
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def completion_chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def event(kind: str, **fields: Any) -> str:
    return f"data: {json.dumps({**HEAD, 'object': kind, **fields})}\n\n"


@pytest.fixture(scope="session")
def running_stub() -> Iterator[Stub]:
    stub = Stub()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(stub), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        stub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield stub
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def stub(running_stub: Stub) -> Stub:
    running_stub.reset()
    return running_stub
