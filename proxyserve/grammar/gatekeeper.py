"""The process that tries every grammar before this one touches it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxyserve.config import GrammarLimits
from proxyserve.errors import NotReady
from proxyserve.grammar.grammar import Grammar
from proxyserve.grammar.table import TokenTable
from proxyserve.grammar.trial import Refused, TookTooLong

logger = logging.getLogger(__name__)

#: For Python, the library and a large vocabulary, on a busy machine.
_START_SECONDS = 60.0

_Process = subprocess.Popen[bytes]


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
        self._process: _Process | None = None
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
        deaths = 0
        for _ in range(3):
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            if process is None:
                continue
            answer, late = _exchange(process, question, self._limits.compile_seconds)
            if late or answer is None:
                self._drop()
            if late:
                raise TookTooLong(
                    f"takes more than {self._limits.compile_seconds:g} seconds to compile; simplify it"
                )
            if answer is not None:
                if "refused" in answer:
                    raise Refused(answer["refused"])
                return Passed(answer["source"], max(answer["bytes"], len(answer["source"])))
            # It may have been killed by somebody else; one that dies twice over one grammar was not.
            deaths += 1
            if deaths == 2:
                raise Refused("takes too much memory to compile; simplify it")
        logger.error("the process that compiles grammars does not start")
        raise NotReady("Grammars cannot be compiled now; the server's log says more.")

    def close(self) -> None:
        """End the process; `ask` raises NotReady from now on."""
        with self._lock:
            self._closed = True
            self._end()

    def _start(self) -> _Process | None:
        """None if it dies before it is ready. Raises NotReady after `close`."""
        package_root = str(Path(__file__).parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._lock:
            if self._closed:
                raise NotReady("The server is shutting down.")
            self._end()
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "proxyserve.grammar.helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # an interrupt at the terminal is the server's to handle
            )
        ready, _ = _exchange(process, self._hello, _START_SECONDS)
        return process if ready == {"ready": True} else None

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
            if pipe is not None:
                with suppress(OSError):  # of what was never read
                    pipe.close()


def _exchange(process: _Process, line: str, seconds: float) -> tuple[dict[str, Any] | None, bool]:
    """The process's answer to a line, None if it died before; and whether it was killed for being late."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def kill() -> None:  # which ends every read and write
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        return (json.loads(answer) if answer.endswith(b"\n") else None), late.is_set()
    except (OSError, ValueError):  # its end of the pipe is closed, or ours, by `close`
        return None, late.is_set()
    finally:
        timer.cancel()
