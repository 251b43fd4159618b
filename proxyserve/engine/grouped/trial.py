"""Do models give the same together as apart, and is it faster?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, sleep, thread_time

import torch
from torch import Tensor

from proxyserve.engine.attention import AttentionPlan, Span
from proxyserve.engine.grouped.shell import NotAlike, Shell
from proxyserve.engine.kv_storage import KVStorage
from proxyserve.engine.packed_row import PackedRow
from proxyserve.engine.runner import Runner
from proxyserve.engine.verify import logit_error, logit_tolerance

#: Tokens of each model, one of each lane.
SIZES = (1, 8, 32)
_BLOCK = 16
_PROMPT = 5
_REPEATS, _SECONDS = 3, 1.0
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
    """Models beside what steps do with them: they only read the weights, and use KV blocks of their own."""

    def __init__(self, runners: Sequence[Runner], busy: Callable[[], bool] = lambda: False) -> None:
        """Rests after each forward as long as `busy` says so. Raises NotAlike."""
        self._runners = runners
        self._busy = busy
        first = runners[0].model
        self.shell = Shell(first.module)
        for runner in runners:
            self.shell.add(self.shell.seat(runner.model.module))
        self._storage = KVStorage(
            runners[0].shapes,
            num_blocks=len(runners) * max(SIZES),
            block_size=_BLOCK,
            dtype=first.dtype,
            device=first.device,
        )

    @torch.inference_mode()
    def verify(self) -> None:
        """A prompt of each, not of one length, then a token of each, then of all but the first. Raises NotAlike unless
        logits are as they are apart. The shell then knows where in its layers' inputs the tokens are, and whether
        anything is done to logits."""
        members = range(len(self._runners))
        prompts = [_PROMPT + place for place in members]
        config = self._runners[0].model.module.config.to_dict()
        while sum(prompts) in config.values():  # tokens must not look like heads or features
            prompts[-1] += 1
        after = prompts[-1]
        for start, counts in (
            (0, prompts),
            (after, [1] * len(prompts)),
            (after + 1, [0, *[1] * (len(prompts) - 1)]),
        ):
            rows = {
                place: self._row(place, [place], start, counts[place]) for place in members if counts[place]
            }
            together = self._together(rows)
            for (place, row), logits in zip(rows.items(), together, strict=True):
                alone = replace(row, spans=[Span([len(members) + place], start, counts[place])])
                expected = self._runners[place].compute(alone, self._plan(alone.spans))
                if not logit_error(logits, expected) <= logit_tolerance(expected.dtype):  # NaN is none either
                    raise NotAlike("they give other logits together")
            self._rest()
        self.shell.bare = True
        again = self._together(rows)
        self.shell.bare = all(map(torch.equal, again, together))

    def release(self) -> Shell:
        """The shell, without members."""
        for place in range(len(self._runners)):
            self.shell.remove(place)
        return self.shell

    def measure(self) -> Speedups:
        """The fastest turns are compared."""
        ratios: dict[int, float] = {}
        for tokens in SIZES:
            apart, together = self.times(tokens, _REPEATS)
            if min(apart) > _SLOW_SECONDS:
                break
            ratios[tokens] = min(apart) / min(together)
        return Speedups(ratios)

    @torch.inference_mode()
    def times(self, tokens: int, repeats: int, seconds: float = _SECONDS) -> tuple[list[float], list[float]]:
        """Seconds of each turn apart and together, which alternate, with a token of each of `tokens` lanes of every
        model. Fewer turns if they take more than `seconds`."""
        each = range(len(self._runners))
        rows = {place: self._row(place, range(place, tokens * len(each), len(each)), 8, 1) for place in each}
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(1 + repeats):
            for found, run in zip(times, (self._apart, self._together), strict=True):
                self._rest()
                started = self._now()
                run(rows)
                found.append(self._now() - started)
            if repeat == 0 and times[0][0] < _SLOW_SECONDS:
                for found in times:  # what is made at its first use is there now
                    found.clear()
            elif sum(map(sum, times)) > seconds:
                break
        return times

    def _apart(self, rows: Mapping[int, PackedRow]) -> None:
        for place, row in rows.items():
            self._runners[place].compute(row, self._plan(row.spans))

    def _together(self, rows: Mapping[int, PackedRow]) -> list[Tensor]:
        spans = [span for row in rows.values() for span in row.spans]
        return self.shell.compute(rows, self._plan(spans))

    def _plan(self, spans: Sequence[Span]) -> AttentionPlan:
        """Not that of the models' own kernels: steps that run them meanwhile use the same working memory."""
        return AttentionPlan.of(spans, self._storage)

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
