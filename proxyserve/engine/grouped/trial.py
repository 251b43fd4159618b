"""Do two models give the same together as apart, and is it faster?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep, thread_time

import torch

from proxyserve.engine.attention import Span
from proxyserve.engine.grouped.shell import NotAlike, Shell
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.packed_row import PackedRow
from proxyserve.engine.runner import Runner
from proxyserve.engine.verify import logit_error, logit_tolerance

#: Tokens of each model, one of each lane.
SIZES = (1, 8, 32)
_BLOCK = 16
_PROMPTS = (5, 6)
_REPEATS, _SECONDS = 3, 0.5
_REST_SECONDS = 0.02
#: A model whose forward takes as long as this does not wait for Python.
_SLOW_SECONDS = 0.25
#: How much faster is faster.
_GAIN = 1.02


@dataclass(frozen=True, slots=True)
class Speedups:
    """How many times faster two models are together, by tokens of each."""

    by_tokens: Mapping[int, float]

    @property
    def most_tokens(self) -> int:
        """Tokens of each model up to which it pays, 0 if it never does."""
        most = 0
        for tokens, ratio in sorted(self.by_tokens.items()):
            if ratio < _GAIN:
                break
            most = tokens
        return most

    def __str__(self) -> str:
        return ", ".join(f"{ratio:.2f}x at {tokens}" for tokens, ratio in self.by_tokens.items())


class Trial:
    """Two models beside what steps do with them: they only read the weights, and use KV blocks of their own."""

    def __init__(self, first: Runner, second: Runner, busy: Callable[[], bool] = lambda: False) -> None:
        """Rests after each forward as long as `busy` says so. Raises NotAlike."""
        self._runners = (first, second)
        self._busy = busy
        self.shell = Shell(first.model.module)
        for runner in self._runners:
            self.shell.add(runner.model.module)
        self._storage = KVStorage(
            first.shapes,
            num_blocks=2 * max(SIZES),
            block_size=_BLOCK,
            dtype=first.model.dtype,
            device=first.model.device,
        )

    @torch.inference_mode()
    def verify(self) -> None:
        """A prompt of each, not of one length, then a token of each, then of one. Raises NotAlike unless logits are as
        they are apart. The shell then knows where in its layers' inputs the tokens are, and whether anything is done to
        logits."""
        first, second = _PROMPTS
        sizes = {
            value for value in self._runners[0].model.module.config.to_dict().values() if type(value) is int
        }
        while first + second in sizes:  # tokens must not look like heads or features
            second += 1
        for start, counts in ((0, (first, second)), (second, (1, 1)), (second + 1, (0, 1))):
            members = [place for place, count in enumerate(counts) if count]
            rows = {place: self._row(place, [place], start, counts[place]) for place in members}
            together = self.shell.compute(rows, self._storage)
            self._rest()
            for place, logits in zip(members, together, strict=True):
                alone = self._row(place, [2 + place], start, counts[place])
                expected = self._runners[place].compute(alone, self._storage)
                if not logit_error(logits, expected) <= logit_tolerance(expected.dtype):  # NaN is none either
                    raise NotAlike("they give other logits together")
        self.shell.bare = True
        again = self.shell.compute(rows, self._storage)
        self.shell.bare = all(map(torch.equal, again, together))

    def release(self) -> Shell:
        """The shell, without members."""
        for place in (0, 1):
            self.shell.remove(place)
        return self.shell

    @torch.inference_mode()
    def measure(self) -> Speedups:
        """Turns alternate, and the fastest of each counts."""
        ratios: dict[int, float] = {}
        for size in SIZES:
            blocks = range(size)
            rows = {
                place: self._row(place, [2 * block + place for block in blocks], 8, 1) for place in (0, 1)
            }
            apart = together = math.inf
            slow = self._time_apart(rows) > _SLOW_SECONDS
            until = perf_counter() + _SECONDS
            for repeat in range(0 if slow else 1 + _REPEATS):
                if repeat > 1 and perf_counter() > until:
                    break
                once, both = self._time_apart(rows), self._time_together(rows)
                if repeat:  # the first is for memory and layouts that are made at their first use
                    apart, together = min(apart, once), min(together, both)
            if slow:
                break
            ratios[size] = apart / together
        return Speedups(ratios)

    def _time_apart(self, rows: Mapping[int, PackedRow]) -> float:
        self._rest()
        started = self._now()
        for place, row in rows.items():
            self._runners[place].compute(row, self._storage)
        return self._now() - started

    def _time_together(self, rows: Mapping[int, PackedRow]) -> float:
        self._rest()
        started = self._now()
        self.shell.compute(rows, self._storage)
        return self._now() - started

    def _rest(self) -> None:
        if self._busy():
            sleep(_REST_SECONDS)

    def _now(self) -> float:
        """Seconds. On a CPU those of this thread: others may work beside it."""
        device = self._runners[0].model.device
        if device.type == "cpu":
            return thread_time()
        torch.cuda.synchronize(device)
        return perf_counter()

    def _row(self, place: int, blocks: Sequence[int], start: int, count: int) -> PackedRow:
        """Some tokens of a model, `count` of each of as many lanes as there are blocks."""
        positions = [position for _ in blocks for position in range(start, start + count)]
        vocabulary = self._runners[place].model.vocabulary.size
        return PackedRow(
            [(place + 7 * position) % vocabulary for position in positions],
            positions,
            [Span([block], start, count) for block in blocks],
            list(range(count - 1, len(positions), count)),
        )
