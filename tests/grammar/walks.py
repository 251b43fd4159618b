"""Random texts under a constraint, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from proxyserve.engine.constraint import Constraint
from proxyserve.text.tokenizer import Tokenizer


def allowed(mask: Tensor) -> list[int]:
    """The ids whose bits are set."""
    return [
        32 * place + bit
        for place, word in enumerate(mask.tolist())
        if word
        for bit in range(32)
        if word >> bit & 1
    ]


def walk(
    constraint: Constraint, chance: random.Random, most: int, ends: Sequence[int] = ()
) -> list[int] | None:
    """Random tokens until the text is whole; None if it is not after `most` of them. Ends the text as soon as it may
    end, every other time."""
    taken: list[int] = []
    while not constraint.complete:
        if len(taken) == most:
            return None
        mask = constraint.mask()
        assert mask is not None
        may = allowed(mask)
        over = [token for token in ends if token in may]
        token = chance.choice(over if over and chance.random() < 0.5 else may)
        constraint.advance(token)
        taken.append(token)
    return taken


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """As a client sees it: special tokens are no text."""
    return b"".join(tokenizer.token_bytes(one) for one in tokens if not tokenizer.is_special(one)).decode()
