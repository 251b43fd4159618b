"""A batch of different requests beside batches of equal ones: a third of it plain, a third with one expert, a third
with three. If mixing them cost nothing, its time per token would be the mean of the three pure batches', weighted by
their shares of the requests.

In each round everybody has one turn; the median round counts. Times are those of whole answers, prompts included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from proxyserve.bench.agreeing import build_agreeing_family
from proxyserve.bench.models import BASE, EXPERT, ModelShape
from proxyserve.config import EngineConfig, Speculate
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement
from proxyserve.types import SamplingParams

BATCH = 24
KINDS = ("plain", "one expert", "three experts")
MIXED = "mixed"
SPECULATE: Sequence[Speculate] = ("off", "auto")

#: Of tokens at which drafts of the three experts stand.
_SHARES = (0.95, 0.9, 0.8)
_KV_MEMORY = 2**29


@dataclass(frozen=True, slots=True)
class MixedRow:
    """`batch` requests at once, of which request i is of kind i modulo 3. `seconds` per generated token of each round,
    over all requests together, by kind and for the mix."""

    speculate: Speculate
    batch: int
    seconds: Mapping[str, Sequence[float]]

    @property
    def shares(self) -> dict[str, float]:
        """Of the mix, by kind."""
        return {
            kind: len(range(number, self.batch, len(KINDS))) / self.batch for number, kind in enumerate(KINDS)
        }

    @property
    def speeds(self) -> dict[str, float]:
        """Tokens per second in the median round."""
        return {name: 1.0 / median(seconds) for name, seconds in self.seconds.items()}

    @property
    def ratios_by_round(self) -> list[float]:
        """What the mix reaches of the weighted mean of the pure batches in its round: 1 if mixing costs nothing."""
        rounds = zip(*(self.seconds[kind] for kind in KINDS), self.seconds[MIXED], strict=True)
        return [
            sum(share * time for share, time in zip(self.shares.values(), pure, strict=True)) / mixed
            for *pure, mixed in rounds
        ]

    @property
    def ratio(self) -> float:
        """Of the median round."""
        return median(self.ratios_by_round)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "tokens_per_second": self.speeds,
            "ratio": self.ratio,
            "ratios_by_round": self.ratios_by_round,
        }


def measure_mixed(
    placement: Placement,
    *,
    base: ModelShape = BASE,
    expert: ModelShape = EXPERT,
    batches: Sequence[int] = (BATCH,),
    prompt: int = 64,
    new: int = 64,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> list[MixedRow]:
    """A row per batch, without speculation and with it, of `prompt` and `new` tokens per request."""
    progress("mixed: making models")
    with TemporaryDirectory() as folder:
        family = build_agreeing_family(Path(folder), _SHARES, base=base, expert=expert)
        experts = [
            ExpertSource(f"expert-{number}", *folders)
            for number, folders in enumerate(family.experts.values())
        ]
        config = EngineConfig(max_batch=max(batches), kv_memory=_KV_MEMORY, prefix_cache=False)
        engine = Engine(load_family(family.base, experts, placement=placement), config)
    return [row for batch in batches for row in _Mix(engine, batch, prompt, new).measure(rounds, progress)]


class _Mix:
    """Requests of all kinds to one engine."""

    def __init__(self, engine: Engine, batch: int, prompt: int, new: int) -> None:
        self._engine = engine
        self._batch = batch
        vocabulary = engine.models.base.vocabulary.size
        generator = torch.Generator().manual_seed(0)
        self._prompts = torch.randint(1, vocabulary, (batch, prompt), generator=generator).tolist()
        self._sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        self._names = count()

    def measure(self, rounds: int, progress: Callable[[str], None]) -> list[MixedRow]:
        contestants = [(speculate, name) for speculate in SPECULATE for name in (*KINDS, MIXED)]
        seconds: dict[tuple[Speculate, str], list[float]] = {contestant: [] for contestant in contestants}
        self._turn("auto", MIXED)  # what it learns at first is not what it costs
        for number in range(rounds):
            for speculate, name in contestants:
                progress(
                    f"mixed, batch {self._batch}, speculation {speculate}, round {number + 1} of {rounds}: {name}"
                )
                seconds[speculate, name].append(self._turn(speculate, name))
        return [
            MixedRow(speculate, self._batch, {name: seconds[speculate, name] for name in (*KINDS, MIXED)})
            for speculate in SPECULATE
        ]

    def _turn(self, speculate: Speculate, name: str) -> float:
        """Seconds per generated token of a batch of that kind, or of the mix."""
        engine = self._engine
        engine.speculator.speculate = speculate
        for number, ids in enumerate(self._prompts):
            kind = KINDS[number % len(KINDS)] if name == MIXED else name
            fusion = self._fusion(kind, number // len(KINDS))
            engine.submit(
                Submission(f"mixed-{next(self._names)}", LanePrompts(tuple(ids)), self._sampling, fusion)
            )
        tokens = 0
        started = perf_counter()
        while engine.has_work:
            tokens += sum(len(event.token_ids) for event in engine.step())
        return (perf_counter() - started) / tokens

    def _fusion(self, kind: str, turn: int) -> Fusion:
        """Requests with one expert have each of them in turn."""
        experts = list(self._engine.models.experts)
        match kind:
            case "plain":
                return Fusion()
            case "one expert":
                return proxy({experts[turn % len(experts)]: 1.0})
        return proxy(dict.fromkeys(experts, 1.0 / len(experts)))
