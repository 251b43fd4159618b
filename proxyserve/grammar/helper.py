"""The gatekeeper's process: `python -m proxyserve.grammar.helper`. Whatever a grammar does to its compiler happens
here first, under limits that the operating system keeps.

It reads a line of JSON with the vocabulary and the limits, and then one per grammar; it answers each with a line. It
ends when its input does."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from proxyserve.config import GrammarLimits
from proxyserve.grammar.grammar import GrammarKind
from proxyserve.grammar.table import TokenTable
from proxyserve.grammar.trial import Refused, try_out


def main() -> None:
    os.nice(5)  # the steps of running requests come first
    hello = json.loads(sys.stdin.buffer.readline())
    table, limits = TokenTable.from_json(hello["table"]), GrammarLimits(**hello["limits"])
    tokenizer = table.tokenizer()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _memory()[0] + limits.compile_memory)
    _tell({"ready": True})
    for line in sys.stdin.buffer:
        # The parent keeps the time on its own clock; this ends the process even if the parent is gone.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + limits.compile_seconds) + 1)
        _tell(_answer(json.loads(line), table, tokenizer, limits))


def _answer(
    request: dict[str, str], table: TokenTable, tokenizer: LLTokenizer, limits: GrammarLimits
) -> dict[str, Any]:
    before = _memory()[1]
    try:
        source = try_out(GrammarKind(request["kind"]), request["text"], table, tokenizer, limits)
    except Refused as refusal:
        return {"refused": str(refusal)}
    except MemoryError:
        return {"refused": "takes too much memory to compile"}
    return {"source": source, "bytes": max(0, _memory()[1] - before)}


def _limit(which: int, soft: int) -> None:
    """Sets the soft limit only, which may be raised again."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _memory() -> tuple[int, int]:
    """Bytes of address space and of memory in use."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
