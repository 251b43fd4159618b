"""Going ahead of a text by drafts and coming back, against the slow twin: whatever was supposed in between, everything
is as if only the kept tokens had ever come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxyserve.config import MOST_DRAFTS
from proxyserve.engine.adjustments import Adjuster, ChoiceAdjustments, RowAdjustments
from proxyserve.engine.constraint import Constrains, Constraint, ConstraintFailed
from proxyserve.engine.one_call import OneCall
from proxyserve.engine.seen_tokens import SeenTokens
from proxyserve.engine.thinking import AfterThinking, Thinking, ThinkingBudget
from proxyserve.engine.token_rules import GRAMMAR
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.answer import AnswerFormat
from proxyserve.text.reasoning import ReasoningMarks
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.text.tools.formats import HERMES
from proxyserve.types import FinishReason, SamplingParams
from proxyserve_kernels import reference as slow
from tests.engine.constraints import FillingState, Ruled, RuleState, among, spelling
from tests.engine.test_adjustments import Text, started, texts
from tests.tiny import make_tokenizer

TOKENIZER = Tokenizer(make_tokenizer(extra=("<think>", "</think>", "</think>{")))


# What has been seen ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 8), max_size=5), st.lists(st.one_of(st.none(), st.integers(0, 8)), max_size=60)
)
def test_seen_tokens(prompt: list[int], steps: list[int | None]) -> None:
    """A token comes, or (None) the last goes."""
    vocabulary, kept = SharedVocabulary(9), list[int]()
    seen = SeenTokens(prompt, vocabulary)
    for token in steps:
        if token is not None:
            seen.add(token)
            kept.append(token)
        elif kept:
            seen.take_back(kept.pop())
        fresh = SeenTokens(prompt, vocabulary)
        for one in kept:
            fresh.add(one)
        assert seen.ids.tolist() == fresh.ids.tolist() and seen.counts.tolist() == fresh.counts.tolist()
        assert len(seen) == len(fresh)


# Constraints -----------------------------------------------------------------------------------------------------


def state_of(constraint: Constraint) -> object:
    """All that can be seen of it."""
    try:
        mask = constraint.mask()
    except ConstraintFailed as error:
        return str(error), constraint.complete
    return None if mask is None else mask.tolist(), constraint.complete


def wander(asked: Constrains, steps: Sequence[int | str]) -> None:
    """Texts are said, and (a number) so many of the last tokens unsaid."""
    constraint, kept, room = asked.start(), list[int](), 0
    for step in steps:
        if isinstance(step, int):
            count = min(step, room)
            constraint.rollback(count)
            room -= count
            del kept[len(kept) - count :]
        else:
            for token in TOKENIZER.encode(step, add_special_tokens=False):
                constraint.advance(token)
                kept.append(token)
                room = min(room + 1, MOST_DRAFTS)
        fresh = asked.start()
        for token in kept:
            fresh.advance(token)
        assert state_of(constraint) == state_of(fresh)


def thinking(begun: bool) -> Thinking:
    return Thinking(ReasoningMarks(), TOKENIZER, begun)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "\u65e5"}}\n</tool_call>'
ASKED: Mapping[str, Callable[[bool], Constrains]] = {
    "budget": lambda begun: ThinkingBudget(thinking(begun), 5),
    "after": lambda begun: AfterThinking(thinking(begun), Ruled(lambda seen: {len(seen)}), frozenset({2})),
    "one call": lambda begun: OneCall(
        AnswerFormat(
            reasoning=ReasoningMarks() if begun else None,
            thinking=begun,
            tool_format=HERMES,
            tools=({"type": "function", "function": {"name": "f"}},),
        ),
        TOKENIZER,
    ),
}


@pytest.mark.parametrize("name", ASKED)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.booleans(),
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "<think>",
                    "</think>",
                    "</think>{",
                    "</thi",
                    "nk>",
                    "\n",
                    "\u2713",
                    "abc",
                    CALL,
                    CALL[:30],
                    CALL[30:],
                ]
            ),
            st.integers(1, MOST_DRAFTS),
        ),
        max_size=12,
    ),
)
@example(True, ["abcd\u2713", 1])  # inside a character, when the budget is spent
@example(False, [CALL, 30, "abc" * 20])  # a call that was whole, and is another text now
@example(False, ["abc" * 20, MOST_DRAFTS, CALL])  # fmt: skip
def test_constraints(name: str, begun: bool, steps: list[int | str]) -> None:
    wander(ASKED[name](begun), steps)


# Rows of one step ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(texts(), min_size=1, max_size=3), st.data())
def test_rows_on_the_way_stay_as_they_were(batch: list[Text], data: st.DataObject) -> None:
    """Each choice goes ahead by some drafts, comes part of the way back and goes on; all rows of the step are then
    joined at once, as is done to verify drafts. What is generated need not be what was supposed."""
    adjuster = Adjuster()
    outputs: list[list[int]] = [[] for _ in batch]
    choices = [started(text, output) for text, output in zip(batch, outputs, strict=True)]
    width = max(text.vocabulary.size for text in batch)
    scores = torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for step in range(3):
        adjuster.begin()
        rows: list[tuple[Text, list[int], RowAdjustments]] = []
        for _ in range(data.draw(st.integers(1, 4), "rulings")):
            ruled, halted = adjuster.rule({str(number): choice for number, choice in enumerate(choices)})
            assert len(ruled) + len(halted) == len(batch)
            for number, text in enumerate(batch):
                here, choice = [*outputs[number], *choices[number].drafts], choices[number]
                assert (str(number) in ruled) == bool(text.may_come(here)) and list(choice.text) == here
                if str(number) in ruled:
                    row = ruled[str(number)]
                    rows.append((text, here, row))
                    may = {token for token in range(text.vocabulary.size) if adjuster.allows(row, token)}
                    assert may & text.vocabulary.ids() == text.may_come(here)
                if data.draw(st.booleans(), "back"):
                    choice.take_back(data.draw(st.integers(0, len(choice.drafts)), "count"))
                assert choice.suppose(data.draw(st.sampled_from(text.tokens), "draft")) is None
        for choice in choices:
            choice.take_back()
            assert not choice.drafts
        made = adjuster.adjustments([row for _, _, row in rows]) if rows else None
        for number, (text, here, row) in enumerate(rows):
            own = scores[: text.vocabulary.size]
            assert slow.adjusted(own, made, number).tolist() == pytest.approx(
                text.adjusted(own.tolist(), here), abs=1e-5
            )
            halt = row.lawless()
            assert halt is None or ("min_tokens" in (halt.message or "")) == (
                len(here) < text.params.min_tokens
            )
        for number, text in enumerate(batch):
            token = text.tokens[step]
            outputs[number].append(token)
            choices[number].add(token)
            choices[number].advance(token)


def of(*constraints: Ruled, output: list[int]) -> ChoiceAdjustments:
    text = Text(SamplingParams(max_tokens=9), SharedVocabulary(40), (), frozenset({0}), constraints, ())
    choice = started(text, output)
    for token in output:
        choice.advance(token)
    return choice


@pytest.mark.parametrize("kind", [RuleState, FillingState])
def test_a_draft_that_would_end_the_text_is_not_supposed(kind: type[RuleState]) -> None:
    """Nor is one that a constraint cannot bear; those that were told of it forget it."""

    class Fragile(kind):  # type: ignore[misc, valid-type]
        def advance(self, token: int) -> None:
            super().advance(token)
            if token == 13:
                raise ConstraintFailed("too deep")

    word = of(among(5, 6, 7, 13, kind=kind), spelling(5, 6, 7, kind=Fragile), output=[5])
    assert word.suppose(6) is None
    for token, reason in ((7, FinishReason.STOP), (13, FinishReason.ERROR)):
        halt = word.suppose(token)
        assert halt is not None and halt.reason is reason and word.drafts == [6]
    adjuster = Adjuster()
    rows, _ = adjuster.rule({"a": word})
    assert [token for token in range(40) if adjuster.allows(rows["a"], token)] == [7]
    word.take_back()
    word.add(6)
    assert word.advance(6) is None and word.suppose(7) is not None


def test_a_draft_after_which_nothing_may_come_shows_when_it_is_ruled() -> None:
    choice = of(Ruled(lambda seen: {3} if len(seen) < 2 else set()), output=[3])
    assert choice.suppose(3) is None
    adjuster = Adjuster()
    rows, halted = adjuster.rule({"a": choice})
    assert not rows and GRAMMAR in (halted["a"].message or "")
    choice.take_back(1)
    rows, halted = adjuster.rule({"a": choice})
    assert adjuster.allows(rows["a"], 3) and not halted


def test_nothing_is_copied_where_nothing_is_supposed() -> None:
    text = Text(
        SamplingParams(max_tokens=9, presence_penalty=1.0), SharedVocabulary(9), (), frozenset(), (), ()
    )
    output: list[int] = []
    choice, adjuster = started(text, output), Adjuster()
    assert choice.seen is not None
    for token in (3, 4, 3):
        adjuster.begin()
        rows, _ = adjuster.rule({"a": choice})
        ids = rows["a"].seen_ids
        assert (ids is None) == (not output)
        assert ids is None or ids.base is choice.seen.ids.base
        output.append(token)
        choice.add(token)
        choice.advance(token)
