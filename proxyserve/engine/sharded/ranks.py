"""The processes that hold a base together, as rank 0 sees them."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
import torch.distributed as dist

from proxyserve.engine.sharded import messages
from proxyserve.engine.sharded.follower import join
from proxyserve.errors import LoadError, RankLost
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement, load_config
from proxyserve.models.sharding import check_shardable, load_shard
from proxyserve.types import ModelKey

logger = logging.getLogger(__name__)

#: How long a server that has lost a rank may take to end by itself. One that hangs in a collective cannot.
_GRACE_SECONDS = 20.0
_EXIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Link:
    rank: int
    process: subprocess.Popen[bytes]
    stream: BinaryIO


def check_ranks(size: int, placement: Placement, device: str) -> None:
    """Raise LoadError if there cannot be so many ranks here. `device` is what was asked for."""
    if size < 2:
        raise LoadError(f"--tensor-parallel {size}: a base is divided into 2 parts or more")
    if placement.device.type == "cuda":
        if ":" in device:
            raise LoadError(
                f"--device {device}: with --tensor-parallel the ranks take GPUs 0 to {size - 1}; use --device cuda, "
                "and choose them with CUDA_VISIBLE_DEVICES"
            )
        found = torch.cuda.device_count()
        if size > found:
            raise LoadError(f"--tensor-parallel {size} needs {size} GPUs, and torch finds {found}")
    elif torch.cuda.is_available():
        raise LoadError(
            "--tensor-parallel on a CPU is for machines without a GPU (for tests): transformers would put the parts on "
            "the GPUs; hide them with CUDA_VISIBLE_DEVICES=''"
        )


class Ranks:
    """This process is rank 0; the others are its children and live as long as it does. One at a time in a process, and
    one thread at a time may send. `close` it."""

    def __init__(self, size: int, placement: Placement, *, threads: int | None = None) -> None:
        """Start `size - 1` followers with so many CPU threads each. Raises LoadError if one does not come up."""
        self.size = size
        self._placement = placement
        self._closed = threading.Event()
        self._folder = Path(tempfile.mkdtemp(prefix="proxyserve-ranks-"))
        self._links: list[_Link] = []
        try:
            store = str(self._folder / "store")
            for rank in range(1, size):
                self._links.append(_start(rank, size, placement.device.type, store, threads))
            join(0, size, placement.device.type, store)
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError):  # what torch.distributed raises
                raise LoadError(f"the processes for --tensor-parallel {size} do not meet: {error}") from error
            raise

    @property
    def pids(self) -> list[int]:
        """Of the followers, from rank 1 on."""
        return [link.process.pid for link in self._links]

    def load(self, folder: Path, key: ModelKey) -> LoadedModel:
        """Have every rank load its part of a base; returns that of this one. Raises LoadError."""
        check_shardable(load_config(folder.expanduser()), self.size, str(folder))
        self.send("load", str(folder), key.name, messages.placement_to_json(self._placement))
        try:
            model = load_shard(folder, key, self._placement, 0, self.size)
        finally:
            answers = [self._answer(link) for link in self._links]
        for failure in answers:
            if failure is not None:
                raise LoadError(failure)
        return model

    def _answer(self, link: _Link) -> str | None:
        try:
            answer: str | None = messages.read(link.stream)
        except (EOFError, OSError):
            return self._how_it_ended(link)
        return answer

    def send(self, name: str, *arguments: object) -> None:
        """Have all followers call a method of theirs; arguments as JSON has them. Raises RankLost."""
        for link in self._links:
            try:
                messages.write(link.stream, [name, arguments])
            except OSError as error:
                raise RankLost(self._how_it_ended(link)) from error

    def failed(self, error: BaseException) -> RankLost:
        """What to raise after an error in the midst of something that all ranks do: they are out of step from then
        on."""
        for link in self._links:
            with suppress(subprocess.TimeoutExpired):
                link.process.wait(0.5)  # a peer's death is seen here first
                return RankLost(self._how_it_ended(link))
        return RankLost(f"the processes of the base are out of step after {type(error).__name__}: {error}")

    def watch(self, on_lost: Callable[[RankLost], None]) -> None:
        """Call `on_lost`, from another thread, when a follower ends; and end this process if it is still there much
        later, because a collective waits for that one."""
        for link in self._links:
            threading.Thread(
                target=self._watch, args=(link, on_lost), name=f"proxyserve-rank-{link.rank}", daemon=True
            ).start()

    def _watch(self, link: _Link, on_lost: Callable[[RankLost], None]) -> None:
        link.process.wait()
        if self._closed.is_set():
            return
        on_lost(RankLost(self._how_it_ended(link)))
        if not self._closed.wait(_GRACE_SECONDS):
            logger.critical("%s, and the server does not end by itself", self._how_it_ended(link))
            os._exit(1)

    def _how_it_ended(self, link: _Link) -> str:
        with suppress(subprocess.TimeoutExpired):
            link.process.wait(_EXIT_SECONDS)
        code = link.process.returncode
        how = "does not answer" if code is None else f"has ended with code {code}"
        return f"rank {link.rank} of the base (process {link.process.pid}) {how}"

    def close(self) -> None:
        """End the followers. May be called more than once."""
        self._closed.set()
        for link in self._links:
            with suppress(OSError):  # what nobody will read
                link.stream.close()
        for link in self._links:
            try:
                link.process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                link.process.kill()
                link.process.wait()
        self._links = []
        if dist.is_initialized() and self._placement.device.type == "cpu":
            dist.destroy_process_group()  # NCCL would wait for the others
        shutil.rmtree(self._folder, ignore_errors=True)


def _start(rank: int, size: int, device: str, store: str, threads: int | None) -> _Link:
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = [theirs.fileno(), rank, size, device, store, threads or 0, os.getpid()]
        process = subprocess.Popen(
            [sys.executable, "-m", "proxyserve.engine.sharded", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    with ours:  # the stream keeps it open
        return _Link(rank, process, cast("BinaryIO", ours.makefile("rwb")))
