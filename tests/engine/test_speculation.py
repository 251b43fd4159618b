"""Requests that run ahead of their text, against the same requests that do not: whatever drafts, and however often it
is right, texts, log-probs and all that is told of them are the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner
from proxyserve.engine.speculation import drafting
from proxyserve.engine.speculation.drafter import drafter_of
from proxyserve.engine.submission import Submission
from proxyserve.engine.thinking import Thinking, ThinkingBudget
from proxyserve.experts.library import Library
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.fusion.calibration import Calibration, CalibrationPoint
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.model_set import ModelSet
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.text.reasoning import ReasoningMarks
from proxyserve.types import FinishReason, OutputEvent
from tests.engine.constraints import Ruled, among, spelling
from tests.engine.driver import Collected, run, submission
from tests.engine.test_arena import adopt, drop, offer
from tests.engine.test_rule_parity import NEGATIVE, RULES
from tests.experts import shelf as experts_shelf
from tests.experts.shelf import Shelf, load_expert, make_library, save_tiny, tune, write_lora
from tests.naive import NaiveFusion

PROMPT = [5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45]
NEAR = 1e-4  # best tokens closer than this, in nats, may change places with the order of a sum
AHEAD = (1, 2, 4)


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A base, and experts and an untuned model that are much like it, so that drafts often stand and often do not."""
    root = tmp_path_factory.mktemp("kin")
    base = save_tiny(root / "atlas", "llama", seed=1)
    small = tune(root / "small", base, seed=2, size=0.01)
    for seed, name in enumerate(("qa", "record"), start=3):
        tune(root / name, base, seed=seed, size=0.02)
    write_lora(root / "lora", small, seed=11, lora_alpha=0.2)
    write_lora(root / "other-lora", small, seed=12, rank=2, lora_alpha=0.2)
    return Shelf(root, base, small)


@pytest.fixture(scope="module")
def models(kin: Shelf) -> ModelSet:
    return load_family(
        kin.base, [ExpertSource(name, kin.root / name, kin.small) for name in ("qa", "record")]
    )


