"""Drafts without a model: what came after the same words the last time.

Answers repeat their prompts (extraction, edits, code) and themselves. The ids that end the text are looked up in the
text before; what followed them there is drafted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_LONGEST = 4
#: Earlier places of the last two ids that are looked at for the longest match.
_PLACES = 16
#: Ids taken into the index in one call. A long prompt comes in over several steps, so that none waits for it.
_PORTION = 2048


class Lookup:
    """The index of one request's text: each id goes in once, at about 100 bytes."""

    __slots__ = ("_earlier", "_indexed", "_latest", "_output", "_text")

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text = array("i", prompt)
        self._output = 0
        #: The place after each pair of neighbours, the latest one, and the one before it by place (-1: none).
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier = array("i", [-1, -1])
        self._indexed = 2

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """At most `most` ids: those that followed the longest run of 4, 3 or 2 ids that the text ends with and that was
        there before; of runs as long, the last. `output` follows the prompt and may only have grown since the call
        before."""
        text = self._text
        text.extend(output[self._output :])
        self._output = len(output)
        self._index()
        start = self._after_longest()
        return [] if start is None else text[start : start + most].tolist()

    def _index(self) -> None:
        """The pairs that end before the last id: something follows them."""
        text, latest, earlier = self._text, self._latest, self._earlier
        stop = min(len(text), self._indexed + _PORTION)
        for place in range(self._indexed, stop):
            pair = text[place - 2], text[place - 1]
            earlier.append(latest.get(pair, -1))
            latest[pair] = place
        self._indexed = max(self._indexed, stop)

    def _after_longest(self) -> int | None:
        text = self._text
        if len(text) < 3:
            return None
        place = self._latest.get((text[-2], text[-1]), -1)
        found, longest = None, 1
        for _ in range(_PLACES):
            if place < 0:
                break
            size = 2
            while size < min(_LONGEST, place) and text[place - size - 1] == text[-size - 1]:
                size += 1
            if size > longest:
                found, longest = place, size
            if size == _LONGEST:
                break
            place = self._earlier[place]
        return found
