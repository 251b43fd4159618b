"""A server whose streams are written down byte by byte: cut inside characters, broken off, or refused."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


def event(**delta: Any) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class PretendServer:
    """`answers` are given in turn: pieces of a stream, or a status with headers and a body."""

    def __init__(self) -> None:
        self.answers: list[Iterable[bytes] | tuple[int, dict[str, str], dict[str, Any]]] = []
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._send(200, {}, json.dumps({"data": [{"id": "big"}, {"id": "big+qa"}]}).encode())

            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                answer = outer.answers.pop(0)
                if isinstance(answer, tuple):
                    status, headers, body = answer
                    self._send(status, headers, json.dumps(body).encode())
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may leave
                    for piece in answer:
                        self.wfile.write(piece)
                        self.wfile.flush()
                        time.sleep(0.01)  # so that pieces are read one by one
                if isinstance(answer, Generator):
                    answer.close()

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def pretend_server() -> Iterator[PretendServer]:
    server = PretendServer()
    thread = Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
