"""What streams notice when a long prompt arrives: the longest time between two of their tokens.

Streams decode over the base and one expert; a prompt of 2,000 tokens for the same three models comes while they do. It
is measured with the portions that prompts are cut into beside streams by default, and without any limit but
`max_batch_tokens`; these alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

from proxyserve.bench.models import VOCABULARY, BenchFamily
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.fusion.fusion import proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement
from proxyserve.types import SamplingParams

STREAMS = (1, 8, 32)
PROMPT = 2_000
#: Context of the models, which must hold the prompt.
CONTEXT = 4_096
_ROUNDS = 3
_BEFORE = 16
_FUSION = proxy({"expert": 1.0})
_KV_MEMORY = 2**30


@dataclass(frozen=True, slots=True)
class StallRow:
    """With `streams` that decode and prompts in portions, or not. Seconds, medians of the rounds: `usual` is the median
    step before the prompt came, `worst` the longest between its arrival and its first token, `first` the time from one
    to the other."""

    streams: int
    portions: bool
    usual: float
    worst: float
    first: float

    @property
    def ratio(self) -> float:
        return self.worst / self.usual

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def measure_stalls(
    family: BenchFamily, placement: Placement, *, progress: Callable[[str], None] = lambda _: None
) -> list[StallRow]:
    """Measure each number of streams both ways. The models' context must hold `PROMPT` tokens."""
    config = EngineConfig(
        max_batch=max(STREAMS) + 1, kv_memory=_KV_MEMORY, prefix_cache=False, speculate="off"
    )
    expert = ExpertSource("expert", family.tuned, family.untuned)
    engine = Engine(load_family(family.base, [expert], placement=placement), config)
    limit = engine.scheduler.prefill_tokens
    names = count()
    found: dict[tuple[int, bool], list[tuple[float, float, float]]] = {}
    for number in range(_ROUNDS):
        for streams in STREAMS:
            for portions in (True, False):
                progress(f"stalls, round {number + 1} of {_ROUNDS}: {streams} streams")
                engine.scheduler.prefill_tokens = limit if portions else None
                found.setdefault((streams, portions), []).append(_measure(engine, streams, names.__next__))
    engine.scheduler.prefill_tokens = limit
    return [
        StallRow(streams, portions, *(median(column) for column in zip(*rounds, strict=True)))
        for (streams, portions), rounds in found.items()
    ]


def _measure(engine: Engine, streams: int, number: Callable[[], int]) -> tuple[float, float, float]:
    """Usual, worst and first."""
    keys: list[str] = []
    for _ in range(streams):
        keys += engine.submit(_submission(f"stream{number()}", [3, 4, 5], CONTEXT // 2))
    engine.step()  # their prompts
    usual = median(_step(engine)[0] for _ in range(_BEFORE))
    [late] = engine.submit(_submission(f"long{number()}", [n * 31 % VOCABULARY for n in range(PROMPT)], 1))
    steps: list[float] = []
    done = False
    while not done:
        seconds, ended = _step(engine)
        steps.append(seconds)
        done = late in ended
    for key in keys:
        engine.cancel(key)
    return usual, max(steps), sum(steps)


def _submission(name: str, prompt: Sequence[int], new: int) -> Submission:
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    return Submission(name, LanePrompts(tuple(prompt)), sampling, _FUSION)


def _step(engine: Engine) -> tuple[float, set[str]]:
    """Seconds, and the choices that ended."""
    started = perf_counter()
    events = engine.step()
    seconds = perf_counter() - started
    return seconds, {
        f"{event.request_id}/{event.index}" for event in events if event.finish_reason is not None
    }
