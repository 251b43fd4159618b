"""What the engine counts, for metrics. Names of counters and histograms are those of the metrics, without prefix and
suffix; `api.families` says what each one means."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter

from proxyserve.engine.choice import Choice, Sampled
from proxyserve.engine.histogram import Histogram, HistogramStats
from proxyserve.engine.residents import AnyRunner
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import Plan
from proxyserve.types import FinishReason, ModelKey, OutputEvent, Timing, Usage

_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_REQUEST_SECONDS = (
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    40.0,
    60.0,
    120.0,
    240.0,
)
_WAIT_SECONDS = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_STEP_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: A shift of a few thousandths of a nat is nothing to see, one of a nat another text.
_NATS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_MASSES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)

_SUCCESSES = (FinishReason.STOP, FinishReason.LENGTH)

#: Series of single generations that each expert has at most.
_KEPT_GENERATIONS = 4
OLDER = "older"


@dataclass(slots=True)
class Histograms:
    """Each field is a metric of that name."""

    engine_step_seconds: Histogram = field(default_factory=lambda: Histogram(_STEP_SECONDS))
    iteration_tokens_total: Histogram = field(default_factory=lambda: Histogram(_STEP_TOKENS))
    step_barrier_wait_seconds: Histogram = field(default_factory=lambda: Histogram(_WAIT_SECONDS))
    inter_token_latency_seconds: Histogram = field(default_factory=lambda: Histogram(_TOKEN_SECONDS))
    request_queue_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_SECONDS))
    request_prefill_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_SECONDS))
    request_decode_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_SECONDS))
    request_time_per_output_token_seconds: Histogram = field(
        default_factory=lambda: Histogram(_TOKEN_SECONDS)
    )
    request_barrier_wait_seconds: Histogram = field(default_factory=lambda: Histogram(_WAIT_SECONDS))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    kl_nats: Histogram = field(default_factory=lambda: Histogram(_NATS))
    solved_weight: Histogram = field(default_factory=lambda: Histogram(_WEIGHTS))
    constraint_removed_mass: Histogram = field(default_factory=lambda: Histogram(_MASSES))

    def stats(self) -> dict[str, HistogramStats]:
        return {entry.name: getattr(self, entry.name).stats() for entry in fields(self)}


class GenerationCounts:
    """Choices that ended, by expert and generation. An expert that is swapped for years has a number for each of the
    `_KEPT_GENERATIONS` generations that ended a choice last, and one for all that came before."""

    def __init__(self) -> None:
        self._counts: dict[str, OrderedDict[str, int]] = {}

    def add(self, expert: str, generation: int) -> None:
        counts = self._counts.setdefault(expert, OrderedDict())
        number = str(generation)
        counts[number] = counts.get(number, 0) + 1
        counts.move_to_end(number)
        if len(counts) - (OLDER in counts) > _KEPT_GENERATIONS:
            oldest = next(number for number in counts if number != OLDER)
            counts[OLDER] = counts.get(OLDER, 0) + counts.pop(oldest)

    def copy(self) -> dict[tuple[str, str], int]:
        return {
            (expert, number): count
            for expert, counts in self._counts.copy().items()
            for number, count in counts.copy().items()
        }


@dataclass(slots=True)
class KeyCounts:
    """What ended on behalf of one key."""

    choices: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(slots=True)
class EngineCounters:
    """Since start; written on the engine's thread. `finished` counts choices by finish reason, `by_key` what they cost
    by the name of the caller (those without a name are not counted), a prompt once however many choices continue it;
    `step_failures` are steps that raised, `nonfinite_choices` choices that ended for want of a finite score;
    `prefix_queries` and `prefix_hits` are tokens of prompts by model. Prompt and cached tokens are those of base
    lanes. `drafts` counts how often a choice went ahead, and `draft_tokens` and `accepted_tokens` how far, by
    drafter."""

    steps: int = 0
    step_failures: int = 0
    nonfinite_choices: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    fused_tokens: int = 0
    gated_tokens: int = 0
    flips: int = 0
    sampling_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    by_generation: GenerationCounts = field(default_factory=GenerationCounts)
    by_key: dict[str, KeyCounts] = field(default_factory=dict)
    prefix_queries: Counter[str] = field(default_factory=Counter)
    prefix_hits: Counter[str] = field(default_factory=Counter)
    drafts: Counter[str] = field(default_factory=Counter)
    draft_tokens: Counter[str] = field(default_factory=Counter)
    accepted_tokens: Counter[str] = field(default_factory=Counter)
    histograms: Histograms = field(default_factory=Histograms)

    def scheduled(self, plan: Plan, choices: Mapping[str, Choice]) -> None:
        """The next step's work has been handed out."""
        self.preemptions += len(plan.preempted)
        now = perf_counter()
        for request in plan.admitted:
            clock = choices[request.request_id].clock
            if clock.admitted is None:
                clock.admitted = now
                self.histograms.request_queue_time_seconds.observe(now - clock.queued)
                for lane in request.lanes:
                    self.prefix_queries[lane.model.name] += len(lane.prompt)
                    self.prefix_hits[lane.model.name] += lane.cached

    def stepped(
        self, plan: Plan, runners: Mapping[ModelKey, AnyRunner], held: Iterable[Choice], started: float
    ) -> None:
        """A step that began at `started` has ended; `held` are the choices that it held up (see `held_up`)."""
        seconds = perf_counter() - started
        self.histograms.engine_step_seconds.observe(seconds)
        tokens = sum(item.drafted + item.count for work in plan.work.values() for item in work)
        self.histograms.iteration_tokens_total.observe(tokens)
        # A remote model that nothing was asked of has not run.
        ends = [end for trunk in plan.work if (end := runners[trunk].stats.ended) >= started]
        if len(ends) > 1:
            self.histograms.step_barrier_wait_seconds.observe(max(ends) - min(ends))
        for choice in held:
            choice.clock.barrier += seconds

    def sampled(self, results: Sequence[tuple[Choice, Sampled]], gaps: Mapping[Choice, float | None]) -> None:
        """One step's tokens. `gaps` are the seconds since their choices' last tokens before it, None where there was
        none; several tokens of one step share theirs, so that the mean is the time per token."""
        counts = Counter(choice for choice, _ in results)
        shares = [gap / counts[choice] for choice, _ in results if (gap := gaps[choice]) is not None]
        fused = [pair for pair in results if not pair[0].submission.fusion.is_base]
        compared = [sampled for choice, sampled in fused if choice.program.base is not None]
        self.tokens_generated += len(results)
        self.fused_tokens += len(fused)
        self.gated_tokens += sum(sampled.gated for _, sampled in results)
        self.flips += sum(sampled.flip for sampled in compared)
        self.histograms.inter_token_latency_seconds.observe_all(shares)
        self.histograms.kl_nats.observe_all([sampled.kl for sampled in compared])
        self.histograms.solved_weight.observe_all(
            [w for choice, sampled in fused if choice.program.law is not None for w in sampled.weights]
        )

    def verified(self, drafter: str, drafted: int, accepted: int) -> None:
        """A choice went ahead by `drafted` tokens of `drafter`, a model or "lookup", of which `accepted` stand."""
        self.drafts[drafter] += 1
        self.draft_tokens[drafter] += drafted
        self.accepted_tokens[drafter] += accepted

    def ended(self, choice: Choice, event: OutputEvent) -> None:
        """A choice's last event has been made."""
        reason = event.finish_reason or FinishReason.ERROR
        self.finished[reason.value] = self.finished.get(reason.value, 0) + 1
        for expert, generation in choice.generations.items():
            self.by_generation.add(expert, generation)
        if event.usage is not None:
            self.prompt_tokens += event.usage.prompt_tokens
            self.cached_tokens += event.usage.cached_tokens
            name = choice.submission.caller.name
            if name:
                counts = self.by_key.setdefault(name, KeyCounts())
                counts.choices += 1
                if choice.index == 0:  # as in the answer's usage
                    counts.prompt_tokens += event.usage.prompt_tokens
                counts.generation_tokens += event.usage.completion_tokens
        if event.removed_mass is not None:
            self.histograms.constraint_removed_mass.observe(event.removed_mass)
        if reason in _SUCCESSES and event.usage is not None and event.timing is not None:
            self._succeeded(choice, event.usage, event.timing)

    def _succeeded(self, choice: Choice, usage: Usage, timing: Timing) -> None:
        histograms = self.histograms
        histograms.request_prompt_tokens.observe(usage.prompt_tokens)
        histograms.request_generation_tokens.observe(usage.completion_tokens)
        if timing.prefill_seconds is not None:
            histograms.request_prefill_time_seconds.observe(timing.prefill_seconds)
        if timing.decode_seconds is not None:
            histograms.request_decode_time_seconds.observe(timing.decode_seconds)
            if usage.completion_tokens > 1:
                per_token = timing.decode_seconds / (usage.completion_tokens - 1)
                histograms.request_time_per_output_token_seconds.observe(per_token)
        if len(choice.scheduled.lanes) > 1:
            histograms.request_barrier_wait_seconds.observe(timing.barrier_seconds)


def held_up(plan: Plan, running: Sequence[ScheduledRequest]) -> list[ScheduledRequest]:
    """The requests of which no logits come from this step although one of their lanes had caught up before it: another
    one has still more to compute. To be asked before the step, which moves the lanes on."""
    if len(plan.rows) == len(running):  # as while everybody decodes
        return []
    return [request for request in running if request not in plan.rows and _waits_for_itself(request)]


def _waits_for_itself(request: ScheduledRequest) -> bool:
    missing = [lane.missing for lane in request.turn]
    # The last rows are computed in step; and a request that is awaiting its other lanes has the logits of the first.
    return max(missing) > request.rows and (request.awaiting or min(missing) == request.rows)
