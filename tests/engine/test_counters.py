"""What the engine counts and times, against slow twins that look at every lane before every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyserve.config import EngineConfig
from proxyserve.engine.caller import Caller
from proxyserve.engine.choice import Choice
from proxyserve.engine.counters import OLDER, EngineCounters, GenerationCounts, held_up
from proxyserve.engine.engine import Engine
from proxyserve.engine.histogram import Histogram
from proxyserve.engine.submission import Submission
from proxyserve.fusion.fusion import Gate, proxy
from proxyserve.models.model_set import ModelSet
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork, Plan
from proxyserve.types import FinishReason, ModelKey, OutputEvent, Timing, Usage
from tests.engine.driver import run, submission

# Histograms -----------------------------------------------------------------------------------------------------

BOUNDS = (0.0, 0.5, 1.0, 4.0)


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 3.0, 4.0, 5.0]))))
def test_histogram_counts_like_the_definition(batches: list[list[float]]) -> None:
    histogram = Histogram(BOUNDS)
    for batch in batches:
        histogram.observe_all(batch)
    values = [value for batch in batches for value in batch]
    stats = histogram.stats()
    for place, bound in enumerate(BOUNDS):
        assert sum(stats.counts[: place + 1]) == sum(value <= bound for value in values)
    assert stats.count == len(values)
    assert stats.total == pytest.approx(sum(values))


@pytest.mark.parametrize("bounds", [(), (1.0, 1.0), (2.0, 1.0)])
def test_bounds_must_rise(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rise"):
        Histogram(bounds)


# Generations ----------------------------------------------------------------------------------------------------


def test_old_generations_are_counted_together() -> None:
    counts = GenerationCounts()
    for generation in range(1, 101):
        for _ in range(generation):
            counts.add("qa", generation)
        counts.add("qa", 1)  # one stays in use, as after a rollback
        counts.add("steady", 7)
    found = counts.copy()
    assert {number for expert, number in found if expert == "qa"} == {"98", "99", "100", "1", OLDER}
    assert sum(count for (expert, _), count in found.items() if expert == "qa") == sum(range(101)) + 100
    assert found["qa", "1"] == 101
    assert found["qa", "99"] == 99
    assert found["steady", "7"] == 100


# Time of requests -----------------------------------------------------------------------------------------------


def small_engine(models: ModelSet, **settings: int) -> Engine:
    return Engine(models, EngineConfig(**{"kv_memory": 4 * 2**20, "max_batch": 4, **settings}))


def test_times_are_in_order_and_the_queue_is_measured(tiny_models: ModelSet) -> None:
    engine = small_engine(tiny_models, max_batch=1)
    results = run(engine, [submission("a", [5, 6]), submission("b", [7, 8], {"qa": 1.0})])
    times: list[Timing] = []
    for key in ("a/0", "b/0"):
        last = results[key].last
        assert last is not None and last.timing is not None
        times.append(last.timing)
    for timing in times:
        assert timing.admitted_at is not None and timing.first_token_at is not None
        assert timing.queued_at <= timing.admitted_at < timing.first_token_at < timing.finished_at
        parts = (timing.queue_seconds, timing.prefill_seconds or 0.0, timing.decode_seconds or 0.0)
        assert sum(parts) == pytest.approx(timing.finished_at - timing.queued_at)
    first, second = times
    assert second.admitted_at is not None and second.admitted_at > first.finished_at
    histograms = engine.counters.histograms
    assert histograms.request_queue_time_seconds.stats().total == pytest.approx(
        first.queue_seconds + second.queue_seconds, abs=1e-3
    )
    assert histograms.request_prefill_time_seconds.stats().count == 2
    assert histograms.inter_token_latency_seconds.stats().count == 22
    assert histograms.request_time_per_output_token_seconds.stats().count == 2


def test_a_choice_that_never_ran_has_waited_only(tiny_models: ModelSet) -> None:
    engine = small_engine(tiny_models)
    (key,) = engine.submit(submission("a", [5, 6]))
    event = engine.cancel(key)
    assert event is not None and event.timing is not None
    assert event.timing.admitted_at is None and event.timing.prefill_seconds is None
    assert event.timing.decode_seconds is None
    assert event.timing.queue_seconds == event.timing.finished_at - event.timing.queued_at
    histograms = engine.counters.histograms
    assert histograms.request_queue_time_seconds.stats().count == 0
    assert histograms.request_prompt_tokens.stats().count == 0
    assert engine.counters.finished == {"cancelled": 1}


def test_a_choice_that_comes_back_from_preemption_was_admitted_once(tiny_models: ModelSet) -> None:
    engine = small_engine(tiny_models)
    (choice,) = engine.prepare(submission("a", [5, 6]), engine.offers.lease())
    engine.counters.scheduled(Plan(admitted=[choice.scheduled]), {choice.key: choice})
    first = choice.clock.admitted
    engine.counters.scheduled(
        Plan(admitted=[choice.scheduled], preempted=[choice.scheduled]), {choice.key: choice}
    )
    assert choice.clock.admitted == first
    assert engine.counters.histograms.request_queue_time_seconds.stats().count == 1
    assert engine.counters.prefix_queries == {"atlas": 2}
    assert engine.counters.preemptions == 1


# Barriers -------------------------------------------------------------------------------------------------------


def test_barrier_wait_of_requests(tiny_models: ModelSet) -> None:
    """A twin that looks at all lanes before each step, and takes the step's length from the engine's own clock."""
    engine = small_engine(tiny_models, max_batch_tokens=32)
    long, short = list(range(1, 90)), [5, 6, 7]
    gated = replace(proxy({"qa": 1.0}), gate=Gate(1.0))  # the base is never that sure
    both = {"qa.tuned": long, "qa.untuned": long}
    work = [
        submission("uneven", short, {"qa": 1.0}, by_lane={"qa.tuned": long}),
        submission("even", long, {"qa": 1.0}),
        submission("plain", long),
        submission("other", short, {"record": 1.0}, by_lane={"record.untuned": long}),
        submission("gated", short, fusion=gated, by_lane=both, salt="own"),
    ]
    for entry in work:
        engine.submit(entry)
    expected = dict.fromkeys((f"{entry.request_id}/0" for entry in work), 0.0)
    found: dict[str, float] = {}
    length = engine.counters.histograms.engine_step_seconds.stats
    while engine.has_work:
        waiting = [key for key, choice in engine._choices.items() if waits_for_itself(choice)]
        spent = length().total
        events = engine.step()
        spent = length().total - spent
        begun = {f"{event.request_id}/{event.index}" for event in events if event.token_ids}
        for key in waiting:
            if key not in begun:
                expected[key] += spent
        found.update(
            (f"{event.request_id}/{event.index}", event.timing.barrier_seconds)
            for event in events
            if event.timing is not None
        )
    assert found == pytest.approx(expected)
    assert min(found["uneven/0"], found["other/0"], found["gated/0"]) > 0, (
        "nothing waited: this shows nothing"
    )
    assert found["plain/0"] == 0
    stats = engine.counters.histograms.request_barrier_wait_seconds.stats()
    assert stats.count == 4, "a single lane waits for none"
    assert stats.total == pytest.approx(sum(expected.values()))


def waits_for_itself(choice: Choice) -> bool:
    """Whether a lane has nothing left to do but its last token, and another one has."""
    base, *others = (lane.missing for lane in choice.scheduled.lanes)
    if choice.submission.fusion.gate is not None:  # the base goes first, and then its logits lie there
        return choice.scheduled.awaiting and max(others) > 1
    return bool(others) and min(base, *others) == 1 and max(base, *others) > 1


@pytest.mark.parametrize(
    ("missing", "unscored", "gated", "awaiting", "held"),
    [
        ([1, 5], 0, False, False, True),
        ([5, 1, 5], 0, False, False, True),
        ([1, 1], 0, False, False, False),  # held up by others, whose tokens filled the step
        ([5, 5], 0, False, False, False),
        ([1], 0, False, False, False),
        ([1, 5], 0, True, False, False),  # the base goes first
        ([1, 5], 0, True, True, True),
        ([1, 1], 0, True, True, False),
        ([4, 6], 3, False, False, True),  # a prompt is scored: four tokens of each lane run in step
        ([5, 6], 3, False, False, False),
        ([4, 4], 3, False, False, False),
    ],
)
def test_what_holds_a_request_up(
    missing: list[int], unscored: int, gated: bool, awaiting: bool, held: bool
) -> None:
    output: list[int] = []
    lanes = tuple(Lane(ModelKey("a"), tuple(range(count)), output) for count in missing)
    request = ScheduledRequest("id", lanes, output, unscored=unscored, gated=gated, awaiting=awaiting)
    assert held_up(Plan(), [request]) == ([request] if held else [])
    assert held_up(Plan(rows={request: 1}), [request]) == [], "it gets on in this step"


def test_barrier_wait_of_steps() -> None:
    """From the first model that has its logits to the last; one that nothing was asked of does not count."""
    counters = EngineCounters()
    keys = [ModelKey(name) for name in ("atlas", "qa.tuned", "small", "idle")]
    ended = dict(zip(keys, (10.25, 10.5, 11.0, 3.0), strict=True))
    runners = cast(
        Any, {key: SimpleNamespace(stats=SimpleNamespace(ended=end)) for key, end in ended.items()}
    )

    def step(*models: int) -> float:
        lane = Lane(keys[0], (1,), [])
        work = {keys[model]: [LaneWork(cast(Any, None), lane, 0, 4, rows=1)] for model in models}
        before = counters.histograms.step_barrier_wait_seconds.stats()
        counters.stepped(Plan(work=work), runners, (), started=10.0)
        after = counters.histograms.step_barrier_wait_seconds.stats()
        return after.total - before.total if after.count > before.count else -1.0

    assert step(0, 1, 2) == 0.75
    assert step(0, 1, 3) == 0.25
    assert step(0) == step(0, 3) == -1.0, "a model alone waits for nobody"
    assert counters.histograms.iteration_tokens_total.stats().total == (3 + 3 + 1 + 2) * 4


# Sums -----------------------------------------------------------------------------------------------------------


def test_keys_and_prefixes_add_up(tiny_models: ModelSet) -> None:
    engine = small_engine(tiny_models)
    prompt = list(range(1, 41))  # two blocks of 16 and a bit

    def of(name: str, request_id: str, weights: Mapping[str, float] | None) -> Submission:
        made = submission(request_id, prompt, weights, max_tokens=3)
        return Submission(made.request_id, made.prompts, made.sampling, made.fusion, caller=Caller(name))

    run(engine, [of("alice", "a", {"qa": 1.0})])
    run(engine, [of("alice", "b", None), of("", "c", None), of("bob", "d", {"qa": 1.0})])
    counters = engine.counters
    assert set(counters.by_key) == {"alice", "bob"}, "callers without a name are not counted"
    alice = counters.by_key["alice"]
    assert (alice.choices, alice.prompt_tokens, alice.generation_tokens) == (2, 80, 6)
    assert counters.prefix_queries == {"atlas": 160, "qa.tuned": 80, "small": 80}
    assert counters.prefix_hits == {"atlas": 96, "qa.tuned": 32, "small": 32}


def test_a_prompt_counts_once_for_its_key(tiny_models: ModelSet) -> None:
    """As in the answer's usage and in the key's rates."""
    engine = small_engine(tiny_models)
    made = submission("a", list(range(1, 41)), n=3, max_tokens=3)
    run(engine, [Submission(made.request_id, made.prompts, made.sampling, n=3, caller=Caller("alice"))])
    alice = engine.counters.by_key["alice"]
    assert (alice.choices, alice.prompt_tokens, alice.generation_tokens) == (3, 40, 9)


def test_removed_mass_is_counted_where_a_constraint_took_part(tiny_models: ModelSet) -> None:
    engine = small_engine(tiny_models)
    (choice,) = engine.prepare(submission("a", [5]), engine.offers.lease())
    usage, timing = Usage(1, 1, 0, {}), Timing(0.0, 0.0, 0.0, 1.0)
    for mass in (None, 0.25, 1.0):
        event = OutputEvent(
            "a", 0, finish_reason=FinishReason.STOP, usage=usage, timing=timing, removed_mass=mass
        )
        engine.counters.ended(choice, event)
    stats = engine.counters.histograms.constraint_removed_mass.stats()
    assert (stats.count, stats.total) == (2, 1.25)
