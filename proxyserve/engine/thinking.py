"""Constraints that depend on whether a model still thinks."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from proxyserve.config import MOST_DRAFTS
from proxyserve.engine.constraint import Constrains, Constraint, ConstraintFailed
from proxyserve.text.reasoning import ReasoningMarks
from proxyserve.text.tokenizer import Tokenizer

_WORD = 32

#: No character has more bytes; a model that goes on without ending one is not waited for.
_LONGEST_CHARACTER = 4


class Phase(Enum):
    """BEFORE: nothing was written yet that says whether there will be reasoning."""

    BEFORE = "before"
    THINKING = "thinking"
    ANSWERING = "answering"


@dataclass(frozen=True, slots=True)
class Thinking:
    """How to tell: the marks, the tokenizer that ids are read with, and whether the prompt has begun the reasoning."""

    marks: ReasoningMarks
    tokenizer: Tokenizer
    begun: bool

    @property
    def start_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.marks.start, add_special_tokens=False))

    @property
    def end_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.marks.end, add_special_tokens=False))

    def follow(self) -> _Follower:
        return _Follower(self)


class _Follower:
    """Reads one choice's tokens as bytes, since ids do not show marks that are cut in several ways."""

    def __init__(self, thinking: Thinking) -> None:
        self.phase = Phase.THINKING if thinking.begun else Phase.BEFORE
        self.rest = b""  # what the token that ended the reasoning held after the mark
        self._thinking = thinking
        self._start, self._end = thinking.marks.start.encode(), thinking.marks.end.encode()
        self._read = b""
        self._past: deque[tuple[Phase, bytes, bytes]] = deque(maxlen=MOST_DRAFTS)

    @property
    def untouched(self) -> bool:
        """Whether the reasoning can still begin with the next token."""
        return self.phase is Phase.BEFORE and not self._read.strip()

    def rollback(self, count: int) -> None:
        for _ in range(count):
            self.phase, self.rest, self._read = self._past.pop()

    def advance(self, token: int) -> None:
        self._past.append((self.phase, self.rest, self._read))
        if self.phase is Phase.ANSWERING:
            return
        self._read += self._thinking.tokenizer.token_bytes(token)
        if self.phase is Phase.BEFORE:
            bare = self._read.lstrip()
            if bare.startswith(self._start):
                self.phase, self._read = Phase.THINKING, bare[len(self._start) :]
            elif not self._start.startswith(bare):
                self.phase = Phase.ANSWERING
        if self.phase is Phase.THINKING:
            _, mark, rest = self._read.partition(self._end)
            if mark:
                self.phase, self.rest = Phase.ANSWERING, rest
            else:
                self._read = self._read[-len(self._end) + 1 :]


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """`Constrains`: after `tokens` tokens of reasoning its end mark is forced, a token at a time, once the character
    that was begun is whole."""

    thinking: Thinking
    tokens: int

    def start(self) -> Constraint:
        return _Budget(self)


class _Budget:
    complete = False

    def __init__(self, budget: ThinkingBudget) -> None:
        self._follower = budget.thinking.follow()
        self._tokenizer = budget.thinking.tokenizer
        self._left = budget.tokens
        self._end = budget.thinking.end_ids
        self._forced = 0  # tokens of the end mark that were forced
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._past: deque[tuple[int, int, tuple[bytes, int]]] = deque(maxlen=MOST_DRAFTS)

    def mask(self) -> Tensor | None:
        if self._follower.phase is not Phase.THINKING or self._left > 0:
            return None
        inside_character = bool(self._decoder.getstate()[0]) and self._left > -_LONGEST_CHARACTER
        if (self._forced == 0 and inside_character) or self._forced == len(self._end):
            return None
        return only(self._end[self._forced])

    def advance(self, token: int) -> None:
        self._past.append((self._left, self._forced, self._decoder.getstate()))
        if self._follower.phase is Phase.THINKING:
            if self._forced or (self._left <= 0 and token == self._end[0]):
                self._forced += 1
            else:
                self._left -= 1
                self._decoder.decode(self._tokenizer.token_bytes(token))
        self._follower.advance(token)

    def rollback(self, count: int) -> None:
        for _ in range(count):
            self._left, self._forced, read = self._past.pop()
            self._decoder.setstate(read)
        self._follower.rollback(count)


@dataclass(frozen=True, slots=True)
class AfterThinking:
    """`Constrains`: what `inner` asks of the answer, which begins where the reasoning ends. A model that has not begun
    to think may do so instead of beginning its answer. `ends` are tokens that end the text; none of them comes while it
    thinks, since there would be no answer then."""

    thinking: Thinking
    inner: Constrains
    ends: frozenset[int] = frozenset()

    def start(self) -> Constraint:
        return _After(self)


class _After:
    def __init__(self, after: AfterThinking) -> None:
        self._follower = after.thinking.follow()
        self._inner = after.inner.start()
        self._start = after.thinking.start_ids
        self._going_on = all_but(after.ends, after.thinking.tokenizer.vocabulary_size) if after.ends else None
        self._answered: deque[bool] = deque(maxlen=MOST_DRAFTS)  # which tokens `inner` was told of

    @property
    def complete(self) -> bool:
        return self._follower.phase is Phase.ANSWERING and self._inner.complete

    def mask(self) -> Tensor | None:
        """Raises ConstraintFailed where a token that ended the reasoning has begun the answer as well."""
        if self._follower.rest.strip():
            raise ConstraintFailed("The reasoning ended in the middle of a token.")
        if self._follower.phase is Phase.THINKING:
            return self._going_on
        mask = self._inner.mask()
        # A mark of several tokens cannot be offered beside the answer: half of it would be neither.
        if mask is None or len(self._start) != 1 or not self._follower.untouched:
            return mask
        return _united(mask, only(self._start[0]))

    def advance(self, token: int) -> None:
        before = self._follower.phase
        self._follower.advance(token)
        answered = before is not Phase.THINKING and self._follower.phase is not Phase.THINKING
        self._answered.append(answered)
        if answered:
            self._inner.advance(token)

    def rollback(self, count: int) -> None:
        self._follower.rollback(count)
        self._inner.rollback(sum(self._answered.pop() for _ in range(count)))


def only(token: int) -> Tensor:
    """The mask [words] that allows one token."""
    words = torch.zeros(token // _WORD + 1, dtype=torch.int32)
    words[-1] = _bit(token)
    return words


def all_but(tokens: Iterable[int], count: int) -> Tensor:
    """The mask [words] that allows ids 0 to `count` (exclusive) without `tokens`."""
    words = torch.full((-(-count // _WORD),), -1, dtype=torch.int32)
    for token in tokens:
        if token < count:
            words[token // _WORD] &= ~_bit(token)
    return words


def _bit(token: int) -> int:
    """The bit of `token` in its word, as a signed number."""
    bit = 1 << token % _WORD
    return bit - 2**_WORD if bit >= 2 ** (_WORD - 1) else bit


def _united(one: Tensor, other: Tensor) -> Tensor:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    united = longer.clone()
    united[: len(shorter)] |= shorter
    return united
