"""Servers that start fast, to be killed: `python -m tests.experts.respawn`.

This process imports everything once and never computes, so that it has one thread and can be forked. Each line it reads
is an order as JSON:

    {"start": ARGUMENTS, "log": FILE}   fork a process that runs `proxyserve ARGUMENTS` with FILE as its stderr; prints
                                        its id. With "fatal": [METHOD, MOMENT] it kills itself "before" or "after" its
                                        first call of that method of the state store.
    {"kill": ID}                        kill that process; prints how it ended, by `os.waitstatus_to_exitcode`

When there are no more orders, what still runs is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from proxyserve.cli.main import main as command
from proxyserve.experts.store import StateStore

#: What `serve` imports once it knows that it is to serve: seconds, which every fork would spend.
_LATE = (
    "proxyserve.api.server",
    "proxyserve.cli.opening",
    "proxyserve.cli.serve",
    "proxyserve.cli.startup",
    "proxyserve_kernels",
    "transformers.models.llama.modeling_llama",
)


def start(arguments: Sequence[str], log: str, fatal: Sequence[str]) -> int:
    """The process id of a server."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        if fatal:
            make_fatal(*fatal)
        sys.argv = ["proxyserve", *arguments]
        command()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def make_fatal(method: str, moment: str) -> None:
    call = getattr(StateStore, method)

    def fatal(*given: Any, **named: Any) -> None:
        if moment == "after":
            call(*given, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(StateStore, method, fatal)


def kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    for module in _LATE:
        import_module(module)
    running = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = start(order["start"], order["log"], order.get("fatal", ()))
            running.add(pid)
            print(pid, flush=True)
        else:
            running.remove(order["kill"])
            print(kill(order["kill"]), flush=True)
    for pid in running:
        kill(pid)


if __name__ == "__main__":
    main()
