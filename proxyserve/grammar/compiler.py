"""From grammars to constraints, beside the step loop: tried in another process, compiled once, kept."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from proxyserve.config import GrammarLimits
from proxyserve.errors import InvalidRequest, NotReady, QueueFull
from proxyserve.grammar.constraint import CompiledGrammar
from proxyserve.grammar.gatekeeper import Gatekeeper
from proxyserve.grammar.grammar import Grammar
from proxyserve.grammar.table import TokenTable, matcher
from proxyserve.grammar.trial import Refused, TookTooLong
from proxyserve.grammar.workers import MaskWorkers

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer

#: How long a refusal is remembered. Not for ever, since a busy machine may have been the reason.
_REFUSED_SECONDS = 60.0

#: What comes of a request for a grammar; `cached` also where it waits for another request's.
Outcome = Literal["compiled", "cached", "refused", "timed_out"]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A compiled grammar of about `cost` bytes, or why there is none."""

    compiled: CompiledGrammar | None
    cost: int
    outcome: Outcome = "compiled"
    refusal: str = ""
    until: float = float("inf")


class GrammarCompiler:
    """Compiles grammars for one vocabulary on a thread of its own, one after another. Equal grammars that are asked
    for at the same time are compiled once; what was used last is kept. Its process starts with the first grammar."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        limits: GrammarLimits | None = None,
        *,
        observe: Callable[[Outcome, float | None], None] | None = None,
    ) -> None:
        """`end_ids` end a text where nobody says otherwise. `observe` is told what comes of each request, and the
        seconds that compiling took; on any thread."""
        self.limits = limits or GrammarLimits()
        self._observe = observe or (lambda outcome, seconds: None)
        self._end_ids = frozenset(end_ids)
        self._table = TokenTable.of(tokenizer)
        self._tokenizer = self._table.tokenizer()
        self._workers = MaskWorkers(self._table.words)
        self.gatekeeper = Gatekeeper(self._table, self.limits)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proxyserve-grammars")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the last used last
        self._cost = 0
        self._waiting: dict[str, Future[_Kept]] = {}
        self._closed = False

    def compile(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Returns at once. The future fails with InvalidRequest, naming the grammar's field, or NotReady.

        Raises QueueFull."""
        asked: Future[CompiledGrammar] = Future()
        with self._lock:
            kept = self._look_up(grammar.digest)
            work = None if kept is not None else self._waiting.get(grammar.digest)
            joins = kept is not None or work is not None
            if not joins:
                work = self._enqueue(grammar)
        if joins:
            self._observe("refused" if kept is not None and kept.compiled is None else "cached", None)
        if kept is not None:
            _settle(asked, kept, grammar)
        elif work is not None:
            work.add_done_callback(lambda done: _pass_on(asked, done, grammar))
        return asked

    def close(self) -> None:
        """End the process and refuse what waits. Safe to call more than once."""
        with self._lock:
            self._closed = True
        self.gatekeeper.close()
        self._thread.shutdown(wait=True)

    def _look_up(self, digest: str) -> _Kept | None:
        kept = self._kept.get(digest)
        if kept is None:
            return None
        if time.monotonic() > kept.until:
            self._forget(digest)
            return None
        self._kept.move_to_end(digest)
        return kept

    def _enqueue(self, grammar: Grammar) -> Future[_Kept]:
        if self._closed:
            raise NotReady("The server is shutting down.")
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} grammars wait to be compiled; try again later.", retry_after=1.0
            )
        work = self._waiting[grammar.digest] = self._thread.submit(self._work, grammar)
        return work

    def _work(self, grammar: Grammar) -> _Kept:
        """Runs on the thread."""
        kept: _Kept | None = None
        begun = time.monotonic()
        try:
            kept = self._compile(grammar)
            self._observe(kept.outcome, time.monotonic() - begun)
            return kept
        finally:
            with self._lock:
                del self._waiting[grammar.digest]
                if kept is not None:
                    self._keep(grammar.digest, kept)

    def _compile(self, grammar: Grammar) -> _Kept:
        if self._closed:
            raise NotReady("The server is shutting down.")
        try:
            passed = self.gatekeeper.ask(grammar)
            compiled = matcher(passed.source, self._tokenizer, self.limits)
            if compiled.is_error():  # unexpected: it passed under the same limits
                raise Refused(f"cannot be used: {compiled.get_error()}")
        except Refused as refused:
            outcome: Outcome = "timed_out" if isinstance(refused, TookTooLong) else "refused"
            return _Kept(None, 0, outcome, str(refused), time.monotonic() + _REFUSED_SECONDS)
        ready = CompiledGrammar(compiled, self._table, self._workers, self._end_ids)
        return _Kept(ready, passed.cost)

    def _keep(self, digest: str, kept: _Kept) -> None:
        self._kept[digest] = kept
        self._cost += kept.cost
        while len(self._kept) > self.limits.max_cached or self._cost > self.limits.max_cached_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, digest: str) -> None:
        self._cost -= self._kept.pop(digest).cost


def _pass_on(asked: Future[CompiledGrammar], done: Future[_Kept], grammar: Grammar) -> None:
    error = done.exception()
    if error is not None:
        if asked.set_running_or_notify_cancel():
            asked.set_exception(error)
    else:
        _settle(asked, done.result(), grammar)


def _settle(asked: Future[CompiledGrammar], kept: _Kept, grammar: Grammar) -> None:
    """Each caller's error names its own field."""
    if not asked.set_running_or_notify_cancel():
        return  # nobody waits any more
    if kept.compiled is None:
        asked.set_exception(InvalidRequest(f"'{grammar.param}' {kept.refusal}.", param=grammar.param))
    else:
        asked.set_result(kept.compiled)
