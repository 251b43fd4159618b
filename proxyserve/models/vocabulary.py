"""Which token ids two models share.

Sizes say nothing: models of one family pad their heads to different widths, and equal sizes can hide a permutation.
What counts is the tokenizers' map from token to id. Ids above a tokenizer's real vocabulary are padding whose logits
were never trained; they are outside every shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxyserve.errors import LoadError

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """Ids `0 .. size-1` except `holes` mean the same token everywhere. `holes` are ids inside the range that not
    every model has (unused slots, mostly none)."""

    size: int
    holes: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.size < 1 or any(not 0 <= hole < self.size for hole in self.holes):
            raise ValueError("holes must lie inside a vocabulary that is not empty")

    @classmethod
    def of(cls, token_to_id: Mapping[str, int], width: int) -> SharedVocabulary:
        """The real ids of one model whose head has `width` columns."""
        ids = {token_id for token_id in token_to_id.values() if token_id < width}
        return cls._from_ids(ids)

    def intersect(self, other: SharedVocabulary) -> SharedVocabulary:
        """Ids that are in both. Raises LoadError if none is."""
        if self == other:
            return self
        size = min(self.size, other.size)
        holes = {hole for hole in self.holes | other.holes if hole < size}
        while size - 1 in holes:  # the largest id is one that both have
            size -= 1
            holes.discard(size)
        if size == 0:
            raise LoadError("the models have no token id in common")
        return SharedVocabulary(size, frozenset(holes))

    def ids(self) -> set[int]:
        return set(range(self.size)) - self.holes

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id < self.size and token_id not in self.holes

    @classmethod
    def _from_ids(cls, ids: set[int]) -> SharedVocabulary:
        size = max(ids) + 1
        return cls(size, frozenset(range(size)) - ids)


def require_compatible(
    reference: Mapping[str, int], reference_name: str, other: Mapping[str, int], other_name: str
) -> None:
    """Raise LoadError, naming the first tokens that differ, unless the two maps agree wherever they overlap.

    Extra tokens on one side are fine (they are left out of the shared ids); the same token under two ids, or two
    tokens under one id, are not: the models would talk about different things."""
    # The usual cases, and much faster than looking for differences; a dictionary compares all its items even to itself.
    if reference is other or reference == other:
        return
    moved = [
        f"token {token!r} is {token_id} in {reference_name} and {other[token]} in {other_name}"
        for token, token_id in sorted(reference.items(), key=lambda item: item[1])
        if token in other and other[token] != token_id
    ]
    token_of = {token_id: token for token, token_id in reference.items()}
    clashing = [
        f"id {token_id} is {token_of[token_id]!r} in {reference_name} and {token!r} in {other_name}"
        for token, token_id in sorted(other.items(), key=lambda item: item[1])
        if token_id in token_of and token_of[token_id] != token
    ]
    differences = moved + clashing
    if differences:
        shown = "; ".join(differences[:_EXAMPLES])
        more = f" (and {len(differences) - _EXAMPLES} more)" if len(differences) > _EXAMPLES else ""
        raise LoadError(
            f"{other_name} and {reference_name} have different tokenizers: {shown}{more}. "
            "Fusion adds logits id by id, so expert and base must come from one tokenizer family."
        )
