"""The adjustments of batches against a twin that works everything out again from the whole text, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyserve.engine.adjustments import Adjuster, ChoiceAdjustments
from proxyserve.engine.seen_tokens import SeenTokens
from proxyserve.engine.token_rules import GRAMMAR, TokenRules
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.types import FinishReason, SamplingParams
from proxyserve_kernels import reference as slow
from tests.engine.constraints import FillingState, Ruled, RuleState


@dataclass(frozen=True)
class Text:
    """One choice as a request describes it, and what is generated, all of it."""

    params: SamplingParams
    vocabulary: SharedVocabulary
    prompt: tuple[int, ...]
    stop_ids: frozenset[int]
    constraints: tuple[Ruled, ...]
    tokens: tuple[int, ...]

    def may_come(self, output: Sequence[int]) -> set[int]:
        """From the fields, one after the other."""
        params, allowed = self.params, self.vocabulary.ids()
        if params.allowed_token_ids is not None:
            allowed &= set(params.allowed_token_ids)
        for word in params.bad_words:
            rest = list(word[:-1])
            if not rest or list(output)[-len(rest) :] == rest:
                allowed -= {word[-1]}
        if len(output) < params.min_tokens:
            allowed -= set(params.stop_token_ids)
            if not params.ignore_eos:
                allowed -= self.stop_ids
        return allowed & self.constrained(output)

    def constrained(self, output: Sequence[int]) -> set[int]:
        allowed = set(range(self.vocabulary.size))
        for constraint in self.constraints:
            ids = constraint.rule(output)
            if ids is not None:
                allowed &= {token for token in ids if token < constraint.words * 32}
        return allowed

    def adjusted(self, scores: Sequence[float], output: Sequence[int]) -> list[float]:
        params = self.params
        result = list(scores)
        for token, value in params.logit_bias.items():
            result[token] += value
        prompt = self.prompt if params.repetition_penalty != 1.0 else ()
        for token in {*prompt, *output} & self.vocabulary.ids():
            score, count = result[token], list(output).count(token)
            score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
            if count:
                score -= params.presence_penalty + params.frequency_penalty * count
            result[token] = score
        possible = self.may_come(output)
        return [score if token in possible else -math.inf for token, score in enumerate(result)]


def halving(seed: int) -> Any:
    """A rule that allows about half of the ids, others after every text; now and then all."""

    def rule(seen: Sequence[int]) -> set[int] | None:
        generator = torch.Generator().manual_seed(hash((seed, *seen)) % 2**31)
        ids = set(torch.randperm(130, generator=generator)[:65].tolist())
        return None if min(ids) > 2 else ids

    return rule


@st.composite
def texts(draw: st.DrawFn) -> Text:
    size = draw(st.sampled_from((5, 32, 33, 97)))
    holes = frozenset(draw(st.sets(st.integers(1, size - 2), max_size=2)))
    vocabulary = SharedVocabulary(size, holes)
    ids = st.sampled_from(sorted(vocabulary.ids()))
    end = draw(ids)
    params = SamplingParams(
        max_tokens=50,
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=1))),
        min_tokens=draw(st.sampled_from((0, 0, 2, 50))),
        repetition_penalty=draw(st.sampled_from((1.0, 1.3, 0.5))),
        presence_penalty=draw(st.sampled_from((0.0, 0.5))),
        frequency_penalty=draw(st.sampled_from((0.0, -0.25))),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from((-100.0, 2.0)), max_size=3)),
        allowed_token_ids=draw(st.one_of(st.none(), st.lists(ids, min_size=2, max_size=9).map(tuple))),
        bad_words=tuple(draw(st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3))),
    )
    constraints = tuple(
        Ruled(halving(draw(st.integers(0, 99))), words=draw(st.sampled_from((1, 2, 5))), kind=kind)
        for kind in draw(st.lists(st.sampled_from((RuleState, FillingState)), max_size=2))
    )
    # Few different ones, so that bad words come about.
    few = draw(st.lists(ids, min_size=1, max_size=3))
    prompt = draw(st.lists(st.integers(0, size - 1), max_size=4))
    tokens = tuple(draw(st.lists(st.sampled_from(few), min_size=6, max_size=6)))
    return Text(params, vocabulary, tuple(prompt), frozenset({end}), constraints, tokens)


def started(text: Text, output: list[int]) -> ChoiceAdjustments:
    params = text.params
    prompt = text.prompt if params.repetition_penalty != 1.0 else ()
    return ChoiceAdjustments(
        params=params,
        output=output,
        rules=TokenRules.of(params, text.vocabulary, text.stop_ids),
        seen=SeenTokens(prompt, text.vocabulary) if params.penalised else None,
        constraints=tuple(constraint.start() for constraint in text.constraints),
    )


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(texts(), min_size=1, max_size=4), st.integers(0, 5))
def test_every_step_of_a_batch(batch: list[Text], late: int) -> None:
    """One buffer for all steps; one of the choices comes later than the others."""
    adjuster = Adjuster()
    outputs: list[list[int]] = [[] for _ in batch]
    choices = [started(text, output) for text, output in zip(batch, outputs, strict=True)]
    width = max(text.vocabulary.size for text in batch)
    scores = torch.randn(width, generator=torch.Generator().manual_seed(late), dtype=torch.float64)
    for step in range(6):
        here = [number for number in range(len(batch)) if number or step >= late]
        if not here:
            continue
        adjuster.begin()
        rows, halted = adjuster.rule({str(number): choices[number] for number in here})
        for number in here:
            some = bool(batch[number].may_come(outputs[number]))
            assert some == (str(number) not in halted)
        alive = [number for number in here if str(number) not in halted]
        if alive:
            made = adjuster.adjustments([rows[str(number)] for number in alive])
            for row, number in enumerate(alive):
                text, output = batch[number], outputs[number]
                own = scores[: text.vocabulary.size]
                got = slow.adjusted(own, made, row).tolist()
                assert got == pytest.approx(text.adjusted(own.tolist(), output), abs=1e-5)
                if text.constraints:
                    assert made is not None and made.masks is not None and made.removed_by is not None
                    words = made.masks[int(made.removed_by[row])].tolist()
                    allowed = {token for token in range(text.vocabulary.size) if slow.allows(words, token)}
                    assert allowed == text.constrained(output)
        for number in here:
            token = batch[number].tokens[step]
            outputs[number].append(token)
            choices[number].add(token)
            choices[number].advance(token)


def test_nothing_asked_nothing_made() -> None:
    text = Text(SamplingParams(max_tokens=3), SharedVocabulary(40), (1,), frozenset({0}), (), ())
    adjuster = Adjuster()
    rows, halted = adjuster.rule({"a": started(text, [])})
    assert not halted and adjuster.adjustments([rows["a"]]) is None


@pytest.mark.parametrize("kind", [RuleState, FillingState])
def test_what_an_earlier_step_left_in_the_buffer(kind: type[RuleState]) -> None:
    """A step in which everything may come, then one with fewer ids and shorter masks in the same rows."""
    params, wide, narrow = SamplingParams(max_tokens=3), SharedVocabulary(160), SharedVocabulary(70)
    adjuster = Adjuster()
    everything = started(Text(params, wide, (), frozenset(), (Ruled(lambda seen: None, kind=kind),), ()), [])
    assert list(adjuster.rule({"a": everything})[0]) == ["a"]
    short = Ruled(lambda seen: {5, 69}, words=1, kind=kind)
    choice = started(Text(params, narrow, (), frozenset(), (short,), ()), [])
    adjuster.begin()
    rows, _ = adjuster.rule({"a": choice})
    made = adjuster.adjustments([rows["a"]])
    assert made is not None and made.masks is not None
    assert made.masks.tolist() == [[32, 0, 0, 0, 0]] * 2, "what may come, and what the constraint allows"
    adjuster.begin()
    assert list(adjuster.rule({"a": everything})[0]) == ["a"]
    adjuster.begin()
    beyond = Ruled(lambda seen: {100}, words=5, kind=kind)
    choice = started(Text(params, narrow, (), frozenset(), (beyond,), ()), [])
    assert adjuster.rule({"a": choice})[1]["a"].reason is FinishReason.ERROR, "an id that there is not"


def test_one_call_fills_the_masks_of_a_step() -> None:
    ruled = Ruled(lambda seen: {len(seen) + 1}, kind=FillingState)
    text = Text(SamplingParams(max_tokens=3), SharedVocabulary(40), (), frozenset(), (ruled, ruled), ())
    choices = {str(number): started(text, []) for number in range(3)}
    adjuster, calls = Adjuster(), FillingState.calls
    rows, halted = adjuster.rule(choices)
    assert not halted
    assert FillingState.calls == calls + 1
    made = adjuster.adjustments(list(rows.values()))
    assert made is not None and made.masks is not None
    assert made.masks[made.mask_of].tolist() == [[2, 0]] * 3


@pytest.mark.parametrize(
    ("fields", "allowed", "named"),
    [
        ({"allowed_token_ids": (3, 4), "bad_words": ((3,), (4,), (5,))}, None, {"allowed_token_ids", "bad_words"}),
        ({"allowed_token_ids": (0,), "min_tokens": 3}, None, {"allowed_token_ids", "min_tokens"}),
        ({"allowed_token_ids": (3, 4), "bad_words": ((7,),)}, {5, 7}, {GRAMMAR, "allowed_token_ids"}),
        ({"bad_words": ((2, 3),), "min_tokens": 9}, {3}, {GRAMMAR, "bad_words"}),
        ({"allowed_token_ids": (0, 3), "min_tokens": 9}, {0, 5}, {GRAMMAR, "allowed_token_ids", "min_tokens"}),
        ({"allowed_token_ids": (3, 4)}, set(), {GRAMMAR}),
        ({"allowed_token_ids": (3, 4), "min_tokens": 9}, {4}, set()),
    ],
)  # fmt: skip
def test_fields_that_exclude_each_other(
    fields: Mapping[str, Any], allowed: set[int] | None, named: set[str]
) -> None:
    """After the token 2: those are named that are needed for it, and no others."""
    params = SamplingParams(max_tokens=9, **fields)
    constraints = () if allowed is None else (Ruled(lambda seen: allowed),)
    text = Text(params, SharedVocabulary(40, frozenset({9})), (), frozenset({0}), constraints, ())
    _, halted = Adjuster().rule({"a": started(text, [2])})
    assert bool(halted) == bool(named)
    if named:
        assert halted["a"].reason is FinishReason.ERROR
        message = halted["a"].message or ""
        all_names = {GRAMMAR, "allowed_token_ids", "bad_words", "min_tokens"}
        assert {name for name in all_names if name in message} == named


def test_a_whole_text_needs_no_more_tokens() -> None:
    """The grammar allows only the end, min_tokens forbids it: the grammar wins."""
    params = SamplingParams(max_tokens=9, min_tokens=5)
    text = Text(params, SharedVocabulary(40), (), frozenset({0}), (Ruled(lambda seen: {0}),), ())
    assert Adjuster().rule({"a": started(text, [2])})[1]["a"].reason is FinishReason.STOP
