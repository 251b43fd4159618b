"""A stand-in for another OpenAI-style server: real HTTP on a free port, laws from anywhere, failures on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from proxyserve.text.token_names import id_name, text_name
from proxyserve.text.tokenizer import Tokenizer

SECRET = "the body of a refusal"
Law = Callable[[Sequence[int]], Tensor]


@dataclass
class Trouble:
    """What goes wrong with one call. `status` 0 closes the connection without an answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeUpstream:
    """`law` maps ids to log-probs [V]. `trouble` is asked before each completion, with the prompt and how often that
    prompt was asked for before; it may also sleep. `calls` are the bodies of completions, `keys` what came as
    Authorization."""

    law: Law
    tokenizer: Tokenizer
    key: str | None = None
    by_id: str = "yes"  # "refused", "ignored"
    max_logprobs: int = 1000
    listing: Any = field(default_factory=lambda: {"data": [{"id": "big/atlas-70B", "max_model_len": 256}]})
    trouble: Callable[[tuple[int, ...], int], Trouble | None] = lambda prompt, times: None
    logprobs: Callable[[dict[str, Any]], Any] = lambda logprobs: logprobs
    calls: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        prompt = tuple(body["prompt"])
        with self._lock:
            times = sum(tuple(call["prompt"]) == prompt for call in self.calls)
            self.calls.append(body)
        trouble = self.trouble(prompt, times)
        if trouble is not None:
            return trouble.status, trouble.headers, {"error": {"message": SECRET}}
        by_id = bool(body.get("return_tokens_as_token_ids"))
        if (by_id and self.by_id == "refused") or body["logprobs"] > self.max_logprobs:
            return 400, {}, {"error": {"message": SECRET}}
        with self._lock:
            law = self.law(prompt)
        values, ids = torch.topk(law, min(body["logprobs"], law.shape[0]))
        name = id_name if by_id and self.by_id == "yes" else self._text
        top = dict(zip(map(name, ids.tolist()), values.tolist(), strict=False))
        logprobs = {
            "tokens": [name(int(ids[0]))],
            "token_logprobs": [float(values[0])],
            "top_logprobs": [top],
        }
        return 200, {}, {"choices": [{"index": 0, "text": "x", "logprobs": self.logprobs(logprobs)}]}

    def _text(self, token: int) -> str:
        return text_name(self.tokenizer, token)


@contextmanager
def serve_fake(upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._send(200 if upstream.listing is not None else 404, {}, upstream.listing)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            upstream.keys.add(self.headers["authorization"])
            if upstream.key is not None and self.headers["authorization"] != f"Bearer {upstream.key}":
                self._send(401, {}, {"error": {"message": SECRET}})
            else:
                self._send(*upstream.answer(body))

        def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
            if status == 0:
                self.close_connection = True
                return
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if headers.get("x-test") == "trickle":
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            else:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client has gone, which some tests are about
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    upstream.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield upstream
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
