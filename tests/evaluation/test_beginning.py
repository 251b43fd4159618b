"""What a text begins after when nothing is given before it."""

from __future__ import annotations

from typing import cast

import pytest

from proxyserve.errors import InvalidRequest
from proxyserve.evaluation.beginning import beginning
from proxyserve.text.tokenizer import Tokenizer


class Stub:
    """A tokenizer that puts `before` before every text."""

    def __init__(self, before: list[int], eos: frozenset[int]) -> None:
        self.before, self.eos_ids = before, eos

    def encode(self, text: str) -> list[int]:
        return [*self.before, *text.encode()]


@pytest.mark.parametrize(
    ("before", "eos", "expected"), [([1], frozenset({2}), (1,)), ([], frozenset({7, 3}), (3,))]
)
def test_its_own_beginning_comes_first(
    before: list[int], eos: frozenset[int], expected: tuple[int, ...]
) -> None:
    assert beginning(cast(Tokenizer, Stub(before, eos))) == expected


def test_neither() -> None:
    with pytest.raises(InvalidRequest, match="give a prompt"):
        beginning(cast(Tokenizer, Stub([], frozenset())))
