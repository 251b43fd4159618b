"""From a growing list of ids to text that is safe to send.

Two things can make the newest text not final: a token may end inside a multi-byte character, and the text may end
with the beginning of a stop string. Both are held back until the next tokens decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxyserve.text.markers import overlap
from proxyserve.text.tokenizer import Tokenizer

_REPLACEMENT = "�"

#: Ids of the prompt that are looked at. One would do, were none a special token or a part of a character.
_TAIL = 5


class Detokenizer:
    """Incremental detokenization of one choice. `push` returns newly final text, `finish` the rest. Text of special
    tokens is left out with `skip_special_tokens`, and otherwise text like any other: stop strings match it too.

    A window of ids is decoded together with the ids before it and the common part is cut off, because the text of a
    token can depend on its predecessor (leading spaces). The window moves on whenever it decodes to whole characters.
    It begins with the end of the prompt: tokenizers in SentencePiece's manner strip the space that a text begins with,
    and the first word of an answer is not the beginning of a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._skip = skip_special_tokens
        self._ids = list(prompt[-_TAIL:])
        self._window_start = 0  # ids before are context no longer needed
        self._read = len(self._ids)  # ids whose text has been produced
        self._held = ""  # produced text that may be the beginning of a stop string
        self.stopped_by: str | None = None
        if self._decode(self._read).endswith(_REPLACEMENT):
            # The answer may complete the prompt's last character, which would then be in neither text.
            self._ids, self._read = [], 0

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add one id. Returns text that is now final; after a stop string was met (`stopped_by` is set) that is the
        text before it, and nothing more ever follows. Unless the text `may_stop`, a stop string that is complete now
        is text like any other."""
        self._ids.append(token_id)
        before, after = self._decode(self._read), self._decode(len(self._ids))
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        self._window_start, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :], may_stop)

    def finish(self) -> str:
        """The text still held back, now that nothing more will come. An unfinished character shows as U+FFFD."""
        if self.stopped_by is not None:
            return ""
        before, after = self._decode(self._read), self._decode(len(self._ids))
        text = self._release(after[len(before) :], may_stop=True)
        held, self._held = self._held, ""
        return text + held if self.stopped_by is None else text

    def _decode(self, end: int) -> str:
        """The text of the window up to the id at `end`."""
        return self._tokenizer.decode(self._ids[self._window_start : end], skip_special_tokens=self._skip)

    def _release(self, new: str, may_stop: bool) -> str:
        """Split what is final from what may still become a stop string."""
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found and may_stop:
            position, self.stopped_by = min(found)
            self._held = ""
            return text[:position]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
