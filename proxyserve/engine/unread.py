"""The events of a stream that nobody has read yet, kept within bounds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from proxyserve.errors import ProxyserveError
from proxyserve.types import OutputEvent, TokenExplanation, TokenLogprob

#: Above so many unread events, further ones are joined to their choice's last. Readers that keep up never see that.
_JOINED_ABOVE = 64


class ReaderTooSlow(ProxyserveError):
    """Too much of the answer was unread, and its generation was given up."""

    def __init__(self) -> None:
        super().__init__(
            "The answer was read so slowly that the server gave it up; read faster or ask for less."
        )


class Unread:
    """A queue with one reader, for one event loop. Once more than `most_tokens` tokens are unread, it is `full` for
    good: nothing is kept any more, and reading raises ReaderTooSlow."""

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._pieces: deque[list[OutputEvent]] = deque()  # each is read as one event
        self._last: dict[tuple[str, int], list[OutputEvent]] = {}  # the last piece of each choice
        self._tokens = 0
        self._news = asyncio.Event()
        self.full = False

    def __len__(self) -> int:
        """Events that reading would give."""
        return len(self._pieces)

    def put(self, event: OutputEvent) -> bool:
        """False, once, if this was too much: then whoever generates should stop."""
        if self.full:
            return True
        self._tokens += len(event.token_ids)
        self._news.set()
        if self._tokens > self._most:
            self.full = True
            self._pieces.clear()
            self._last.clear()
            return False
        choice = (event.request_id, event.index)
        if len(self._pieces) >= _JOINED_ABOVE and choice in self._last:
            self._last[choice].append(event)
        else:
            self._last[choice] = [event]
            self._pieces.append(self._last[choice])
        return True

    async def get(self) -> OutputEvent:
        """The next event, which may be several joined."""
        while not self._pieces:
            if self.full:
                raise ReaderTooSlow
            self._news.clear()
            await self._news.wait()
        piece = self._pieces.popleft()
        choice = (piece[0].request_id, piece[0].index)
        if self._last[choice] is piece:
            del self._last[choice]
        self._tokens -= sum(len(event.token_ids) for event in piece)
        return joined(piece)


def joined(events: Sequence[OutputEvent]) -> OutputEvent:
    """Successive events of one choice as one."""
    if len(events) == 1:
        return events[0]
    logprobs: list[TokenLogprob] = []
    explanations: list[TokenExplanation] = []
    for event in events:
        logprobs.extend(event.logprobs or ())
        explanations.extend(event.explanations or ())
    scored = next((event for event in events if event.prompt_logprobs is not None), events[0])
    return replace(
        events[-1],  # what only the last event has
        token_ids=tuple(token for event in events for token in event.token_ids),
        text="".join(event.text for event in events),
        logprobs=tuple(logprobs) if any(event.logprobs is not None for event in events) else None,
        explanations=tuple(explanations) if any(event.explanations is not None for event in events) else None,
        prompt_logprobs=scored.prompt_logprobs,
        prompt_explanations=scored.prompt_explanations,
    )