def make_engine(models: ModelSet, ahead: int | str = "off", **config: Any) -> Engine:
    values = {"max_batch": 32, "max_batch_tokens": 256, "kv_memory": 2**24, "pairs": "apart", **config}
    points = tuple(
        CalibrationPoint(*point) for point in ((0.0, 1.0, 1.0), (0.7, 1.0, 1.005), (1.0, 1.0, 2.0))
    )
    return Engine(
        models, EngineConfig(speculate=ahead, **values), calibrations={"qa": Calibration("qa", points)}
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(models: ModelSet) -> Engine:
    return make_engine(models)


@pytest.fixture(scope="module", params=AHEAD)
def ahead(request: pytest.FixtureRequest, models: ModelSet) -> Engine:
    return make_engine(models, request.param)


def same(one: Collected, other: Collected, name: str) -> None:
    """That `other` is `one`, down to what differs between two ways to add up, which may turn a near tie."""
    for place, (token, another) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if token != another:
            law = dict(one.logprobs[place].top) if place < len(one.logprobs) else {}
            assert another in law and abs(law[token] - law[another]) < NEAR, (name, place)
            print(f"a near tie in {name} at {place}")
            return
    assert one.tokens == other.tokens, name
    assert one.text == other.text, name
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        assert theirs.logprob == pytest.approx(mine.logprob, abs=NEAR), name
        assert theirs.rank == mine.rank or abs(theirs.logprob - mine.logprob) < NEAR
        assert dict(theirs.listed) == pytest.approx(dict(mine.listed), abs=NEAR), name
        assert [value for _, value in theirs.top] == pytest.approx([value for _, value in mine.top], abs=NEAR)
    for mine_, theirs_ in zip(one.explanations, other.explanations, strict=True):
        assert theirs_.kl == pytest.approx(mine_.kl, abs=NEAR) and theirs_.flip == mine_.flip, name
        assert theirs_.weights == pytest.approx(mine_.weights, abs=1e-3), name
        assert theirs_.push == pytest.approx(mine_.push, abs=1e-3), name
        for lane, view in mine_.lanes.items():
            assert theirs_.lanes[lane].logprob == pytest.approx(view.logprob, abs=NEAR), (name, lane)
    first, second = one.last, other.last
    assert first is not None and second is not None
    assert (first.finish_reason, first.stop_reason, first.error) == (
        second.finish_reason,
        second.stop_reason,
        second.error,
    ), name
    assert first.removed_mass == pytest.approx(second.removed_mass, abs=NEAR), name
    if first.fusion is not None:
        assert second.fusion is not None
        assert first.fusion.flips == second.fusion.flips, name
        assert first.fusion.mean_kl == pytest.approx(second.fusion.mean_kl, abs=NEAR), name
    assert first.usage is not None and second.usage is not None
    assert first.usage.completion_tokens == second.usage.completion_tokens


def compare(plain: Engine, ahead: Engine, submissions: Sequence[Submission]) -> dict[str, Collected]:
    """What the second engine put out, which is what the first did."""
    expected = run(plain, submissions)
    got = run(ahead, submissions)
    for name, result in expected.items():
        same(result, got[name], name)
    return got


def drafted(results: dict[str, Collected]) -> tuple[int, int]:
    """Tokens that were drafted for fused requests, and those that stood."""
    reports = [result.last.fusion for result in results.values() if result.last and result.last.fusion]
    return sum(report.drafted or 0 for report in reports), sum(report.accepted or 0 for report in reports)


@dataclass
class Forwards:
    """Tokens of each forward of each trunk, from now on."""

    tokens: dict[str, list[int]]

    @classmethod
    def of(cls, monkeypatch: pytest.MonkeyPatch) -> Forwards:
        found = cls({})
        original = Runner.run

        def counted(runner: Runner, work: Sequence[LaneWork], *rest: Any) -> Tensor:
            found.tokens.setdefault(runner.model.name, []).append(sum(item.count for item in work))
            return original(runner, work, *rest)

        monkeypatch.setattr(Runner, "run", counted)
        return found


# Every rule and every field ------------------------------------------------------------------------------------------


def every_rule(**sampling: object) -> list[Submission]:
    return [
        submission(
            name,
            PROMPT,
            fusion=parse_fusion({**fields, "explain": 2}),
            by_lane={"base@negative": PROMPT[-NEGATIVE:]},
            **{"max_tokens": 12, "logprobs": 3, **sampling},
        )
        for name, (fields, _) in RULES.items()
    ]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6, "seed": 7, "top_p": 0.95}],
    ids=["greedy", "drawn"],
)
def test_every_rule(plain: Engine, ahead: Engine, sampling: dict[str, object]) -> None:
    got = compare(plain, ahead, every_rule(**sampling))
    for name, result in got.items():
        assert result.last is not None
        if name not in ("base/0", "guidance/0"):  # they have no small lane
            assert result.last.fusion is not None and result.last.fusion.drafted, name
    tried, stood = drafted(got)
    assert 0.2 * tried < stood < tried, "the models are neither strangers nor the same"


TEMPERED = {"temperature": 0.9, "seed": 3}
#: What a request may say beside its fusion.
FIELDS: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {5: 3.0, 17: -100.0, 200: 2.0}},
    "bad words": {"bad_words": ((5,), (200, 33), (9, 120, 64)), "logit_bias": {200: 4.0, 33: 4.0, 9: 3.0}},
    "least": {"min_tokens": 9, "ignore_eos": False, "logit_bias": {0: 30.0}},
    "stop ids": {"stop_token_ids": tuple(range(100, 200)), "min_tokens": 3},
    "end of text": {"ignore_eos": False, "logit_bias": {0: 6.0}, **TEMPERED},
    "allowed": {"allowed_token_ids": tuple(range(40, 80)), **TEMPERED},
    "filters": {"top_k": 5, "top_p": 0.8, "min_p": 0.05, **TEMPERED},
    "log-probs": {"logprobs": 4, "logprob_token_ids": (3, 8, 300), **TEMPERED},
    "several": {"n": 3, **TEMPERED},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "prompt": {"prompt_logprobs": 2},
    "stop": {"stop": ("a", "e", "o")},
}


