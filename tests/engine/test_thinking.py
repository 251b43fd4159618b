"""Constraints that follow a model's thinking, on tokenizers whose marks are one token and several."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from proxyserve.engine.constraint import Constraint, ConstraintFailed
from proxyserve.engine.one_call import OneCall
from proxyserve.engine.thinking import AfterThinking, Thinking, ThinkingBudget, only
from proxyserve.text.answer import AnswerFormat
from proxyserve.text.reasoning import ReasoningMarks
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.text.tools.formats import HERMES
from tests.tiny import make_tokenizer

WHOLE = Tokenizer(make_tokenizer(extra=("<think>", "</think>")))
PIECES = Tokenizer(make_tokenizer())
TOKENIZERS = pytest.mark.parametrize("tokenizer", [WHOLE, PIECES], ids=["one token", "several"])


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def allowed(mask: Tensor | None) -> set[int] | None:
    """The slow way to read a mask."""
    if mask is None:
        return None
    return {
        32 * place + bit for place, word in enumerate(mask.tolist()) for bit in range(32) if word >> bit & 1
    }


def driven(constraint: Constraint, wanted: Sequence[int], steps: int) -> list[int]:
    """What a model writes that wants to write `wanted`, and must not always."""
    written: list[int] = []
    wishes = iter(wanted)
    for _ in range(steps):
        may = allowed(constraint.mask())
        token = next(wishes) if may is None else min(may)
        constraint.advance(token)
        written.append(token)
    return written


def test_the_text_does_not_end_before_the_answer() -> None:
    """Else a form that must be met would be met by nothing."""
    ends = frozenset({2, 33})
    thinking = Thinking(ReasoningMarks(), WHOLE, begun=True)
    constraint = AfterThinking(thinking, Fixed([5]), ends).start()
    assert allowed(constraint.mask()) == set(range(len(constraint.mask()) * 32)) - ends
    for token in thinking.end_ids:
        constraint.advance(token)
    assert allowed(constraint.mask()) == {5}


def test_masks_of_single_tokens() -> None:
    for token in (0, 1, 31, 32, 63, 64, 1000):
        mask = only(token)
        assert mask.dtype == torch.int32
        assert allowed(mask) == {token}


@TOKENIZERS
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_budget_forces_the_end(tokenizer: Tokenizer, tokens: int) -> None:
    thinking = Thinking(ReasoningMarks(), tokenizer, begun=True)
    wishes = ids(tokenizer, "abcdefghij" * 9)
    end = ids(tokenizer, "</think>")
    constraint = ThinkingBudget(thinking, tokens).start()
    written = driven(constraint, wishes, tokens + len(end) + 5)
    assert written == [*wishes[:tokens], *end, *wishes[tokens : tokens + 5]]
    assert not constraint.complete


@TOKENIZERS
def test_budget_counts_from_the_start_mark_and_leaves_shorter_thoughts_alone(tokenizer: Tokenizer) -> None:
    thinking = Thinking(ReasoningMarks(), tokenizer, begun=False)
    short = ids(tokenizer, "\n<think>abc</think>and so on and on and on")
    assert driven(ThinkingBudget(thinking, 20).start(), short, len(short)) == short
    silent = ids(tokenizer, "no <think> at the beginning")
    assert driven(ThinkingBudget(thinking, 0).start(), silent, len(silent)) == silent
    start, rest = ids(tokenizer, "<think>"), ids(tokenizer, "abcdef" * 5)
    written = driven(
        ThinkingBudget(thinking, 3).start(), [*start, *rest], len(start) + 3 + len(thinking.end_ids)
    )
    assert written == [*start, *rest[:3], *thinking.end_ids]


def test_budget_lets_a_character_end() -> None:
    thinking = Thinking(ReasoningMarks(), WHOLE, begun=True)
    wishes = ids(WHOLE, "\u2713\u2713\u2713")
    assert len(wishes) == 9, "a token for each byte"
    written = driven(ThinkingBudget(thinking, 4).start(), wishes, 7)
    assert written == [*wishes[:6], *thinking.end_ids]


class Fixed:
    """Exactly these ids, in this order."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self._wanted, self._met = wanted, 0

    def start(self) -> Fixed:
        return Fixed(self._wanted)

    @property
    def complete(self) -> bool:
        return self._met == len(self._wanted)

    def mask(self) -> Tensor | None:
        return only(self._wanted[self._met])

    def advance(self, token: int) -> None:
        assert token == self._wanted[self._met]
        self._met += 1

    def rollback(self, count: int) -> None:
        self._met -= count


@TOKENIZERS
def test_inner_constraint_begins_after_the_thinking(tokenizer: Tokenizer) -> None:
    answer = ids(tokenizer, "ok")
    thought = ids(tokenizer, "let me think</think>")
    constraint = AfterThinking(Thinking(ReasoningMarks(), tokenizer, begun=True), Fixed(answer)).start()
    for token in thought:
        assert constraint.mask() is None
        assert not constraint.complete
        constraint.advance(token)
    for token in answer:
        assert allowed(constraint.mask()) == {token}
        constraint.advance(token)
    assert constraint.complete


def test_thinking_may_come_first() -> None:
    answer = ids(WHOLE, "ok")
    asked = AfterThinking(Thinking(ReasoningMarks(), WHOLE, begun=False), Fixed(answer))
    [start] = ids(WHOLE, "<think>")
    thinking, direct = asked.start(), asked.start()
    assert allowed(thinking.mask()) == {start, answer[0]}
    for token in ids(WHOLE, "<think>hm</think>"):
        thinking.advance(token)
    assert allowed(thinking.mask()) == {answer[0]}
    direct.advance(answer[0])
    assert direct.complete or allowed(direct.mask()) == {answer[1]}


def test_mark_in_the_middle_of_a_token_is_refused() -> None:
    glued = Tokenizer(make_tokenizer(extra=("</think>{",)))
    constraint = AfterThinking(Thinking(ReasoningMarks(), glued, begun=True), Fixed([1])).start()
    constraint.advance(ids(glued, "</think>{")[0])
    with pytest.raises(ConstraintFailed):
        constraint.mask()


def test_answer_ends_with_its_first_call() -> None:
    form = AnswerFormat(tool_format=HERMES, tools=({"type": "function", "function": {"name": "f"}},))
    constraint = OneCall(form, PIECES).start()
    text = '\u00fcber <tool_call>\n{"name": "f", "arguments": {"a": "\u65e5"}}'
    written = ids(PIECES, text)
    for token in written:
        assert not constraint.complete
        assert constraint.mask() is None
        constraint.advance(token)
    assert constraint.complete
