"""Which tokens a request's own fields leave possible: `allowed_token_ids`, `bad_words`, `min_tokens`.

A mask is uint32 [words]: bit `i % 32` of word `i // 32` is 1 where id i may come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.types import SamplingParams

Words = npt.NDArray[np.uint32]

#: What the constraints of a submission are called in messages: fields of several routes end in one.
GRAMMAR = "the grammar (response_format, structured_outputs or tools)"


def words_for(size: int) -> int:
    """Words of a mask for ids below `size`."""
    return -(-size // 32)


def mask_of(ids: Iterable[int], size: int) -> Words:
    """The mask that allows `ids`, all below `size`, and nothing else."""
    bits = np.zeros(words_for(size) * 32, dtype=bool)
    bits[np.fromiter(ids, dtype=np.int64)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def whole(vocabulary: SharedVocabulary) -> Words:
    """The mask that allows every id of the vocabulary."""
    bits = np.arange(words_for(vocabulary.size) * 32) < vocabulary.size
    return np.packbits(bits, bitorder="little").view(np.uint32) & ~mask_of(vocabulary.holes, vocabulary.size)


def forbid(mask: Words, ids: Iterable[int]) -> None:
    """Take `ids` out of `mask`, in place."""
    for token in ids:
        mask[token // 32] &= ~np.uint32(1 << token % 32)


def narrow(mask: Words, allowed: Tensor) -> None:
    """Leave in `mask`, in place, what `allowed` has too: int32 [words, any number], on the host."""
    own: Words = allowed.numpy().view(np.uint32)[: len(mask)]
    mask[: len(own)] &= own
    mask[len(own) :] = 0


@dataclass(frozen=True, slots=True, eq=False)
class TokenRules:
    """Shared by the choices of a submission; nothing in it changes.

    `known` are the ids of the vocabulary. `usual` and, before `min_tokens` tokens, `early` are what of it may come
    whatever was generated; `limits` says whether `usual` leaves out any id below the vocabulary's size. `sequences` are
    the bad words of several ids, by the last id of their beginning: (beginning, the id that must not follow it). `ends`
    are the ids that would end the text.
    """

    known: Words
    size: int
    allowed: tuple[int, ...] | None
    single: frozenset[int]
    sequences: Mapping[int, Sequence[tuple[tuple[int, ...], int]]]
    ends: frozenset[int]
    min_tokens: int
    usual: Words
    early: Words
    limits: bool

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: SharedVocabulary, stop_ids: frozenset[int]) -> TokenRules:
        """`stop_ids` end the text unless the request ignores them. All ids in `params` but stop ids are in the
        vocabulary."""
        single = frozenset(word[0] for word in params.bad_words if len(word) == 1)
        sequences: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for word in params.bad_words:
            if len(word) > 1:
                sequences.setdefault(word[-2], []).append((word[:-1], word[-1]))
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else stop_ids)
        ends = frozenset(token for token in ends if token in vocabulary)
        known = whole(vocabulary)
        usual = known.copy()
        if params.allowed_token_ids is not None:
            usual &= mask_of(params.allowed_token_ids, vocabulary.size)
        forbid(usual, single)
        early = usual.copy()
        forbid(early, ends)
        return cls(
            known=known,
            size=vocabulary.size,
            allowed=params.allowed_token_ids,
            single=single,
            sequences=sequences,
            ends=ends,
            min_tokens=params.min_tokens,
            usual=usual,
            early=early,
            limits=params.allowed_token_ids is not None or bool(single) or bool(vocabulary.holes),
        )

    def is_early(self, written: int) -> bool:
        """Whether a text of so many tokens is too short to end."""
        return written < self.min_tokens

    def endings(self, output: Sequence[int]) -> list[int]:
        """Ids that would complete a bad word of several ids after `output`."""
        if not self.sequences or not output:
            return []
        return [
            last
            for beginning, last in self.sequences.get(output[-1], ())
            if tuple(output[-len(beginning) :]) == beginning
        ]

    def say_something(self, output: Sequence[int]) -> bool:
        """Whether any id of the vocabulary's range may not come after `output`."""
        return self.limits or (self.is_early(len(output)) and bool(self.ends)) or bool(self.endings(output))

    def write(self, mask: Words, output: Sequence[int], constrained: Words | None) -> None:
        """Write what may come after `output` to `mask` [at least as many words as the vocabulary has]; `constrained`
        [alike] is what constraints allow, None without any."""
        own = self.early if self.is_early(len(output)) else self.usual
        mask[: len(own)] = own
        mask[len(own) :] = 0
        if constrained is not None:
            mask &= constrained
        forbid(mask, self.endings(output))

    def is_whole(self, output: Sequence[int], constrained: Words) -> bool:
        """Whether constraints allow nothing but an end of the text, which comes too early: it is whole then, however
        short it is."""
        left = constrained[: len(self.known)] & self.known
        if not self.is_early(len(output)) or not left.any():
            return False
        forbid(left, self.ends)
        return not left.any()

    def fields(self, written: int, *, constrained: bool = False) -> list[str]:
        """Those that say which tokens may come after `written` tokens; `constrained`: there are constraints."""
        says = {
            GRAMMAR: constrained,
            "allowed_token_ids": self.allowed is not None,
            "bad_words": bool(self.single or self.sequences),
            "min_tokens": self.is_early(written),
        }
        return [name for name, said in says.items() if said]

    def conflict(self, output: Sequence[int], constrained: Words | None = None) -> list[str]:
        """The fields that together leave no token after `output`, none of which could be left out; empty if some token
        may come."""
        parts = {
            GRAMMAR: self.known if constrained is None else constrained[: len(self.known)],
            "allowed_token_ids": mask_of(self.allowed or (), self.size),
            "bad_words": ~mask_of((*self.single, *self.endings(output)), self.size),
            "min_tokens": ~mask_of(self.ends, self.size),
        }

        def leave(names: Iterable[str]) -> bool:
            left = self.known.copy()
            for name in names:
                left &= parts[name]
            return bool(left.any())

        needed = self.fields(len(output), constrained=constrained is not None)
        if leave(needed):
            return []
        for name in tuple(needed):
            others = [other for other in needed if other != name]
            if not leave(others):
                needed = others
        return needed


def conflict_message(fields: Sequence[str]) -> str:
    """What to tell of fields that leave no token."""
    if len(fields) == 1:
        return f"No token may come next: {fields[0]} leaves none that the request's models share."
    names = f"{', '.join(fields[:-1])} and {fields[-1]}"
    return f"No token may come next: {names} exclude each other; change one of them."