def every_field() -> list[Submission]:
    return [
        submission(name, PROMPT, weights, **{"max_tokens": 20, "logprobs": 2, **fields})
        for name, fields in FIELDS.items()
        for weights in ({"qa": 1.0},)
    ]


def test_every_field(plain: Engine, ahead: Engine) -> None:
    got = compare(plain, ahead, every_field())
    reasons = {name: result.last.finish_reason for name, result in got.items() if result.last is not None}
    assert reasons["stop ids/0"] is reasons["stop/0"] is reasons["least/0"] is FinishReason.STOP
    assert len(got["least/0"].tokens) == 10


def test_entropy_and_constraints(plain: Engine, ahead: Engine) -> None:
    tokenizer = plain.models.base.tokenizer
    thinking = Thinking(ReasoningMarks(), tokenizer, begun=True)
    ends = 0

    def odd_after_even(seen: Sequence[int]) -> range:
        return range(20 + (len(seen) + sum(seen)) % 2, 120, 2)

    constraints = {
        "spelled": spelling(5, 9, 33, 40, 41, 42, 43, 44),
        "among": among(*range(30, 60)),
        "by turns": Ruled(odd_after_even),
        "whole": Ruled(odd_after_even, whole=lambda seen: len(seen) == 7),
        "thinking": ThinkingBudget(thinking, 6),
        "ending": Ruled(lambda seen: {ends} if len(seen) == 5 else range(20, 60)),
    }
    wishes = [
        replace(
            submission(name, PROMPT, {"qa": 1.0}, max_tokens=24, ignore_eos=False, logprobs=2, **sampling),
            request_id=f"{name}, {kind}",
            constraints=(constraint,),
        )
        for name, constraint in constraints.items()
        for kind, sampling in (("greedy", {}), ("drawn", {"temperature": 0.8, "seed": 11}))
    ]
    entropy = parse_fusion({"experts": {"qa": 1}, "target_entropy": 1.5})
    wishes.append(
        submission("entropy", PROMPT, fusion=entropy, temperature=1.0, seed=5, max_tokens=20, logprobs=2)
    )
    got = compare(plain, ahead, wishes)
    assert got["spelled, greedy/0"].tokens == [5, 9, 33, 40, 41, 42, 43, 44]
    assert len(got["whole, drawn/0"].tokens) == 7
    assert drafted(got)[1] > 20


def test_a_constraint_that_fails_ahead_fails_where_it_is_met(plain: Engine, ahead: Engine) -> None:
    """Masks are asked for drafts as well; the ones that raise are told when the text is there."""

    def fails_later(seen: Sequence[int]) -> range:
        if len(seen) == 5:
            raise RuntimeError("no mask")
        return range(20, 90)

    wishes = [
        replace(submission("bad", PROMPT, {"qa": 1.0}), constraints=(Ruled(fails_later),)),
        replace(
            submission("empty", PROMPT, {"qa": 1.0}),
            constraints=(Ruled(lambda seen: range(20, 90) if len(seen) < 6 else ()),),
        ),
        submission("good", PROMPT, {"qa": 1.0}, logprobs=2),
    ]
    got = compare(plain, ahead, wishes)
    assert len(got["bad/0"].tokens) == 5 and len(got["empty/0"].tokens) == 6
    assert got["bad/0"].last is not None and got["bad/0"].last.finish_reason is FinishReason.ERROR


# Around the requests -------------------------------------------------------------------------------------------------


