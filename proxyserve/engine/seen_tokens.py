"""Which tokens a text has had so far, and how often each was generated: what penalties go by."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from proxyserve.models.vocabulary import SharedVocabulary


class SeenTokens:
    """Grows by one token at a time, and shrinks again, at a cost that does not depend on how long the text is.

    `ids` int64 [n], each once, and `counts` float32 [n], how often each was generated (0: it is in the prompt only),
    are views of what `add` and `take_back` change: read them before the next one.
    """

    def __init__(self, prompt: Iterable[int], vocabulary: SharedVocabulary) -> None:
        known = [token for token in dict.fromkeys(prompt) if token in vocabulary]
        self._place = {token: place for place, token in enumerate(known)}
        self._of_prompt = len(known)
        self._ids = np.array(known, dtype=np.int64)
        self._counts = np.zeros(len(known), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self)]

    def add(self, token: int) -> None:
        """`token`, which is in the vocabulary, was generated."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            more = max(16, place)
            self._ids = np.concatenate([self._ids, np.zeros(more, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    def take_back(self, token: int) -> None:
        """Undo the last `add`, which was of `token`."""
        place = self._place[token]
        self._counts[place] -= 1
        if place >= self._of_prompt and not self._counts[place]:
            # It came with its first `add`, so it is the last of all; the place is as new for the next token.
            self._place.popitem()
