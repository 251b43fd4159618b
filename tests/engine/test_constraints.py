"""Constraints, bad words, allowed ids and least lengths in running requests: each choice by itself, failures alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig
from proxyserve.engine.constraint import ConstraintFailed
from proxyserve.engine.engine import Engine
from proxyserve.errors import InvalidRequest
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason
from tests.engine.constraints import FillingState, Ruled, RuleState, among, spelling
from tests.engine.driver import Collected, run, submission
from tests.naive import NaiveFusion
from tests.tiny import TinyFamily

PROMPT = [5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45]
WORD = (40, 41, 7, 300, 41)
END = 0


@pytest.fixture(scope="module")
def engine(tiny_models: ModelSet) -> Iterator[Engine]:
    yield Engine(tiny_models, EngineConfig(max_batch=24, max_batch_tokens=64, kv_memory=2**23, block_size=4))


def constrained(name: str, *constraints: Any, weights: Any = None, **sampling: Any) -> Any:
    return replace(submission(name, PROMPT, weights, **sampling), constraints=constraints)


def ended(result: Collected) -> tuple[FinishReason | None, str]:
    assert result.last is not None
    return result.last.finish_reason, result.last.error or ""


@pytest.mark.parametrize("kind", [RuleState, FillingState])
def test_only_what_is_allowed_comes_and_a_whole_text_ends(engine: Engine, kind: type[RuleState]) -> None:
    wishes = [
        constrained("a", spelling(*WORD, kind=kind), weights={"qa": 1.0}, logprobs=0),
        constrained("b", among(7, 8, 300, kind=kind), n=3, temperature=1.0, seed=4, max_tokens=20),
        constrained("c", among(7, 8, kind=kind), among(8, 9), max_tokens=4),
        submission("free", PROMPT, max_tokens=20),
    ]
    results = run(engine, wishes)
    spelt = results["a/0"]
    assert tuple(spelt.tokens) == WORD and ended(spelt) == (FinishReason.STOP, "")
    assert spelt.last and spelt.last.stop_reason is None
    # Each position allows one token, so what is removed is all that the token has not.
    expected = [1 - math.exp(entry.logprob) for entry in spelt.logprobs]
    assert spelt.last.removed_mass == pytest.approx(sum(expected) / len(WORD), abs=1e-6)
    drawn = [results[f"b/{index}"].tokens for index in range(3)]
    assert all(set(tokens) <= {7, 8, 300} and len(tokens) == 20 for tokens in drawn)
    assert drawn[0] != drawn[1], "each choice has a state and noise of its own"
    assert results["c/0"].tokens == [8] * 4
    free = results["free/0"]
    assert free.last and free.last.removed_mass is None
    assert free.tokens == run(engine, [submission("alone", PROMPT, max_tokens=20)])["alone/0"].tokens


def test_a_constraint_fails_alone(engine: Engine) -> None:
    """Wherever it fails, and whatever it raises."""

    def after(count: int, error: Exception) -> Any:
        def rule(seen: Sequence[int]) -> set[int]:
            if len(seen) == count:
                raise error
            return {7}

        return rule

    class Stuck(RuleState):
        def advance(self, token: int) -> None:
            super().advance(token)
            raise ConstraintFailed("too deep")

    class Unsure(RuleState):
        @property
        def complete(self) -> bool:
            raise ZeroDivisionError("secret")

    wishes = [
        constrained("told", Ruled(after(2, ConstraintFailed("took too long")))),
        constrained("hidden", Ruled(after(1, ValueError("secret")))),
        constrained("stuck", Ruled(lambda seen: {7}, kind=Stuck)),
        constrained("unsure", Ruled(lambda seen: {7}, kind=Unsure)),
        constrained("filling", Ruled(after(1, ConstraintFailed("no more")), kind=Filling)),
        constrained("beside", among(7, kind=Filling), max_tokens=6),
        submission("free", PROMPT),
    ]
    results = run(engine, wishes)
    assert results["told/0"].tokens == [7, 7] and ended(results["told/0"])[1] == "took too long"
    assert results["hidden/0"].tokens == [7] and "ValueError" in ended(results["hidden/0"])[1]
    assert results["stuck/0"].tokens == [7] and ended(results["stuck/0"])[1] == "too deep"
    assert results["unsure/0"].tokens == [] and "secret" not in ended(results["unsure/0"])[1]
    assert results["filling/0"].tokens == [7] and ended(results["filling/0"])[1] == "no more"
    failed = ("told", "hidden", "stuck", "unsure", "filling")
    assert {ended(results[f"{name}/0"])[0] for name in failed} == {FinishReason.ERROR}
    assert results["beside/0"].tokens == [7] * 6
    assert results["free/0"].tokens == run(engine, [submission("alone", PROMPT)])["alone/0"].tokens


class Filling(FillingState):
    """Can be asked alone as well, as the engine does when filling together fails."""

    def mask(self) -> torch.Tensor | None:
        return RuleState.mask(self)


def test_no_state_can_be_made(engine: Engine) -> None:
    class Never:
        def start(self) -> Any:
            raise ConstraintFailed("the grammar is too large")

    with pytest.raises(InvalidRequest, match="too large"):
        engine.submit(constrained("a", Never()))
    assert not engine.has_work


def test_fields_that_leave_nothing(engine: Engine) -> None:
    """Refused at once where it shows in the request, an end of the choice where it shows later."""
    for fields, param in (
        ({"allowed_token_ids": (END,), "min_tokens": 2, "ignore_eos": False}, "allowed_token_ids"),
        ({"allowed_token_ids": (7,), "bad_words": ((7,),)}, "allowed_token_ids"),
    ):
        with pytest.raises(InvalidRequest, match="exclude each other") as refusal:
            engine.submit(submission("a", PROMPT, **fields))
        assert refusal.value.param == param
    for constraints, fields, param in (
        ([among(7, 8)], {"allowed_token_ids": (9, 10)}, "allowed_token_ids"),
        ([among(7, 8)], {"bad_words": ((7,), (8,))}, "bad_words"),
        ([among(7, 8), among(8, 9)], {"allowed_token_ids": (7, 9)}, None),
        ([among(7), among(8)], {"allowed_token_ids": (7, 8)}, None),
    ):
        made = submission("a", PROMPT, **fields)
        with pytest.raises(InvalidRequest, match="No token may come next") as refusal:
            engine.submit(replace(made, constraints=tuple(constraints)))
        assert refusal.value.code == "no_token_left"
        assert param is None or refusal.value.param == param
    assert not engine.has_work
    support = {"experts": {"qa": 1}, "support": {"of": ["base"], "top_k": 1}}
    best = run(engine, [submission("best", PROMPT, max_tokens=1)])["best/0"].tokens[0]
    other = replace(constrained("ruled", among(best + 1)), fusion=parse_fusion(support))
    results = run(
        engine,
        [
            constrained("grammar", Ruled(lambda seen: {8, 9} if seen else {7}), allowed_token_ids=(7, 10)),
            submission("word", PROMPT, allowed_token_ids=(7,), bad_words=((7, 7, 7),)),
            other,
            submission("free", PROMPT, {"qa": 1.0}),
        ],
    )
    reason, message = ended(results["grammar/0"])
    assert reason is FinishReason.ERROR and "allowed_token_ids" in message and "response_format" in message
    assert results["grammar/0"].tokens == [7]
    assert all(result.last and result.last.refused for name, result in results.items() if name != "free/0")
    reason, message = ended(results["word/0"])
    assert results["word/0"].tokens == [7, 7] and reason is FinishReason.ERROR
    assert "allowed_token_ids and bad_words exclude each other" in message
    reason, message = ended(results["ruled/0"])
    assert reason is FinishReason.ERROR and "has no probability under the fused law" in message
    assert len(results["free/0"].tokens) == 12


def test_least_lengths(engine: Engine) -> None:
    forced = {"logit_bias": {END: 100.0}, "ignore_eos": False, "max_tokens": 8}
    whole = run(engine, [submission("whole", PROMPT, max_tokens=20)])["whole/0"]
    stop = next(letter for letter in whole.text if letter.isprintable() and letter.isascii())
    results = run(
        engine,
        [
            submission("end", PROMPT, min_tokens=3, **forced),
            submission("own", PROMPT, min_tokens=2, stop_token_ids=(9,), logit_bias={9: 100.0}),
            submission("string", PROMPT, min_tokens=20, max_tokens=20, stop=(stop,)),
            constrained("whole", spelling(*WORD), min_tokens=10),
            constrained("last", Ruled(lambda seen: {7} if len(seen) < 2 else {END}), min_tokens=6, **forced),
        ],
    )
    end = results["end/0"]
    assert len(end.tokens) == 4 and end.tokens[3] == END and END not in end.tokens[:3]
    assert len(results["own/0"].tokens) == 3 and results["own/0"].tokens[2] == 9
    assert results["string/0"].tokens == whole.tokens and results["string/0"].text.startswith(whole.text[:5])
    assert tuple(results["whole/0"].tokens) == WORD, "a whole text ends, however short"
    assert results["last/0"].tokens == [7, 7] and ended(results["last/0"]) == (FinishReason.STOP, "")


def test_bad_words_in_a_text_that_wants_them(engine: Engine) -> None:
    free = run(engine, [submission("free", PROMPT, max_tokens=16)])["free/0"].tokens
    words = ((free[0],), tuple(free[3:5]), tuple(free[8:11]))
    tamed = run(engine, [submission("a", PROMPT, max_tokens=40, bad_words=words)])["a/0"].tokens
    assert len(tamed) == 40
    for word in words:
        assert all(tuple(tamed[at : at + len(word)]) != word for at in range(len(tamed)))


def test_log_probs_of_given_ids(engine: Engine) -> None:
    """In their order, one float wherever a token appears, and without `logprobs` too."""
    width = engine.models.base.vocabulary.size
    ids = (9, 3, 3, 200)
    results = run(
        engine,
        [
            submission("a", PROMPT, {"qa": 1.0}, logprobs=width, logprob_token_ids=ids),
            submission("b", PROMPT, {"qa": 1.0}, logprob_token_ids=(5,), temperature=1.0),
            submission("c", PROMPT, {"qa": 1.0}),
            submission("d", PROMPT, prompt_logprobs=width, logprob_token_ids=ids, max_tokens=1),
        ],
    )
    assert [len(results[f"{name}/0"].logprobs) for name in "abc"] == [12, 12, 0]
    for entry in results["a/0"].logprobs:
        top = dict(entry.top)
        assert entry.listed == tuple((token, top[token]) for token in ids)
    assert all(entry.top == () and entry.listed[0][0] == 5 for entry in results["b/0"].logprobs)
    last = results["d/0"].last
    assert last is not None and last.prompt_logprobs is not None and last.prompt_logprobs[0] is None
    for scored in last.prompt_logprobs[1:]:
        assert scored is not None
        assert scored.listed == tuple((token, dict(scored.top)[token]) for token in ids)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": (5, 400)}, "allowed_token_ids"),
        ({"bad_words": ((5, 400),)}, "bad_words"),
        ({"logprob_token_ids": (-1,)}, "logprob_token_ids"),
    ],
)
def test_ids_that_the_models_do_not_share(engine: Engine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="not in the vocabulary") as refusal:
        engine.submit(submission("a", PROMPT, **fields))
    assert refusal.value.param == param


def test_special_tokens_in_the_text(engine: Engine) -> None:
    """Left out unless wanted; what is wanted can be stopped at."""
    wish = {"allowed_token_ids": (END,), "max_tokens": 2}
    special = engine.models.base.tokenizer.token_text(END)
    results = run(
        engine,
        [
            submission("out", PROMPT, **wish),
            submission("in", PROMPT, skip_special_tokens=False, **wish),
            submission("stop", PROMPT, skip_special_tokens=False, stop=(special[2:],), **wish),
        ],
    )
    assert [results[f"{name}/0"].text for name in ("out", "in", "stop")] == ["", special * 2, special[:2]]
    assert results["stop/0"].last and results["stop/0"].last.stop_reason == special[2:]


def ruled() -> list[Any]:
    """Requests that use everything that rules tokens out or penalises, and a constraint of each kind."""
    fields: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 5,
        "max_tokens": 24,
        "allowed_token_ids": tuple(range(0, 384, 3)),
        "bad_words": ((9,), (12, 15), (300, 303)),
        "min_tokens": 20,
        "ignore_eos": False,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "logit_bias": {12: 4.0, 15: 4.0, END: 3.0},
    }
    moving = Ruled(lambda seen: range(len(seen), 384, 2))
    filling = Ruled(lambda seen: range(len(seen), 384, 2), kind=FillingState)
    gated = parse_fusion({"experts": {"qa": 1}, "gate": {"confidence": 0.2}})
    return [
        submission("fields", PROMPT, {"qa": 0.8, "record": -0.4}, **fields),
        constrained("both", moving, weights={"qa": 0.8}, **fields),
        constrained("several", filling, n=2, temperature=1.0, seed=8, max_tokens=24),
        replace(constrained("gated", moving, **fields), fusion=gated),
    ]


def test_alone_in_a_crowd_and_preempted(tiny_models: ModelSet, engine: Engine) -> None:
    together = run(engine, ruled())
    small = Engine(
        tiny_models, EngineConfig(max_batch=8, max_batch_tokens=24, kv_memory=120_000, block_size=4)
    )
    squeezed = run(small, [*ruled(), *(submission(f"o{n}", [n + 1, *PROMPT], {"qa": 1.0}) for n in range(6))])
    assert small.counters.preemptions > 3
    alone = {key: result for wish in ruled() for key, result in run(engine, [wish]).items()}
    assert set(alone) == set(together)
    for key, result in together.items():
        assert result.tokens == alone[key].tokens == squeezed[key].tokens, key
        assert result.last and alone[key].last and result.last.finish_reason is not FinishReason.ERROR
        removed, other = result.last.removed_mass, alone[key].last.removed_mass
        assert (removed is None) == (key == "fields/0") and removed == pytest.approx(other, abs=1e-5)
    gated = together["gated/0"].last
    assert gated and gated.usage and 0 < (gated.usage.gated_tokens or 0) < 24, "both kinds of rows took part"


@torch.inference_mode()
def test_against_plain_forwards(tiny_family: TinyFamily, engine: Engine) -> None:
    """One mixed batch of greedy requests, against float64 forwards and the processors of transformers; presence and
    frequency, which it lacks, by hand."""
    pairs = {name: (tuned, tiny_family.untuned) for name, tuned in tiny_family.experts.items()}
    naive = NaiveFusion(tiny_family.base, pairs)
    models = {"base": naive.base.double()}
    for name, (tuned, untuned) in naive.pairs.items():
        models[f"{name}.tuned"], models["untuned"] = tuned.double(), untuned.double()
    width, steps = engine.models.base.vocabulary.size, 14
    free = run(engine, [submission("free", PROMPT, {"qa": 1.0}, max_tokens=steps)])["free/0"].tokens
    wishes: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
        "bias": ({"qa": 1.0}, {"logit_bias": {free[2]: -100.0, 50: 6.0}, "presence_penalty": 1.0}),
        "repeated": ({"record": -0.7}, {"repetition_penalty": 1.4, "logit_bias": {31: 8.0}}),
        "often": ({}, {"frequency_penalty": 0.7, "logit_bias": {31: 8.0}, "repetition_penalty": 0.9}),
        "long": ({"qa": 1.0}, {"min_tokens": 5, "logit_bias": {END: 40.0}, "ignore_eos": False}),
        "words": ({"qa": 1.0}, {"bad_words": ((free[0],), tuple(free[4:6]), tuple(free[7:10]))}),
        "allowed": ({"qa": 0.5}, {"allowed_token_ids": tuple(range(3, width, 7)), "presence_penalty": 2.0}),
        "all": (
            {"qa": 0.35, "record": 1.6},
            {
                "min_tokens": 9,
                "ignore_eos": False,
                "logit_bias": {END: 30.0, 24: 6.0, 31: 6.0},
                "bad_words": ((24, 31), (31, 31), (10,)),
                "allowed_token_ids": (*range(3, width, 7), END),
                "repetition_penalty": 1.2,
                "frequency_penalty": 0.4,
            },
        ),
    }

    def expected(weights: dict[str, float], fields: dict[str, Any]) -> list[int]:
        output: list[int] = []
        while len(output) < steps:
            ids = torch.tensor([[*PROMPT, *output]])
            logits = {
                name: model(ids, use_cache=False).logits[:, -1, :width] for name, model in models.items()
            }
            scores = logits["base"].clone()
            for name, weight in weights.items():
                scores += weight * (logits[f"{name}.tuned"] - logits["untuned"])
            for token, value in fields.get("logit_bias", {}).items():
                scores[0, token] += value
            if fields.get("repetition_penalty"):
                scores = RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"])(ids, scores)
            for token in set(output):
                scores[0, token] -= fields.get("presence_penalty", 0.0)
                scores[0, token] -= fields.get("frequency_penalty", 0.0) * output.count(token)
            written = torch.tensor([output], dtype=torch.int64)
            if fields.get("bad_words"):
                words = [list(word) for word in fields["bad_words"]]
                scores = NoBadWordsLogitsProcessor(words)(written, scores)
            if fields.get("min_tokens"):
                scores = MinNewTokensLengthLogitsProcessor(0, fields["min_tokens"], [END], device="cpu")(
                    written, scores
                )
            if fields.get("allowed_token_ids"):
                kept = torch.full_like(scores, -math.inf)
                at = list(fields["allowed_token_ids"])
                kept[0, at] = scores[0, at]
                scores = kept
            output.append(int(scores.argmax()))
            if output[-1] == END and fields.get("ignore_eos") is False:
                break
        return output

    asked = [
        submission(name, PROMPT, weights, max_tokens=steps, **fields)
        for name, (weights, fields) in wishes.items()
    ]
    results = run(engine, asked)
    for name, (weights, fields) in wishes.items():
        plain = expected(weights, fields)
        assert results[f"{name}/0"].tokens == plain, name
        assert plain != expected(weights, {}), f"{name}: the fields change nothing here"