def mixed() -> list[Submission]:
    """Several experts, drafting and not, gated, scored, long and short."""
    gated = parse_fusion({"experts": {"qa": 1}, "gate": {"confidence": 0.3}})
    return [
        submission("qa", PROMPT, {"qa": 1.0}, logprobs=2, max_tokens=16),
        submission("record", PROMPT[2:], {"record": 0.8}, logprobs=2, max_tokens=16),
        submission(
            "both", PROMPT[1:], {"qa": 0.5, "record": 0.7}, logprobs=2, max_tokens=16, temperature=0.5, seed=1
        ),
        submission("base", [9, 8, 7] * 9, logprobs=2, max_tokens=16),
        submission("gated", PROMPT[3:], fusion=gated, logprobs=2, max_tokens=16),
        submission("long", PROMPT * 7, {"qa": 1.0}, logprobs=2, max_tokens=16),
        submission("scored", PROMPT, {"record": 1.0}, prompt_logprobs=1, logprobs=2, max_tokens=16),
        submission("three", PROMPT[:5], {"record": 1.2}, n=3, temperature=0.9, seed=2, max_tokens=16),
        submission("short", PROMPT[:2], {"qa": 1.0}, max_tokens=3),
    ]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prefix_cache": False},
        {"block_size": 1},
        {"block_size": 4, "max_batch_tokens": 33},
        {"pairs": "together"},
        {"max_scored_rows": 17},
        {"max_batch": 5},
    ],
    ids=str,
)
def test_mixed_batches(models: ModelSet, config: dict[str, Any]) -> None:
    """Twice: the second time with what the first has left in the cache."""
    plain, ahead = make_engine(models, **config), make_engine(models, 3, **config)
    for _ in range(2):
        got = compare(plain, ahead, mixed())
        assert drafted(got)[1] > 10
    assert ahead.counters.tokens_generated == plain.counters.tokens_generated


def test_preemption(models: ModelSet) -> None:
    config = {"block_size": 4, "kv_memory": 300_000}
    plain, ahead = make_engine(models, **config), make_engine(models, 4, **config)
    wishes = [
        submission(f"r{number}", PROMPT[number % 4 :], {"qa": 1.0 + number / 10}, max_tokens=40, logprobs=2)
        for number in range(12)
    ]
    compare(plain, ahead, wishes)
    assert ahead.counters.preemptions > 0


def test_the_cache_serves_what_was_verified(models: ModelSet) -> None:
    """A second turn that goes on with the first answer starts where that ended, and is right."""
    plain, ahead = make_engine(models, block_size=4), make_engine(models, 4, block_size=4)
    [first] = compare(plain, ahead, [submission("a", PROMPT, {"qa": 1.0}, max_tokens=30)]).values()
    text = [*PROMPT, *first.tokens, 77, 78]
    [second] = compare(plain, ahead, [submission("b", text, {"qa": 1.0}, max_tokens=20, logprobs=2)]).values()
    assert second.last is not None and second.last.usage is not None
    assert second.last.usage.cached_tokens == (len(PROMPT) + 30 - 1) // 4 * 4


def test_to_the_end_of_the_context(models: ModelSet) -> None:
    prompt = PROMPT * 20
    room = models.base.context_length - len(prompt)
    wishes = [submission(name, prompt, {name: 1.0}, max_tokens=room) for name in ("qa", "record")]
    got = compare(make_engine(models), make_engine(models, 4), wishes)
    assert all(len(result.tokens) == room for result in got.values())


def test_cancelling(models: ModelSet) -> None:
    """In the middle of a stream, while others go on."""
    engine = make_engine(models, 4)
    expected = run(make_engine(models), [submission("stays", PROMPT, {"qa": 1.0})])["stays/0"]
    engine.submit(submission("goes", PROMPT, {"qa": 1.0}, max_tokens=50))
    engine.submit(submission("stays", PROMPT, {"qa": 1.0}))
    events: list[OutputEvent] = []
    for _ in range(3):
        events += engine.step()
    cancelled = engine.cancel("goes/0")
    assert cancelled is not None and cancelled.finish_reason is FinishReason.CANCELLED
    while engine.has_work:
        events += engine.step()
        engine.check()
    assert [
        token for event in events if event.request_id == "stays" for token in event.token_ids
    ] == expected.tokens
    assert all(pool.in_use == 0 for pool in engine.pools.values())


