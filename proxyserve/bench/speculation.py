"""What speculation gives: fused decoding with it, without it, the base alone and the plain Hugging Face loop, over
models whose drafts stand at a chosen share of tokens, and over the demo family, whose drafts stand as often as they do.

In each round everybody has one turn; the median round of each counts. Times are those of whole answers, prompts
included.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from proxyserve.bench.agreeing import AgreeingFamily, build_agreeing_family
from proxyserve.bench.models import BASE, EXPERT, LARGE, LARGE_EXPERT, VOCABULARY, ModelShape
from proxyserve.config import EngineConfig, Speculate
from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import make_world
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.evaluation.hf_loop import generate_fused
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement
from proxyserve.types import SamplingParams

SHARES = (0.0, 0.5, 0.8, 0.95)
BATCHES = (1, 4, 16)
#: Shapes of a base and of its experts, by the size of the base.
SIZES: Mapping[str, tuple[ModelShape, ModelShape]] = {
    "68M": (BASE, EXPERT),
    "300M": (LARGE, LARGE_EXPERT),
}
DEMO = "demo"

#: How our own contestants decode, by name. Where one token is drafted each draft is tried, which measures acceptance.
_ALWAYS_ONE = "1 draft"
_OURS: Mapping[str, Speculate] = {"plain": "off", "auto": "auto", _ALWAYS_ONE: 1, "4 drafts": 4}
_LOOP, _BASE = "loop", "base"
_KV_MEMORY = 2**29
_SEED = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one contestant: `seconds` per generated token of each round, over all requests together; and in the last
    round, how many tokens were `drafted`, how many of them stood, and how many a request got per step."""

    seconds: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    tokens_per_step: float = 1.0

    @property
    def speed(self) -> float:
        """Tokens per second, all requests together, in the median round."""
        return 1.0 / median(self.seconds)


@dataclass(frozen=True, slots=True)
class SpeculationRow:
    """`batch` requests at once to `models`, whose drafts are to stand at `share` of the tokens (None: as it comes).
    Contestants: `plain` is fused decoding without drafts, `auto` with as many as pay, `1 draft` and `4 drafts` with so
    many at each token; `base` is the base alone in the same engine, `loop` fused decoding with plain Hugging Face
    models, all requests as one batch (not for the demo family, whose answers end where they end)."""

    models: str
    share: float | None
    batch: int
    contestants: Mapping[str, Measured]

    @property
    def acceptance(self) -> float:
        """The share of drafts that stood, of those that were tried; NaN if none was."""
        tried = self.contestants[_ALWAYS_ONE]
        return tried.accepted / tried.drafted if tried.drafted else float("nan")

    @property
    def ratios(self) -> dict[str, float]:
        """Of medians."""
        return {name: median(ratios) for name, ratios in self.ratios_by_round.items()}

    @property
    def ratios_by_round(self) -> dict[str, list[float]]:
        """Of contestants in one round, which a change of the machine's speed concerns alike."""
        pairs = {f"auto / {name}": name for name in ("plain", _BASE, _LOOP) if name in self.contestants}
        auto = self.contestants["auto"].seconds
        return {
            title: [other / own for other, own in zip(self.contestants[name].seconds, auto, strict=True)]
            for title, name in pairs.items()
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "share": self.share,
            "batch": self.batch,
            "acceptance": self.acceptance,
            "contestants": {
                name: {**asdict(measured), "tokens_per_second": measured.speed}
                for name, measured in self.contestants.items()
            },
            "ratios": self.ratios,
            "ratios_by_round": self.ratios_by_round,
        }


@dataclass(frozen=True, slots=True)
class _Question:
    """`expert` is the one that is fused in; None: the base alone."""

    prompt: tuple[int, ...]
    expert: str | None
    sampling: SamplingParams


