"""The process that tries every grammar before this one touches it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxyserve.config import GrammarLimits
from proxyserve.errors import NotReady
from proxyserve.grammar.grammar import Grammar
from proxyserve.grammar.table import TokenTable
from proxyserve.grammar.trial import Refused

logger = logging.getLogger(__name__)

#: For Python, the library and a large vocabulary, on a busy machine.
_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Passed:
    """`source` is what llguidance is to compile, `cost` about the bytes that it takes once compiled."""

    source: str
    cost: int


class Gatekeeper:
    """Starts its process with the first grammar, kills it if one takes too long, and starts another with the next.
    `ask` is for one thread at a time, `close` for any."""

    def __init__(self, table: TokenTable, limits: GrammarLimits) -> None:
        self._limits = limits
        self._hello = json.dumps({"table": table.to_json(), "limits": asdict(limits)})
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def ask(self, grammar: Grammar) -> Passed:
        """Raises Refused, and NotReady if the process cannot be started."""
        question = json.dumps({"kind": grammar.kind, "text": grammar.text})
        # A process that dies may have been killed by somebody else; one that dies twice over one grammar was not.
        for _ in range(2):
            if self.pid is None:
                self._start()
            late = threading.Event()
            with self._deadline(self._limits.compile_seconds, late):
                answer = self._exchange(question)
            if late.is_set():
                self._drop()
                raise Refused(
                    f"takes more than {self._limits.compile_seconds:g} seconds to compile; simplify it"
                )
            if answer is None:
                self._drop()
                continue
            if "refused" in answer:
                raise Refused(answer["refused"])
            return Passed(answer["source"], max(answer["bytes"], len(answer["source"])))
        raise Refused("takes too much memory to compile; simplify it")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()

    def _start(self) -> None:
        package_root = str(Path(__file__).parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._lock:
            if self._closed:
                raise NotReady("The server is shutting down.")
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "proxyserve.grammar.helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # an interrupt at the terminal is the server's to handle
            )
        late = threading.Event()
        with self._deadline(_START_SECONDS, late):
            ready = self._exchange(self._hello)
        if ready != {"ready": True}:
            logger.error("the process that compiles grammars does not start")
            raise NotReady("Grammars cannot be compiled now; the server's log says more.")

    def _exchange(self, line: str) -> dict[str, Any] | None:
        """None if the process died before it answered."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            return json.loads(answer) if answer.endswith(b"\n") else None
        except (OSError, ValueError):  # its end of the pipe is closed, or ours, by `close`
            return None

    @contextmanager
    def _deadline(self, seconds: float, late: threading.Event) -> Iterator[None]:
        """Kills the process after so long, which ends every read and write, and sets `late`."""
        process = self._process
        assert process is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _drop(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        """Kill what there is, and wait for it. Under the lock."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was never read
                pass