def test_a_drafting_forward_that_fails_ends_the_step_alone(
    models: ModelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(models, 4)
    engine.submit(submission("a", PROMPT, {"qa": 1.0}))
    engine.step()
    original = Runner.run

    def failing(runner: Runner, work: Sequence[LaneWork], *rest: Any) -> Tensor:
        if any(item.request.drafts for item in work):
            raise RuntimeError("out of luck")
        return original(runner, work, *rest)

    monkeypatch.setattr(Runner, "run", failing)
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check()
    assert events[-1].finish_reason is FinishReason.ERROR and "RuntimeError" in (events[-1].error or "")
    monkeypatch.undo()
    expected = run(make_engine(models), [submission("a", PROMPT, {"qa": 1.0})])["a/0"]
    assert run(engine, [submission("a", PROMPT, {"qa": 1.0})])["a/0"].tokens == expected.tokens


def test_a_draft_that_breaks_a_model_leaves_nothing_behind(
    kin: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token over which the base is NaN is drafted all the time, and never comes."""
    broken = 300
    models = load_family(kin.base, [ExpertSource("qa", kin.root / "qa", kin.small)])
    assert isinstance(models.base, LoadedModel)
    with torch.no_grad():
        models.base.module.get_input_embeddings().weight[broken] = math.nan
    wishes = [submission("a", PROMPT[:8], {"qa": 1.0}, logit_bias={broken: -100.0}, max_tokens=20)]
    expected = run(make_engine(models), wishes)["a/0"]
    monkeypatch.setattr(drafting, "draw", lambda backend, rows, *rest: [broken] * len(rows))
    got = run(make_engine(models, 3, block_size=4), wishes)["a/0"]
    assert got.last is not None and got.last.fusion is not None
    assert got.last.error is None and got.last.fusion.accepted == 0
    assert got.tokens == expected.tokens


# Adapters and experts that come and go -------------------------------------------------------------------------------


@pytest.fixture
def library(kin: Shelf) -> Iterator[Library]:
    yield make_library(kin.base)


OVER_SMALL = {name: ExpertSpec(Source(name), Source("small")) for name in ("lora", "other-lora")}


def with_adapters(kin: Shelf, ahead: int | str) -> Engine:
    library = make_library(kin.base)
    loaded = [load_expert(library, name, spec, kin.root) for name, spec in OVER_SMALL.items()]
    return experts_shelf.make_engine(library, loaded, speculate=ahead, pairs="apart")


def test_adapters_draft_as_rows_of_their_trunk(kin: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned and untuned are one model's rows: the drafter's one token goes with the untuned one's several."""
    wishes = [
        submission(name, PROMPT, {name: 1.0}, max_tokens=24, logprobs=2, **sampling)
        for name, sampling in (("lora", {}), ("other-lora", {"temperature": 0.7, "seed": 1}))
    ]
    expected, ahead = run(with_adapters(kin, "off"), wishes), with_adapters(kin, 3)
    forwards = Forwards.of(monkeypatch)
    got = run(ahead, wishes)
    for name, result in expected.items():
        same(result, got[name], name)
    assert drafted(got)[1] > 5
    small = forwards.tokens["small"]
    assert small[1:6] == [2, 2, 2, 2 + 8, 2], (
        "both draft in one forward; then 1 token of each and 4 of each untuned"
    )


def test_hot_swap(kin: Shelf, library: Library) -> None:
    """An expert is replaced while its requests run ahead: they go on with the old generation."""
    old = load_expert(library, "qa", ExpertSpec(Source("qa"), Source("small")), kin.root)
    engine = experts_shelf.make_engine(library, [old], speculate=4, pairs="apart")
    alone = run(engine, [submission("x", PROMPT, {"qa": 1.0}, max_tokens=30)])["x/0"]
    engine.submit(submission("old", PROMPT, {"qa": 1.0}, max_tokens=30))
    events = [*engine.step(), *engine.step()]
    new = load_expert(library, "qa", ExpertSpec(Source("record"), Source("small")), kin.root, generation=2)
    adopt(engine, new)
    offer(engine, [new])
    engine.submit(submission("new", PROMPT, {"qa": 1.0}, max_tokens=30))
    while engine.has_work:
        events += engine.step()
        engine.check()
    drop(engine, library, old)
    tokens = {
        name: [token for event in events if event.request_id == name for token in event.token_ids]
        for name in ("old", "new")
    }
    assert tokens["old"] == alone.tokens != tokens["new"]
    assert run(engine, [submission("x", PROMPT, {"qa": 1.0}, max_tokens=30)])["x/0"].tokens == tokens["new"]


# Who drafts, and what it costs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sure(kin: Shelf) -> ModelSet:
    """Experts that are never wrong: base + 1 * (base's copy - small) ... with the copy as untuned as well."""
    for name in ("copy", "twin"):
        if not (kin.root / name).exists():
            tune(kin.root / name, kin.base, seed=0, size=0.0)
    return load_family(
        kin.base,
        [
            ExpertSource("copy", kin.root / "copy", kin.root / "twin"),
            ExpertSource("other", kin.root / "qa", kin.root / "twin"),
        ],
    )


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 9}], ids=["greedy", "drawn"])
def test_a_drafter_that_is_right_saves_forwards(
    sure: ModelSet, count: int, sampling: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """base + (copy - twin) is the base's law, and so is the copy's: each step after the prompt's gives count + 1
    tokens. One forward of base and untuned per step, of the drafter one per token."""
    tokens = 26
    engine = make_engine(sure, count)
    forwards = Forwards.of(monkeypatch)
    result = run(engine, [submission("a", PROMPT, {"copy": 1.0}, max_tokens=tokens, **sampling)])["a/0"]
    after = tokens - 1  # the prompt's step gives the first
    steps = -(-after // (count + 1))
    assert engine.counters.steps == 1 + steps
    whole = after // (count + 1)
    rest = after - whole * (count + 1)
    verified = [len(PROMPT), *[count + 1] * whole, *([rest] if rest else [])]
    assert forwards.tokens["atlas"] == forwards.tokens["twin"] == verified
    assert forwards.tokens["copy.tuned"] == [len(PROMPT), *[1] * after]
    assert result.last is not None and result.last.fusion is not None and result.last.usage is not None
    assert result.last.fusion.drafted == result.last.fusion.accepted == after - steps
    assert set(result.last.usage.lane_tokens.values()) == {len(PROMPT) + after}
    assert dict(engine.counters.drafts) == {"copy.tuned": engine.counters.drafts["copy.tuned"]}
    assert engine.counters.accepted_tokens == engine.counters.draft_tokens == {"copy.tuned": after - steps}


def test_experts_of_a_batch_draft_side_by_side(sure: ModelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward per drafting model and depth, however many requests draft with it."""
    engine = make_engine(sure, 3)
    forwards = Forwards.of(monkeypatch)
    for number in range(3):
        engine.submit(submission(f"a{number}", PROMPT[number:], {"copy": 1.0}, max_tokens=20))
        engine.submit(submission(f"b{number}", PROMPT[number:], {"other": 1.0}, max_tokens=20))
    engine.step()
    forwards.tokens.clear()
    engine.step()
    assert forwards.tokens == {
        "copy.tuned": [3] * 4,
        "other.tuned": [3] * 4,
        "atlas": [6 * 4],
        "twin": [6 * 4],
    }


@pytest.mark.parametrize(
    ("fusion", "drafter"),
    [
        ({"experts": {"qa": 0.3, "record": 0.6}}, "record.tuned"),
        ({"experts": {"qa": -1}}, "small"),
        ({"rule": "upscale", "experts": {"qa": 1}}, "qa.tuned"),
        ({"rule": "contrast", "experts": {"qa": 1}}, "qa.tuned"),
        ({"rule": "unlearn", "experts": {"qa": 1}}, "qa.tuned"),
        ({"rule": "mixture", "models": {"base": 0.6, "small": 0.3, "qa.tuned": 0.1}}, "small"),
        ({"rule": "formula", "formula": "base + 0.5*qa.tuned - 0.4*small"}, "qa.tuned"),
        ({"rule": "formula", "formula": "qa.tuned"}, None),
        ({"rule": "guidance", "scale": 2, "negative_prompt": "x"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_who_drafts(plain: Engine, fusion: dict[str, Any], drafter: str | None) -> None:
    """The small model that counts most, if any does."""
    wish = submission("x", PROMPT, fusion=parse_fusion(fusion), by_lane={"base@negative": PROMPT[-3:]})
    with plain.offers.lease() as lease:
        [choice] = plain.prepare(wish, lease)
        lane = drafter_of(choice, plain.models.base.key)
        plain.discard([choice])
    assert (None if lane is None else lane.model.name) == drafter


def test_who_drafts_follows_the_schedule(models: ModelSet) -> None:
    experts = {
        "qa": {"weight": 1.0, "schedule": [[0, 1.0], [6, 0.0]]},
        "record": {"weight": 0.8, "schedule": [[0, 0.0], [6, 1.0]]},
    }
    engine = make_engine(models, 3)
    got = compare(
        make_engine(models),
        engine,
        [submission("a", PROMPT, fusion=parse_fusion({"experts": experts}), max_tokens=20)],
    )
    assert set(engine.counters.drafts) == {"qa.tuned", "record.tuned"}
    assert drafted(got)[0] == engine.counters.draft_tokens.total()


def test_the_base_alone_looks_its_drafts_up(plain: Engine, models: ModelSet) -> None:
    """A text that must repeat itself is written several tokens at a time."""
    round_trip = Ruled(lambda seen: {40 + len(seen) % 6})
    engine = make_engine(models, 4)
    wish = replace(submission("a", PROMPT, max_tokens=40), constraints=(round_trip,))
    [result] = compare(plain, engine, [wish]).values()
    assert result.tokens == [40 + place % 6 for place in range(40)]
    assert engine.counters.steps < 8 + 34 / 4 + 2
    assert engine.counters.accepted_tokens["lookup"] > 20
    assert result.last is not None and result.last.fusion is None


def test_as_plain_forwards_do(kin: Shelf, models: ModelSet) -> None:
    naive = NaiveFusion(kin.base, {name: (kin.root / name, kin.small) for name in ("qa", "record")})
    prompts = {"base": PROMPT, "qa.tuned": PROMPT[3:], "qa.untuned": PROMPT[2:]}
    weights = {"qa": 0.9, "record": 0.4}
    width = models.base.vocabulary.size
    expected = naive.greedy(prompts, weights, 20, width)
    wish = submission("a", PROMPT, weights, by_lane=prompts, max_tokens=20, logprobs=3)
    result = run(make_engine(models, 4), [wish])["a/0"]
    for place, (token, law) in enumerate(zip(result.tokens, expected.laws, strict=True)):
        if token != expected.tokens[place]:
            assert float(law.max() - law[token]) < NEAR
            return
        for listed, value in result.logprobs[place].top:
            assert value == pytest.approx(float(law[listed]), abs=NEAR)


def test_events_come_a_token_at_a_time(sure: ModelSet) -> None:
    """In order, each with its own text and log-prob; nothing follows the one that ends the answer."""
    engine = make_engine(sure, 5)
    engine.submit(submission("a", PROMPT, {"copy": 1.0}, max_tokens=9, logprobs=0))
    engine.step()
    events = engine.step()
    assert [len(event.token_ids) for event in events] == [1] * 6
    assert all(
        event.logprobs is not None and event.logprobs[0].token_id == event.token_ids[0] for event in events
    )
    stop = events[2].token_ids[0]
    earlier = [event.token_ids[0] for event in events[:2]]
    engine.cancel("a/0")
    if stop not in earlier:
        engine.submit(submission("b", PROMPT, {"copy": 1.0}, max_tokens=9, stop_token_ids=(stop,)))
        engine.step()
        events = engine.step()
        assert [event.token_ids[0] for event in events] == [*earlier, stop]
        assert [event.finish_reason for event in events] == [None, None, FinishReason.STOP]
        engine.check()
