"""Log-probabilities in the shapes of OpenAI's two routes, and in vLLM's where OpenAI has none."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from proxyserve.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from proxyserve.api.schemas.completions import CompletionLogprobs
from proxyserve.api.schemas.responses import PromptLogprob, PromptLogprobs
from proxyserve.text.token_names import id_name, text_name
from proxyserve.types import TokenLogprob

if TYPE_CHECKING:
    from proxyserve.api.echo import Echo
    from proxyserve.text.tokenizer import Tokenizer

#: What OpenAI writes for minus infinity, which JSON does not have.
IMPOSSIBLE = -9999.0


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    """`content` has an entry per generated token, also for those that did not become text (a stop token)."""
    return ChatLogprobs(content=token_logprobs(entries, tokenizer), refusal=None)


def token_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> list[ChatTokenLogprob]:
    return [
        ChatTokenLogprob(
            **dict(_named(entry.token_id, entry.logprob, tokenizer)),
            top_logprobs=[_named(token, value, tokenizer) for token, value in entry.top],
        )
        for entry in entries
    ]


class TokenNames:
    """Names of tokens in lists that name them by text, or `by_id`."""

    def __init__(self, tokenizer: Tokenizer, *, by_id: bool = False) -> None:
        self._tokenizer = tokenizer
        self._by_id = by_id
        self._known: dict[int, str] = {}

    def name(self, token: int) -> str:
        found = self._known.get(token)  # prompts are long, and their tokens come again and again
        if found is None:
            found = id_name(token) if self._by_id else text_name(self._tokenizer, token)
            self._known[token] = found
        return found

    def top(self, entry: TokenLogprob, count: int) -> dict[str, float]:
        """The `count` most likely tokens and the one that stands there. Different tokens may have the same text; all
        but the likeliest of them are then named by id, so that none is lost."""
        named: dict[str, float] = {}
        for token, value in dict([*entry.top[:count], (entry.token_id, entry.logprob)]).items():
            name = self.name(token)
            named[id_name(token) if name in named else name] = finite(value)
        return named


class CompletionLogprobsBuilder:
    """Makes the parallel lists of one choice, piece by piece: `text_offset` goes on from call to call. Each position
    has its `top` likeliest tokens. With `skip_special` the choice's text leaves special tokens out."""

    def __init__(
        self, tokenizer: Tokenizer, names: TokenNames, top: int, *, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._names = names
        self._top = top
        self._skip_special = skip_special
        self._characters = _Characters()
        self._offset = 0

    def begin(self, echo: Echo, entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """The prompt's part, which comes before all else: an entry per id, null where it has none."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, entry, offset in zip(echo.token_ids, entries, echo.offsets, strict=True):
            self._append(result, token, entry, offset)
        self._offset = len(echo.text)
        return result

    def add(
        self, entries: Iterable[TokenLogprob], after: CompletionLogprobs | None = None
    ) -> CompletionLogprobs:
        """The next generated tokens' part; with `after`, at the end of that."""
        result = after or CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            raw = self._tokenizer.token_bytes(entry.token_id)
            if self._skip_special and self._tokenizer.is_special(entry.token_id):
                raw = b""
            self._offset += len(self._characters.left_by(raw))
            self._append(result, entry.token_id, entry, self._offset)
            self._offset += len(self._characters.of(raw))
        return result

    def _append(
        self, columns: CompletionLogprobs, token: int, entry: TokenLogprob | None, offset: int
    ) -> None:
        columns.tokens.append(self._names.name(token))
        columns.token_logprobs.append(None if entry is None else finite(entry.logprob))
        columns.top_logprobs.append(None if entry is None else self._names.top(entry, self._top))
        columns.text_offset.append(offset)


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where each token begins in `text`, which `ids` are the tokens of, in characters. A special token counts only
    where the text has it (one that the tokenizer added by itself is not there), and a token that begins inside a
    character begins where the character does. Where a tokenizer rewrote the text (Unicode normalisation) offsets may be
    off by as much as that changed lengths."""
    characters = _Characters()
    offsets: list[int] = []
    position = 0
    for token in ids:
        raw = tokenizer.token_bytes(token)
        position += len(characters.left_by(raw))
        offsets.append(min(position, len(text)))
        piece = characters.of(raw)
        if text.startswith(piece, position):
            position += len(piece)
        elif tokenizer.is_special(token):
            pass
        elif piece.startswith(" ") and text.startswith(piece[1:], position):
            position += len(piece) - 1  # SentencePiece begins every text with a space
        else:
            position += len(piece)
    return offsets


class _Characters:
    """Text of the bytes of tokens that come one by one."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def left_by(self, raw: bytes) -> str:
        """What is left of the characters before `raw`, which comes next: U+FFFD if one was begun and does not go on."""
        goes_on = not raw or 0x80 <= raw[0] < 0xC0
        return "" if goes_on else self._decoder.decode(b"", final=True)

    def of(self, raw: bytes) -> str:
        """The characters that end with these bytes."""
        return self._decoder.decode(raw)


def prompt_logprobs(entries: Iterable[TokenLogprob | None], tokenizer: Tokenizer, top: int) -> PromptLogprobs:
    """As vLLM gives them: the token that stands there, then the `top` likeliest ones."""
    return [None if entry is None else _ranked(entry, tokenizer, top) for entry in entries]


def listed_logprobs(entries: Iterable[TokenLogprob | None]) -> list[dict[int, float] | None]:
    """The log-probabilities of `logprob_token_ids`, in their order."""
    return [
        None if entry is None else {token: finite(value) for token, value in entry.listed}
        for entry in entries
    ]


def _ranked(entry: TokenLogprob, tokenizer: Tokenizer, top: int) -> dict[int, PromptLogprob]:
    ranks: dict[int, int | None] = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
    ranks[entry.token_id] = entry.rank
    values = dict([(entry.token_id, entry.logprob), *entry.top[:top]])
    return {
        token: PromptLogprob(
            logprob=finite(value),
            rank=ranks[token],
            decoded_token=tokenizer.token_bytes(token).decode(errors="replace"),
        )
        for token, value in values.items()
    }


def _named(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token)
    return TopLogprob(token=raw.decode(errors="replace"), logprob=finite(logprob), bytes=list(raw))


def finite(logprob: float) -> float:
    """As JSON can have it."""
    return logprob if math.isfinite(logprob) else IMPOSSIBLE
