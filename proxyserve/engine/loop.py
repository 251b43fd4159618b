"""The thread that steps the engine, and the bridge from it to asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from proxyserve.config import Limits
from proxyserve.engine.admission import Admission, RateState
from proxyserve.engine.caller import Caller
from proxyserve.engine.choice import Choice
from proxyserve.engine.counters import KeyCounts
from proxyserve.engine.engine import Engine
from proxyserve.engine.histogram import HistogramStats
from proxyserve.engine.offer import Lease
from proxyserve.engine.submission import Submission
from proxyserve.engine.unread import Unread
from proxyserve.errors import InvalidRequest, NotReady, RankLost
from proxyserve.models.remote import AnyModel, RemoteModel
from proxyserve.types import FinishReason, OutputEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool of KV blocks. `blocks_cached` are reusable blocks that no lane holds."""

    blocks_total: int
    blocks_in_use: int
    blocks_cached: int


@dataclass(frozen=True, slots=True)
class TrunkStats:
    """All generations of one trunk: rows of logits made, seconds spent."""

    rows_run: int
    seconds_run: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics. Counters are since start; for what they and the histograms mean see
    `counters.EngineCounters`. Pools are named after the first model that uses them, trunks after themselves.
    `waiting_tokens` are prompt tokens of choices that have had no event, `lane_tokens` the tokens that ran through each
    model, `by_generation` choices that ended, by expert and generation. `memory` are the bytes of weights and KV
    in this process, `base_parts` the processes that the base is divided over."""

    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    ready: bool = False
    steps: int = 0
    step_failures: int = 0
    nonfinite_choices: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    kernel_compilations: int = 0
    fused_tokens: int = 0
    flips: int = 0
    gated_tokens: int = 0
    sampling_seconds: float = 0.0
    memory: int = 0
    base_parts: int = 1
    finished: Mapping[str, int] = field(default_factory=dict)
    pools: Mapping[str, PoolStats] = field(default_factory=dict)
    trunks: Mapping[str, TrunkStats] = field(default_factory=dict)
    lane_tokens: Mapping[str, int] = field(default_factory=dict)
    prefix_queries: Mapping[str, int] = field(default_factory=dict)
    prefix_hits: Mapping[str, int] = field(default_factory=dict)
    drafts: Mapping[str, int] = field(default_factory=dict)
    draft_tokens: Mapping[str, int] = field(default_factory=dict)
    accepted_tokens: Mapping[str, int] = field(default_factory=dict)
    by_generation: Mapping[tuple[str, str], int] = field(default_factory=dict)
    by_key: Mapping[str, KeyCounts] = field(default_factory=dict)
    histograms: Mapping[str, HistogramStats] = field(default_factory=dict)


class ResponseStream:
    """Events of all choices of one `submit`, in the order they happen; ends after the last choice's last event. Events
    that are not read in time are joined (`engine.unread`), and if too much is unread it is all cancelled: then reading
    raises ReaderTooSlow. Leaving early (`aclose`, or the end of `async with`) cancels what still runs. `generations`
    are those that the choices have of each expert."""

    def __init__(self, engine: AsyncEngine, choices: Sequence[Choice]) -> None:
        self._engine = engine
        self._caller = choices[0].submission.caller
        self._loop = asyncio.get_running_loop()
        self._unread = Unread(engine.limits.max_unread_tokens)
        self._open = {choice.key for choice in choices}
        self.choices = len(choices)
        self.generations = choices[0].generations

    def __aiter__(self) -> AsyncIterator[OutputEvent]:
        return self

    async def __anext__(self) -> OutputEvent:
        if not self._open:
            raise StopAsyncIteration
        event = await self._unread.get()
        if event.finish_reason is not None:
            self._open.discard(f"{event.request_id}/{event.index}")
        return event

    def cancel(self) -> None:
        """Cancel the choices that have not ended; their last events will say so."""
        self._engine._cancel(self._open)

    async def aclose(self) -> None:
        """Cancel the choices that have not ended. Safe to call at any time, more than once."""
        self.cancel()
        self._open = set()

    async def __aenter__(self) -> ResponseStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncEngine:
    """Runs `engine.step()` on a thread of its own for callers on an event loop.

    States: loading (before `start`), ready, draining (no new work), stopped, dead (`failure` says why, for the
    log). All bookkeeping that both sides touch is under one lock; the engine itself is touched by the thread
    alone."""

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.engine = engine
        self.limits = limits or Limits()
        self.state = "loading"
        self.failure: str | None = None
        self._wake = threading.Condition()
        self._arrived: deque[list[Choice]] = deque()
        self._cancelled: deque[str] = deque()
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._streams: dict[str, ResponseStream] = {}
        self._admission = Admission(self.limits)
        self._stop = False
        self._lost: RankLost | None = None
        self._over = False
        self._drained: asyncio.Event | None = None
        self._drained_loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="proxyserve-engine", daemon=True)

    def start(self) -> None:
        self.state = "ready"
        self._thread.start()

    def close(self) -> None:
        """Stop the thread after its current step. What still runs or waits gets an error event."""
        with self._wake:
            self._stop = True
            if self.state != "dead":
                self.state = "stopped"
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def lose(self, lost: RankLost) -> None:
        """A process that steps need is gone, says another thread: the engine dies, at once if it is idle."""
        with self._wake:
            self._lost = lost
            self._wake.notify()

    @property
    def lost(self) -> bool:
        """It died because of that, and so must this process."""
        return self.state == "dead" and self._lost is not None

    def drain(self) -> None:
        """Take no new work; what runs or waits goes on."""
        if self.state == "ready":
            self.state = "draining"

    async def drained(self) -> None:
        """Return once nothing runs or waits. Must not be called by two tasks at once."""
        self._drained = asyncio.Event()
        self._drained_loop = asyncio.get_running_loop()
        with self._wake:
            if not self._streams:
                return
        await self._drained.wait()

    def between_steps(self, errand: Callable[[], None]) -> Future[None]:
        """Run `errand` on the engine's thread when no step is under way: for changes of what steps can run. Must be
        short. Before `start` it is run at once, after the engine has stopped or died the future fails with NotReady."""
        future: Future[None] = Future()
        with self._wake:
            if self.state != "loading":
                if self._over:
                    future.set_exception(NotReady(f"The server is {self.state}."))
                else:
                    self._errands.append((errand, future))
                    self._wake.notify()
                return future
        _run_errand(errand, future)
        return future

    # Submitting ----------------------------------------------------------------------------------------------

    def submit(
        self, submissions: Sequence[Submission], lease: Lease, *, more: bool = False
    ) -> ResponseStream:
        """Queue all submissions, made from the leased offer on behalf of one caller, or none; call it on the event loop
        that will read the stream. `more`: they belong to a request that was let in already.

        Raises NotReady, QueueFull, and what `Engine.prepare` raises.
        """
        self._require_ready()  # before the work of preparing, and again when it is queued
        for submission in submissions:
            if submission.n > self.limits.max_n:
                raise InvalidRequest(
                    f"n is {submission.n}; this server allows {self.limits.max_n}.", param="n"
                )
        choices: list[Choice] = []
        try:
            for submission in submissions:
                choices += self.engine.prepare(submission, lease)
            stream = ResponseStream(self, choices)
            self._enqueue(choices, stream, more=more)
        except BaseException:
            self.engine.discard(choices)
            raise
        return stream

    def _enqueue(self, choices: list[Choice], stream: ResponseStream, *, more: bool) -> None:
        with self._wake:
            self._require_ready()
            for choice in choices:
                if choice.key in self._streams:
                    raise ValueError(f"request id {choice.key} is in use")
            self._admission.admit(
                stream._caller,
                {choice.key: _prompt_tokens(choice) for choice in choices},
                prompt_tokens=sum(_prompt_tokens(choice) for choice in choices if choice.index == 0),
                more=more,
            )
            for choice in choices:
                self._streams[choice.key] = stream
            self._arrived.append(choices)
            self._wake.notify()

    def _require_ready(self) -> None:
        if self.state != "ready":
            raise NotReady(f"The server is {self.state}.")

    def check_room(self, caller: Caller) -> None:
        """Raise NotReady or QueueFull if nothing that the caller could submit now would be taken."""
        self._require_ready()
        with self._wake:
            self._admission.check(caller)

    def rates(self, caller: Caller) -> Mapping[str, RateState]:
        """Of a caller with limits per minute, of "requests" and "tokens"."""
        with self._wake:
            return self._admission.rates(caller)

    def _cancel(self, keys: set[str]) -> None:
        with self._wake:
            live = [key for key in keys if key in self._streams]
            self._cancelled.extend(live)
            if live:
                self._wake.notify()

    def snapshot(self) -> EngineStats:
        """Numbers for metrics. Read without stopping the engine: each is right, together they may be a step apart."""
        engine, counters = self.engine, self.engine.counters
        pools = {
            name: PoolStats(pool.num_blocks, pool.in_use, pool.cached)
            for pool, name in engine.residents.pool_names.items()
        }
        tokens: Counter[str] = Counter()
        for stats in engine.residents.stats.values():
            tokens.update(stats.tokens.copy())
        running = len(engine.scheduler.running)
        return EngineStats(
            waiting=max(0, len(self._streams) - running),
            running=running,
            waiting_tokens=self._admission.waiting_tokens,
            ready=self.state == "ready",
            steps=counters.steps,
            step_failures=counters.step_failures,
            nonfinite_choices=counters.nonfinite_choices,
            tokens_generated=counters.tokens_generated,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            preemptions=counters.preemptions,
            kernel_compilations=engine.backend.compilations,
            fused_tokens=counters.fused_tokens,
            flips=counters.flips,
            gated_tokens=counters.gated_tokens,
            sampling_seconds=counters.sampling_seconds,
            memory=engine.residents.bytes,
            base_parts=_parts(engine.models.base),
            finished=dict(counters.finished),
            pools=pools,
            trunks={
                name: TrunkStats(stats.rows, stats.seconds) for name, stats in engine.residents.stats.items()
            },
            lane_tokens=tokens,
            prefix_queries=counters.prefix_queries.copy(),
            prefix_hits=counters.prefix_hits.copy(),
            drafts=counters.drafts.copy(),
            draft_tokens=counters.draft_tokens.copy(),
            accepted_tokens=counters.accepted_tokens.copy(),
            by_generation=counters.by_generation.copy(),
            by_key=counters.by_key.copy(),
            histograms=counters.histograms.stats(),
        )

    # The thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_orders():
                if self.engine.has_work:
                    self._publish(self.engine.step())
            self._publish(self.engine.fail_all("The server is shutting down."))
            self._abandon("The server is shutting down.")  # what arrived too late to be enqueued
        except RankLost as lost:
            logger.error("the server ends: %s", lost.message)
            with self._wake:
                self._lost = lost
                self.failure = lost.message
                self.state = "dead"
            self._abandon("The server has lost a part of the base and ends.")
        except BaseException as error:
            logger.exception("the engine died")
            with self._wake:
                self.failure = f"{type(error).__name__}: {error}"
                self.state = "dead"
            self._abandon("The engine failed and has stopped.")
        finally:
            self._refuse_errands()

    def _take_orders(self) -> bool:
        """Wait for something to do; hand arrivals and cancellations to the engine. False when it is time to stop."""
        with self._wake:
            while not (
                self._stop
                or self._lost is not None
                or self._arrived
                or self._cancelled
                or self._errands
                or self.engine.has_work
            ):
                self._wake.wait()
            if self._stop:
                return False
            if self._lost is not None:
                raise self._lost
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            errands, self._errands = self._errands, deque()
        for errand, future in errands:
            _run_errand(errand, future)
        for choices in arrived:
            self.engine.enqueue(choices)
        events = [self.engine.cancel(key) for key in cancelled]
        self._publish([event for event in events if event is not None])
        return True

    def _refuse_errands(self) -> None:
        """Nobody will run them any more."""
        with self._wake:
            self._over = True
            errands, self._errands = self._errands, deque()
        for _, future in errands:
            future.set_exception(NotReady(f"The server is {self.state}."))

    def _publish(self, events: Sequence[OutputEvent]) -> None:
        """Give each stream its events, with one wake-up per event loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[ResponseStream, OutputEvent]]] = defaultdict(list)
        with self._wake:
            for event in events:
                key = f"{event.request_id}/{event.index}"
                stream = self._streams[key]
                self._admission.begun(key)
                if event.token_ids:
                    self._admission.generated(stream._caller, len(event.token_ids))
                if event.finish_reason is not None:
                    del self._streams[key]
                batches[stream._loop].append((stream, event))
            empty = not self._streams
        for loop, batch in batches.items():
            with suppress(RuntimeError):  # that event loop has closed; nobody is left to read
                loop.call_soon_threadsafe(_deliver, batch)
        if empty and self._drained is not None and self._drained_loop is not None:
            with suppress(RuntimeError):  # likewise closed
                self._drained_loop.call_soon_threadsafe(self._drained.set)

    def _abandon(self, message: str) -> None:
        """End every stream that is still open without asking the engine."""
        with self._wake:
            keys = list(self._streams)
        self._publish(
            [OutputEvent(*_split(key), finish_reason=FinishReason.ERROR, error=message) for key in keys]
        )


def _parts(base: AnyModel) -> int:
    return 1 if isinstance(base, RemoteModel) or base.sharding is None else base.sharding.size


def _run_errand(errand: Callable[[], None], future: Future[None]) -> None:
    try:
        errand()
    except Exception as error:  # the caller's to handle; the engine goes on
        future.set_exception(error)
    else:
        future.set_result(None)


def _deliver(batch: Sequence[tuple[ResponseStream, OutputEvent]]) -> None:
    for stream, event in batch:
        if not stream._unread.put(event):
            stream.cancel()


def _split(key: str) -> tuple[str, int]:
    request_id, _, index = key.rpartition("/")
    return request_id, int(index)


def _prompt_tokens(choice: Choice) -> int:
    return len(choice.scheduled.lanes[0].prompt)
