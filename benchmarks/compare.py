"""One interleaved run: in each round, each load, everybody has a turn while all others are stopped."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
from torch import Tensor

from benchmarks.contestants import LOOP, Contestant, Models, Server, contestants, servers, write_gguf
from benchmarks.loop import Loop
from benchmarks.machine import describe_machine, versions
from benchmarks.processes import NotStartedError, Running
from proxyserve.bench.agreeing import build_agreeing_family
from proxyserve.bench.load.drive import Load, Round
from proxyserve.bench.load.lengths import Lengths
from proxyserve.bench.load.prompts import Prompts
from proxyserve.bench.load.run import measure
from proxyserve.bench.load.statistics import Summary, summarize
from proxyserve.bench.load.workload import Ask, Workload
from proxyserve.bench.speculation import SIZES

#: Tokens of the answer that is compared, and of those that warm everybody up.
_CHECKED = 32
_WARM = 16
#: Of the requests before the first round, which no round asks for again.
_BEFORE = -10_000


@dataclass(frozen=True, slots=True)
class Settings:
    """`size` of the models (a key of SIZES), `share` of tokens at which the expert drafts what is said. Each of so many
    `clients` asks `requests` times in each round, a single client twice as often. `prompt` and `new` are tokens,
    `patience` the seconds that a server has to start."""

    peers: Path
    size: str = "68M"
    dtype: str = "float32"
    share: float = 0.8
    clients: tuple[int, ...] = (1,)
    requests: int = 1
    rounds: int = 1
    prompt: int = 64
    new: int = 64
    cores: tuple[int, ...] | None = None
    patience: float = 240.0

    @property
    def loads(self) -> list[Load]:
        return [Load(max(2, clients) * self.requests, clients=clients) for clients in self.clients]


class Entry(NamedTuple):
    """What came of a contestant: `failure` where it could not be measured; how many tokens of one answer were `right`,
    of how many; a summary per load."""

    contestant: Contestant
    failure: str | None
    right: tuple[int, int] | None = None
    summaries: tuple[Summary, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.contestant.name,
            "fused": self.contestant.fused,
            "peer": self.contestant.peer,
            "failure": self.failure,
            "right": self.right,
            "loads": [summary.as_dict() for summary in self.summaries],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything about a run."""

    settings: Settings
    began: str
    machine: dict[str, Any]
    versions: dict[str, str]
    entries: tuple[Entry, ...]

    def as_dict(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["peers"]  # a path of this machine
        return {
            "settings": settings,
            "began": self.began,
            "machine": self.machine,
            "versions": self.versions,
            "contestants": [entry.as_dict() for entry in self.entries],
        }


def compare(settings: Settings, *, logs: Path, progress: Callable[[str], None]) -> Comparison:
    """Make models, start everybody, measure, stop everybody. What a peer does is in the result and raises nothing."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine()
    with TemporaryDirectory() as name, ExitStack() as stack:
        progress(f"making models of {settings.size}")
        base, expert = SIZES[settings.size]
        family = build_agreeing_family(Path(name), [settings.share], base=base, expert=expert)
        context = settings.prompt + max(settings.new, _CHECKED)
        models = Models(family.base, *family.experts[settings.share], settings.dtype, context)
        field = _Field(settings, models, family.follows, logs, stack, progress)
        field.start()
        entries = field.measure()
    return Comparison(settings, began, machine, versions(settings.peers), entries)


class _Field:
    """Those who take part, and what became of them."""

    def __init__(
        self,
        settings: Settings,
        models: Models,
        follows: Tensor,
        logs: Path,
        stack: ExitStack,
        progress: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._models = models
        self._follows: list[int] = follows.tolist()
        self._logs = logs
        self._stack = stack
        self._progress = progress
        self._running: dict[str, Running] = {}
        self._failures: dict[str, str] = {}
        self._loop: Loop | None = None

    def start(self) -> None:
        """All servers: those that measure while they start one after the other, the rest together before."""
        self._progress("starting servers; the slowest takes a minute or two")
        found = servers(self._models, self._settings.peers)
        failure = write_gguf(self._models, self._settings.peers)
        found = [
            replace(one, missing=one.missing or failure) if one.name == "llama.cpp" else one for one in found
        ]
        self._begin([server for server in found if not server.quiet])
        for server in found:
            if server.quiet:
                self._begin([server])
        self._loop = Loop(self._models)

    def measure(self) -> tuple[Entry, ...]:
        everybody = contestants(self._models)
        right = {one.name: self._check(one) for one in everybody if self._failure(one) is None}
        able = [one for one in everybody if self._failure(one) is None]
        for load in self._settings.loads:
            warm = Load(load.clients or 1, clients=load.clients)
            for one in able:
                self._progress(f"{load}: warming up {one.name}")
                self._measure(one, warm, _BEFORE, new=_WARM)
        rounds: dict[tuple[str, Load], list[Round]] = {}
        for number in range(self._settings.rounds):
            for load in self._settings.loads:
                for one in able:
                    result = self._measure(one, load, number * load.requests, new=self._settings.new)
                    rounds.setdefault((one.name, load), []).append(result)
                    self._progress(
                        f"round {number + 1} of {self._settings.rounds}, {load}: {one.name}: "
                        f"{result.tokens / result.seconds:.0f} tokens/s"
                    )
        return tuple(
            Entry(one, failure)
            if (failure := self._failure(one)) is not None
            else Entry(
                one,
                None,
                right[one.name],
                tuple(summarize(load, rounds[one.name, load]) for load in self._settings.loads),
            )
            for one in everybody
        )

    def _begin(self, group: Sequence[Server]) -> None:
        begun = []
        for server in group:
            if server.missing is not None:
                self._fail(server.name, server.missing)
                continue
            try:
                running = Running(server, self._logs / f"{_slug(server.name)}.log", self._settings.cores)
            except OSError as error:
                self._fail(server.name, f"could not be started: {error}")
                continue
            self._stack.callback(running.stop)
            begun.append(running)
        for running in begun:
            name = running.server.name
            try:
                running.wait(self._settings.patience)
            except NotStartedError as error:
                self._fail(name, str(error))
                running.stop()
                continue
            self._running[name] = running
            self._progress(f"{name} is ready")
        for running in self._running.values():
            running.pause()

    def _fail(self, server: str, why: str) -> None:
        self._failures[server] = why
        self._progress(f"{server} is left out: {why}")

    def _failure(self, one: Contestant) -> str | None:
        return self._failures.get(one.server)

    def _check(self, one: Contestant) -> tuple[int, int] | None:
        """How many tokens of an answer are those that the models were made to say."""
        ask = self._workload(one, _CHECKED).ask(_BEFORE)
        ids = self._workload(LOOP, _CHECKED).ask(_BEFORE).prompt
        assert isinstance(ids, list)
        wanted = []
        last = ids[-1]
        for _ in range(_CHECKED):
            last = self._follows[last]
            wanted.append(last)
        if one is LOOP:
            assert self._loop is not None
            (said,) = self._loop.answer([ids], _CHECKED)
        else:
            try:
                said = self._said(self._running[one.server], ask)
            except (httpx.HTTPError, ValueError, LookupError) as error:
                self._fail(one.server, f"does not answer: {error or type(error).__name__}"[:200])
                return None
        return sum(own == token for own, token in zip(said, wanted, strict=False)), _CHECKED

    def _said(self, running: Running, ask: Ask) -> list[int]:
        target = replace(running.target, stream=False)
        with running.turn():
            response = httpx.post(
                f"{target.url}/v1/completions",
                content=target.body(ask),
                timeout=120.0,
                headers={"content-type": "application/json"},
            )
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {response.text[:150]}")
        return [int(number) for number in re.findall(r"w(\d+)", response.json()["choices"][0]["text"])]

    def _measure(self, one: Contestant, load: Load, first: int, *, new: int) -> Round:
        workload = self._workload(one, new)
        if one is LOOP:
            assert self._loop is not None
            return self._loop.measure(workload, load, first)
        running = self._running[one.server]
        with running.turn():
            return measure(running.target, workload, load, first=first)

    def _workload(self, one: Contestant, new: int) -> Workload:
        texts = one is not LOOP and self._running[one.server].server.texts
        prompts = Prompts(self._models.base, as_text=texts)
        return Workload(
            {one.model: 1.0}, Lengths.parse(str(self._settings.prompt)), Lengths.parse(str(new)), prompts
        )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name.lower()).strip("-")
