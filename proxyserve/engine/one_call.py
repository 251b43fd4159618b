"""Ending an answer with its first tool call."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from proxyserve.engine.constraint import Constraint
from proxyserve.text.answer import AnswerFormat
from proxyserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class OneCall:
    """`Constrains`: every token may come, and the answer is complete with its first call."""

    form: AnswerFormat
    tokenizer: Tokenizer

    def start(self) -> Constraint:
        return _OneCall(self)


class _OneCall:
    """The reader cannot go back, so it may have read further than the text goes. Where the text then goes on as it read
    it, nothing is to be done; where another token comes, the text is read again."""

    def __init__(self, asked: OneCall) -> None:
        self._asked = asked
        self._length = 0  # of the text
        self._tokens: list[int] = []  # what was read: the text, and perhaps more
        self._whole_at: int | None = None  # with so many tokens the first call was complete
        self._begin()

    @property
    def complete(self) -> bool:
        return self._whole_at is not None and self._length >= self._whole_at

    def mask(self) -> Tensor | None:
        return None

    def advance(self, token: int) -> None:
        place = self._length
        self._length += 1
        if self._tokens[place : self._length] == [token]:
            return
        if place < len(self._tokens):
            again, whole_at = self._tokens[:place], self._whole_at
            self._begin()
            self._read(again)
            self._whole_at = whole_at if whole_at is not None and whole_at <= place else None
        self._read([token])

    def rollback(self, count: int) -> None:
        self._length -= count

    def _begin(self) -> None:
        self._tokens = []
        self._reader = self._asked.form.reader()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _read(self, tokens: Sequence[int]) -> None:
        self._tokens += tokens
        self._reader.push(self._decoder.decode(b"".join(map(self._asked.tokenizer.token_bytes, tokens))))
        if self._whole_at is None and self._reader.ended_calls:
            self._whole_at = len(self._tokens)