def measure_speculation(
    placement: Placement,
    *,
    sizes: Sequence[str] = tuple(SIZES)[:1],
    shares: Sequence[float] = SHARES,
    batches: Sequence[int] = BATCHES,
    prompt: int = 64,
    new: int = 64,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> list[SpeculationRow]:
    """Rows for each of the `sizes` (of `SIZES`, or `DEMO`), batches and shares, with `prompt` and `new` tokens per
    request where texts are made up. Takes minutes."""
    rows = []
    for name in sizes:
        progress(f"speculation: making {name}")
        if name == DEMO:
            rows += _measure_demo(placement, batches, rounds, progress)
            continue
        base, expert = SIZES[name]
        with TemporaryDirectory() as folder:
            family = build_agreeing_family(Path(folder), shares, base=base, expert=expert)
            rows += _measure_family(name, family, placement, batches, (prompt, new), rounds, progress)
        gc.collect()
    return rows


def _measure_family(
    name: str,
    family: AgreeingFamily,
    placement: Placement,
    batches: Sequence[int],
    lengths: tuple[int, int],
    rounds: int,
    progress: Callable[[str], None],
) -> list[SpeculationRow]:
    experts = [ExpertSource(_name(share), *folders) for share, folders in family.experts.items()]
    engine = _load(family.base, experts, placement, max(batches))
    base = _peer(family.base, placement)
    loops = {
        share: (base, *(_peer(folder, placement) for folder in folders))
        for share, folders in family.experts.items()
    }
    prompt, new = lengths
    generator = torch.Generator().manual_seed(_SEED)
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    rows = []
    for batch in batches:
        ids = torch.randint(1, VOCABULARY, (batch, prompt), generator=generator)
        on_device = ids.to(placement.device)
        for share, models in loops.items():

            def loop(models: Sequence[PreTrainedModel] = models, ids: torch.Tensor = on_device) -> int:
                tokens = generate_fused(models, (1.0, 1.0, -1.0), ids, new).numel()
                return int(tokens)

            questions = [_Question(tuple(text), _name(share), sampling) for text in ids.tolist()]
            contest = _Contest(engine, questions, batch, loop)
            rows.append(contest.run(name, share, rounds, progress))
    return rows


def _measure_demo(
    placement: Placement, batches: Sequence[int], rounds: int, progress: Callable[[str], None]
) -> list[SpeculationRow]:
    """Questions of all skills in turn, each to its own expert."""
    paths = family_paths()
    experts = [ExpertSource(name, folder, paths.untuned) for name, folder in paths.experts.items()]
    engine = _load(paths.base, experts, placement, max(batches))
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    people = make_world().test
    asked = {name: iter(skill.examples(people)) for name, skill in SKILLS.items()}
    questions = [
        _Question(
            tuple(tokenizer.encode(example.prompt)),
            name,
            SamplingParams(max_tokens=SKILLS[name].max_tokens, temperature=0.0),
        )
        for name, examples in asked.items()
        for example in islice(examples, max(batches))
    ]
    return [_Contest(engine, questions, batch).run(DEMO, None, rounds, progress) for batch in batches]


class _Contest:
    """Questions that are answered `batch` at once, by everybody."""

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[_Question],
        batch: int,
        loop: Callable[[], int] | None = None,
    ) -> None:
        self._engine = engine
        self._questions = questions
        self._batch = batch
        self._loop = loop
        self._names = count()

    def run(
        self, models: str, share: float | None, rounds: int, progress: Callable[[str], None]
    ) -> SpeculationRow:
        alone = [replace(question, expert=None) for question in self._questions]
        measured = {name: Measured() for name in (*_OURS, _BASE)}
        if self._loop is not None:
            measured[_LOOP] = Measured()
        self._answer("auto", self._questions)  # what it learns at first is not what it costs
        for number in range(rounds):
            for name, result in list(measured.items()):
                progress(
                    f"speculation, {models}, share {share}, batch {self._batch}, "
                    f"round {number + 1} of {rounds}: {name}"
                )
                started = perf_counter()
                found = Measured()
                if name == _LOOP and self._loop is not None:
                    tokens = self._loop()
                elif name == _BASE:
                    tokens, found = self._answer("off", alone)
                else:
                    tokens, found = self._answer(_OURS[name], self._questions)
                seconds = (perf_counter() - started) / tokens
                measured[name] = replace(found, seconds=[*result.seconds, seconds])
        return SpeculationRow(models, share, self._batch, measured)

    def _answer(self, speculate: Speculate, questions: Sequence[_Question]) -> tuple[int, Measured]:
        """Answer all of them. How many tokens that were, and the counts."""
        engine = self._engine
        engine.speculator.speculate = speculate
        waiting = list(reversed(questions))
        running = tokens = drafted = accepted = steps = 0
        while waiting or running:
            while waiting and running < self._batch:
                running += 1
                engine.submit(self._submission(waiting.pop()))
            steps += running
            for event in engine.step():
                tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    running -= 1
                    if event.fusion is not None:
                        drafted += event.fusion.drafted or 0
                        accepted += event.fusion.accepted or 0
        return tokens, Measured([], drafted, accepted, tokens / steps)

    def _submission(self, question: _Question) -> Submission:
        fusion = Fusion() if question.expert is None else proxy({question.expert: 1.0})
        name = f"speculation-{next(self._names)}"
        return Submission(name, LanePrompts(question.prompt), question.sampling, fusion)


def _name(share: float) -> str:
    return f"stands-{round(100 * share)}"


def _load(base: Path, experts: Sequence[ExpertSource], placement: Placement, most: int) -> Engine:
    config = EngineConfig(max_batch=most, kv_memory=_KV_MEMORY, prefix_cache=False)
    return Engine(load_family(base, experts, placement=placement), config)


def _peer(folder: Path, placement: Placement) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=placement.dtype)
    return model.eval().to(placement.device)
