"""What solving weights costs: steps of rule `dynamic` beside steps of rule `proxy`, with the same lanes.

A few percent are less than the noise of a shared machine from one second to the next, so turns are short, everybody's
turns alternate, and of each turn the median step counts; the best turn of each is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from statistics import fmean, median
from time import perf_counter

import torch

from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.fusion.rules.dynamic import Dynamic
from proxyserve.fusion.weights import ExpertWeight
from proxyserve.types import SamplingParams

BATCH = 8
TURNS = 12
#: Timed steps of a turn.
STEPS = 24


@dataclass(frozen=True, slots=True)
class SolvingRow:
    """`step` and `proxy_step` in seconds; the latter with the same experts at fixed weights. `mean_weight` is the mean
    of the solved weights."""

    law: str
    step: float
    proxy_step: float
    mean_weight: float

    @property
    def overhead(self) -> float:
        """What a step takes longer, as a share of the step with fixed weights."""
        return self.step / self.proxy_step - 1.0


@dataclass(frozen=True, slots=True)
class SolvingResult:
    """At `batch` requests in decoding. `laws` says what the models' laws are like."""

    laws: str
    batch: int
    rows: tuple[SolvingRow, ...]


def measure_solving(
    engine: Engine,
    first: str,
    second: str,
    *,
    laws: str,
    prompt: int = 64,
    turns: int = TURNS,
    steps: int = STEPS,
    progress: Callable[[str], None] = lambda message: None,
) -> SolvingResult:
    """`first` and `second` are experts of the engine, `prompt` tokens per request, `turns` and `steps` as above."""
    one, two = (ExpertWeight(first),), (ExpertWeight(first), ExpertWeight(second))
    contestants = {
        "one expert": proxy({first: 1.0}),
        "exact, both": Fusion(Dynamic(one, match="both")),
        "exact, forward": Fusion(Dynamic(one, match="forward")),
        "paper": Fusion(Dynamic(one, mode="paper")),
        "two experts": proxy({first: 1.0, second: 1.0}),
        "ray, both": Fusion(Dynamic(two, mode="ray", match="both")),
    }
    rivals = {
        "exact, both": "one expert",
        "exact, forward": "one expert",
        "paper": "one expert",
        "ray, both": "two experts",
    }
    best = dict.fromkeys(contestants, float("inf"))
    weights: dict[str, float] = {}
    numbers = count()
    for turn in range(turns):
        progress(f"solving weights, {laws}, turn {turn + 1} of {turns}")
        for name, fusion in contestants.items():
            seconds, weights[name] = _turn(engine, fusion, prompt, steps, f"solving-{next(numbers)}")
            best[name] = min(best[name], seconds)
    rows = tuple(
        SolvingRow(f"{law}, {rival}", best[law], best[rival], weights[law]) for law, rival in rivals.items()
    )
    return SolvingResult(laws, BATCH, rows)


def _turn(engine: Engine, fusion: Fusion, prompt: int, steps: int, name: str) -> tuple[float, float]:
    """Median seconds of a step in which every request gets a token and none has a prompt left, and the mean of the
    solved weights (NaN if none are)."""
    vocabulary = engine.models.base.vocabulary.size
    prompts = torch.randint(
        1, vocabulary, (BATCH, prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()
    # Some tokens more than are timed: prompts end one after another, and none may be through with its answer by then.
    sampling = SamplingParams(max_tokens=steps + 2 * BATCH, temperature=0.0, ignore_eos=True)
    keys = []
    for number, ids in enumerate(prompts):
        keys += engine.submit(Submission(f"{name}-{number}", LanePrompts(tuple(ids)), sampling, fusion))
    started: set[str] = set()
    while len(started) < BATCH:
        started |= {event.request_id for event in engine.step() if event.token_ids}
    seconds = []
    for _ in range(steps):
        before = perf_counter()
        engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(perf_counter() - before)
    weights: list[float] = []
    for last in map(engine.cancel, keys):
        if last is not None and last.fusion is not None and last.fusion.mean_weights:
            weights += last.fusion.mean_weights.values()
    return median(seconds), fmean(weights) if weights else float("nan")
