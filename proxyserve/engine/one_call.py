"""Ending an answer with its first tool call."""

from __future__ import annotations

import codecs
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
    def __init__(self, asked: OneCall) -> None:
        self._reader = asked.form.reader()
        self._tokenizer = asked.tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def complete(self) -> bool:
        return self._reader.ended_calls > 0

    def mask(self) -> Tensor | None:
        return None

    def advance(self, token: int) -> None:
        self._reader.push(self._decoder.decode(self._tokenizer.token_bytes(token)))
