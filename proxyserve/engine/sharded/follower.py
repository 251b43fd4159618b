"""A process that does what rank 0 does: it loads its part of the base and runs every forward of it.

It takes no decisions, has no scheduler and hears of no requests. Rank 0 calls a method of `Follower` on all of them by
sending its name and arguments, and does the same itself. When rank 0 is gone, so is this process: at the end of the
pipe, or, if it is waiting for the others within a forward, by the signal that Linux sends to children.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import transformers

from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.runner import Runner
from proxyserve.engine.sharded import messages
from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.sharding import load_shard
from proxyserve.types import ModelKey

logger = logging.getLogger(__name__)

#: A rank that waits longer than this for another one within a forward gives up, and the server ends.
PATIENCE = timedelta(minutes=2)
_PDEATHSIG = 1


class Follower:
    """Rank `rank` of `size`. Its public methods are the messages; what `load` returns is sent back."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._model: LoadedModel | None = None
        self._runner: Runner | None = None

    def load(self, folder: str, name: str, where: list[str]) -> str | None:
        """Load this rank's part of a base, in place of any other. Returns why it cannot be."""
        self._model = self._runner = None
        placement = messages.placement_from_json(where)
        try:
            self._model = load_shard(Path(folder), ModelKey(name), placement, self._rank, self._size)
        except LoadError as error:
            return f"rank {self._rank}: {error.message}"
        return None

    def prepare(self) -> None:
        assert self._model is not None
        self._runner = Runner(self._model)

    @property
    def _ready(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("nothing is loaded")
        return self._runner

    def attach(self, num_blocks: int, block_size: int) -> None:
        """KV blocks with the numbers that rank 0's have; in them are this rank's heads."""
        runner = self._ready
        runner.attach(
            KVStorage(
                runner.shapes,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=runner.model.dtype,
                device=runner.model.device,
            )
        )

    def detach(self) -> None:
        self._ready.detach()

    def clear(self, blocks: Sequence[int], start: int) -> None:
        self._ready.clear(blocks, start)

    def rehearse(self, tokens: int) -> None:
        self._ready.rehearse(tokens)

    def compute(self, value: Mapping[str, Any]) -> None:
        row, runner = messages.row_from_json(value), self._ready
        assert runner.storage is not None
        runner.compute(row, runner.attention.plan(row.spans, runner.storage))


def join(rank: int, size: int, device: str, store: str) -> None:
    """Make this process one of the `size` that run a base together; all must do so. `store` is a file that only they
    can read."""
    # All ranks are on this machine: nobody else need be able to reach the ports at which they meet, and the name of a
    # machine need not lead anywhere.
    os.environ.setdefault("NCCL_SOCKET_IFNAME" if device == "cuda" else "GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(store, size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )


@torch.inference_mode()
def follow(stream: BinaryIO, follower: Follower) -> None:
    """Do what comes through the pipe, until it ends."""
    while True:
        try:
            name, arguments = messages.read(stream)
        except EOFError:
            return
        answer = getattr(follower, name)(*arguments)
        if name == "load":
            messages.write(stream, answer)


def main(arguments: Sequence[str]) -> None:
    descriptor, rank, size, device, store, threads, parent = arguments
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it was gone before that
    # Signals to the whole group are rank 0's to answer: it may have requests to finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format=f"rank {rank}: %(levelname)s %(message)s")
    transformers.utils.logging.set_verbosity_error()  # rank 0 says it
    os.environ["LOCAL_RANK"] = rank
    if int(threads):
        torch.set_num_threads(int(threads))
    stream = cast("BinaryIO", socket.socket(fileno=int(descriptor)).makefile("rwb"))
    code = 0
    try:
        join(int(rank), int(size), device, store)
        follow(stream, Follower(int(rank), int(size)))
    except BaseException:
        logger.exception("this process of the base ends, and the server with it")
        code = 1
    sys.stderr.flush()
    os._exit(code)  # tearing down communicators may wait for ranks that are gone
