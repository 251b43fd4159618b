"""What a request asks for is what it gets, whoever runs beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig, KernelChoice
from proxyserve.engine.engine import Engine
from proxyserve.engine.packed_row import PackedRow
from proxyserve.engine.runner import Runner
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.weights import ExpertWeight
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason
from tests.engine.constraints import among
from tests.engine.driver import Collected, run, submission

PROMPT = [5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45]


@pytest.fixture
def engine(tiny_models: ModelSet) -> Engine:
    return Engine(tiny_models, EngineConfig(max_batch=40, max_batch_tokens=64, kv_memory=2**23, block_size=4))


def crowd() -> Iterator[object]:
    """Thirty requests with all kinds of wishes."""
    for number in range(30):
        yield submission(
            f"crowd-{number}",
            [7 + number, *PROMPT[: number % 11]],
            [{}, {"qa": 0.6}, {"record": -1.0}, {"qa": 1.0, "record": 0.3}][number % 4],
            temperature=[0.0, 1.0, 0.5][number % 3],
            top_p=[1.0, 0.8][number % 2],
            top_k=[0, 3][number % 2],
            seed=number,
            frequency_penalty=[0.0, 1.0][number % 2],
            max_tokens=5 + number % 20,
        )


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"temperature": 1.0, "seed": -1, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    ],
    ids=["greedy", "sampled", "filtered", "penalised"],
)
def test_alone_and_among_thirty_others(tiny_models: ModelSet, wishes: dict[str, object]) -> None:
    weights = {"qa": 0.8, "record": -0.4}

    def answer(others: list[object]) -> Collected:
        config = EngineConfig(max_batch=40, max_batch_tokens=64, kv_memory=2**23)
        mine = submission("mine", PROMPT, weights, max_tokens=30, logprobs=2, **wishes)
        return run(Engine(tiny_models, config), [*others[:15], mine, *others[15:]])["mine/0"]  # type: ignore[list-item]

    alone, crowded = answer([]), answer(list(crowd()))
    assert alone.tokens == crowded.tokens
    for one, other in zip(alone.logprobs, crowded.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_seeds(engine: Engine) -> None:
    same = [submission(f"s{i}", PROMPT, temperature=1.0, seed=3, max_tokens=20) for i in range(2)]
    other = submission("o", PROMPT, temperature=1.0, seed=4, max_tokens=20)
    free = [submission(f"f{i}", PROMPT, temperature=1.0, max_tokens=20) for i in range(2)]
    results = run(engine, [*same, other, *free])
    assert results["s0/0"].tokens == results["s1/0"].tokens != results["o/0"].tokens
    assert results["f0/0"].tokens != results["f1/0"].tokens


def test_several_choices_differ_and_share_their_prompt(engine: Engine) -> None:
    results = run(engine, [submission("r", PROMPT, {"qa": 1.0}, n=4, temperature=1.0, seed=9)])
    assert len({tuple(result.tokens) for result in results.values()}) == 4
    for key, result in results.items():
        assert result.last and result.last.usage
        assert result.last.usage.cached_tokens == (0 if key == "r/0" else 8)
    again = run(engine, [submission("r", PROMPT, {"qa": 1.0}, n=1, temperature=1.0, seed=9)])
    assert again["r/0"].tokens == results["r/0"].tokens


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_share_their_prompt_without_a_prefix_cache(tiny_models: ModelSet, prefix_cache: bool) -> None:
    config = EngineConfig(kv_memory=2**22, block_size=4, prefix_cache=prefix_cache)
    engine = Engine(tiny_models, config)
    for round_ in range(2):
        results = run(engine, [submission(f"r{round_}", PROMPT, n=3, temperature=1.0, max_tokens=8)])
        cached = [
            result.last.usage.cached_tokens
            for result in results.values()
            if result.last and result.last.usage
        ]
        assert cached == ([8, 8, 8] if prefix_cache and round_ else [0, 8, 8])


def test_cancel_returns_every_block(engine: Engine) -> None:
    keys = engine.submit(submission("a", PROMPT, {"qa": 1.0}, n=3, max_tokens=50))
    engine.submit(submission("b", PROMPT, max_tokens=5))
    for _ in range(4):
        engine.step()
    for key in keys:
        event = engine.cancel(key)
        assert event is not None and event.finish_reason is FinishReason.CANCELLED
        assert engine.cancel(key) is None
        engine.check()
    while engine.has_work:
        engine.step()
        engine.check()
    assert all(pool.in_use == 0 for pool in engine.pools.values())


def test_a_failing_step_ends_its_requests_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.submit(submission("a", PROMPT, max_tokens=8))
    engine.step()
    original = Runner.pack

    def fail_for_experts(runner: Runner, *work: Any) -> PackedRow:
        if runner.model.name != "atlas":
            raise RuntimeError("out of luck")
        return original(runner, *work)

    monkeypatch.setattr(Runner, "pack", fail_for_experts)
    engine.submit(submission("b", PROMPT, {"qa": 1.0}))
    events = engine.step()
    engine.check()
    assert {event.finish_reason for event in events} == {FinishReason.ERROR}
    assert all("out of luck" not in (event.error or "") for event in events), "internals stay inside"
    assert engine.counters.step_failures == 1
    monkeypatch.undo()
    assert run(engine, [submission("c", PROMPT)])["c/0"].last


def test_nan_fails_alone_and_leaves_nothing_behind(engine: Engine) -> None:
    """One expert breaks. Its request ends with an error; its neighbour and whoever gets its blocks notice nothing."""
    clean = run(engine, [submission("clean", PROMPT, {"record": 1.0}, max_tokens=20)])["clean/0"]
    embedding = engine.models.expert("qa").tuned.module.get_input_embeddings().weight
    saved = embedding.detach().clone()
    with torch.no_grad():
        embedding.fill_(math.nan)
    try:
        results = run(
            engine,
            [
                submission("bad", PROMPT, {"qa": 1.0}, max_tokens=20),
                submission("good", PROMPT, {"record": 1.0}, max_tokens=20),
            ],
        )
    finally:
        with torch.no_grad():
            embedding.copy_(saved)
    bad = results["bad/0"].last
    assert bad is not None and bad.finish_reason is FinishReason.ERROR and "finite" in (bad.error or "")
    assert not bad.refused
    assert engine.counters.nonfinite_choices == 1
    assert results["good/0"].tokens == clean.tokens
    after = run(engine, [submission("after", PROMPT, {"qa": 1.0}, max_tokens=20, logprobs=0)])["after/0"]
    assert after.last and after.last.finish_reason is FinishReason.LENGTH
    assert all(math.isfinite(entry.logprob) for entry in after.logprobs)


def test_weights_beyond_floats_are_the_requests_own_fault(engine: Engine) -> None:
    """Infinite is what the request made of finite scores: of the next token's, or of its prompt's."""
    fusion = parse_fusion({"rule": "formula", "formula": "1e38*base + qa"})
    bad = [
        submission("drawn", PROMPT, fusion=fusion),
        submission("scored", PROMPT, fusion=fusion, prompt_logprobs=1, max_tokens=0),
        submission("ruled", PROMPT, fusion=fusion, allowed_token_ids=(7, 8)),
    ]
    results = run(engine, [*bad, submission("good", PROMPT, {"qa": 1.0})])
    for wish in bad:
        last = results[f"{wish.request_id}/0"].last
        assert last is not None and last.finish_reason is FinishReason.ERROR and last.refused
        assert "smaller weights" in (last.error or "")
    assert len(results["good/0"].tokens) == 12


def test_stop_ids_of_all_lanes(engine: Engine) -> None:
    end = next(iter(engine.models.base.eos_ids))
    forced = {"logit_bias": {end: 100.0}, "ignore_eos": False}
    ended = run(engine, [submission("a", PROMPT, {"qa": 1.0}, **forced)])["a/0"]
    assert ended.tokens == [end] and ended.text == ""
    assert ended.last and ended.last.finish_reason is FinishReason.STOP
    ignored = run(engine, [submission("b", PROMPT, logit_bias={end: 100.0}, max_tokens=4)])["b/0"]
    assert ignored.tokens == [end] * 4
    assert ignored.last and ignored.last.finish_reason is FinishReason.LENGTH
    own = run(engine, [submission("c", PROMPT, logit_bias={9: 100.0}, stop_token_ids=(9,))])["c/0"]
    assert own.last and own.last.stop_reason == 9 and own.text == ""


def test_stop_strings_across_tokens(engine: Engine) -> None:
    whole = run(engine, [submission("a", PROMPT, max_tokens=30)])["a/0"]
    cut = len(whole.text) // 2
    stop = whole.text[cut : cut + 3]
    stopped = run(engine, [submission("b", PROMPT, max_tokens=30, stop=(stop,))])["b/0"]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.last and stopped.last.stop_reason == stop
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]


def test_penalties_follow_their_formulas(engine: Engine) -> None:
    """A bias makes one token certain; a frequency penalty of 2 per occurrence must dethrone it after five."""
    free = run(engine, [submission("a", PROMPT, logit_bias={40: 30.0}, max_tokens=20)])["a/0"]
    assert set(free.tokens) == {40}
    tired = run(
        engine, [submission("b", PROMPT, logit_bias={40: 30.0}, frequency_penalty=2.0, max_tokens=30)]
    )
    assert 5 < tired["b/0"].tokens.count(40) < 30
    banned = run(engine, [submission("c", PROMPT, logit_bias={free.tokens[0]: -100.0})])["c/0"]
    assert 40 not in banned.tokens


def test_report(engine: Engine) -> None:
    plain = run(engine, [submission("a", PROMPT)])["a/0"].last
    fused = run(engine, [submission("b", PROMPT, {"qa": 1.0})])["b/0"].last
    assert plain and plain.fusion is None
    assert fused and fused.fusion
    assert fused.fusion.generations == {"qa": 1} and fused.fusion.mean_kl > 0 and fused.fusion.flips > 0


@pytest.mark.parametrize(
    ("prompt", "wishes", "weights", "param"),
    [
        ([], {}, {}, "prompt"),
        ([5] * 256, {"max_tokens": 1}, {}, "prompt"),
        ([5] * 250, {"max_tokens": 7}, {}, "max_tokens"),
        ([400], {}, {}, "prompt"),
        ([-1], {}, {}, "prompt"),
        ([5], {"logit_bias": {400: 1.0}}, {}, "logit_bias.400"),
        ([5], {}, {"qa": 4.5}, "fusion.experts.qa"),
        ([5], {}, {"qa": -4.5}, "fusion.experts.qa"),
        ([5], {}, {"nobody": 1.0}, "fusion.experts.nobody"),
    ],
)
def test_refusals_name_the_field(
    engine: Engine, prompt: list[int], wishes: dict[str, object], weights: dict[str, float], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        engine.submit(submission("a", prompt, weights, **wishes))
    assert refusal.value.param == param
    assert not engine.has_work


def test_too_little_memory_is_refused_at_the_door(tiny_models: ModelSet) -> None:
    engine = Engine(tiny_models, EngineConfig(max_batch_tokens=64, kv_memory=100_000, block_size=4))
    assert min(arena.tokens for arena in engine.residents.arenas.values()) < 120
    with pytest.raises(InvalidRequest, match="KV memory") as refusal:
        engine.submit(submission("a", [5] * 100, {"qa": 1.0}, max_tokens=100))
    assert refusal.value.param == "max_tokens"


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="finite"):
        ExpertWeight("qa", weight)


@pytest.mark.slow
def test_triton_kernels_give_the_same_answers(tiny_models: ModelSet) -> None:
    """Interpreted on a CPU: the engine's batches through the kernels of a GPU server."""
    pytest.importorskip("triton")
    wishes: list[dict[str, object]] = [
        {"logprobs": 3},
        {"temperature": 1.0, "seed": 5, "logprob_token_ids": (7, 8)},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {
            "temperature": 1.0,
            "seed": -1,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "logit_bias": {7: 2.0},
            "bad_words": ((7,),),
            "allowed_token_ids": tuple(range(0, 300, 7)),
        },
    ]
    weights = [{"qa": 0.8, "record": -0.4}, {"qa": 1.5}, {}, {"record": 1.0}]

    def answers(kernels: KernelChoice) -> dict[str, Collected]:
        config = EngineConfig(max_batch=4, max_batch_tokens=64, kv_memory=2**23, kernels=kernels)
        asked = [
            submission(f"r{number}", PROMPT[number:], weights[number], max_tokens=2, **wish)
            for number, wish in enumerate(wishes)
        ]
        asked[2] = replace(asked[2], constraints=(among(*range(0, 300, 2)),))
        engine = Engine(tiny_models, config)
        assert engine.backend.name == kernels
        return run(engine, asked)

    expected, got = answers("torch"), answers("triton")
    for key, answer in expected.items():
        assert got[key].tokens == answer.tokens
        for one, other in zip(got[key].logprobs, answer.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert [value for _, value in one.listed] == pytest.approx(
                [value for _, value in other.listed], abs=1e-5
            )
        assert got[key].last is not None and answer.last is not None
        assert got[key].last.removed_mass == pytest.approx(answer.last.removed_mass)
        mine, theirs = got[key].last.fusion, answer.last.fusion
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.mean_kl == pytest.approx(theirs.mean_kl, abs=1e-5) and mine.flips == theirs.flips
