"""Log-probabilities in the shapes of OpenAI's two routes."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from proxyserve.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from proxyserve.api.schemas.completions import CompletionLogprobs
from proxyserve.text.token_names import id_name, text_name
from proxyserve.types import TokenLogprob

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer

#: What OpenAI writes for minus infinity, which JSON does not have.
IMPOSSIBLE = -9999.0


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    """`content` has an entry per generated token, also for those that did not become text (a stop token)."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **dict(_named(entry.token_id, entry.logprob, tokenizer)),
                top_logprobs=[_named(token, value, tokenizer) for token, value in entry.top],
            )
            for entry in entries
        ],
        refusal=None,
    )


class CompletionLogprobsBuilder:
    """Makes the parallel lists of one choice, piece by piece: `text_offset` goes on from call to call. With `by_id`
    tokens are named by id and not by text."""

    def __init__(self, tokenizer: Tokenizer, *, by_id: bool = False) -> None:
        self._tokenizer = tokenizer
        self._by_id = by_id
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def add(self, entries: Iterable[TokenLogprob]) -> CompletionLogprobs:
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            result.tokens.append(self._name(entry.token_id))
            result.token_logprobs.append(finite(entry.logprob))
            result.top_logprobs.append(self._top(entry))
            result.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(entry.token_id)))
        return result

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one. Different tokens may have the same text; all but the likeliest of
        them are then named by id, so that none is lost."""
        named: dict[str, float] = {}
        for token, value in dict([*entry.top, (entry.token_id, entry.logprob)]).items():
            name = self._name(token)
            named[id_name(token) if name in named else name] = finite(value)
        return named

    def _name(self, token: int) -> str:
        return id_name(token) if self._by_id else text_name(self._tokenizer, token)


def _named(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token)
    return TopLogprob(token=raw.decode(errors="replace"), logprob=finite(logprob), bytes=list(raw))


def finite(logprob: float) -> float:
    """As JSON can have it."""
    return logprob if math.isfinite(logprob) else IMPOSSIBLE
