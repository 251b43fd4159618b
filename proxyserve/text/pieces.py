"""What an answer is made of, whichever route it is told on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The model calls a tool. Calls of one answer are numbered from 0; a call's pieces come together."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments, as the model wrote it: it need not be whole, or even JSON."""

    index: int
    text: str


Piece = Content | Reasoning | CallBegun | CallArguments


class PieceReader(Protocol):
    """Reads the text of one answer as it comes. However the text is cut, the pieces join to the same."""

    def push(self, text: str) -> Sequence[Piece]:
        """What is sure now."""

    def finish(self) -> Sequence[Piece]:
        """What was held back, now that nothing more comes."""


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind made one."""
    result: list[Piece] = []
    for piece in pieces:
        match result[-1] if result else None, piece:
            case Content(said), Content(text):
                result[-1] = Content(said + text)
            case Reasoning(said), Reasoning(text):
                result[-1] = Reasoning(said + text)
            case CallArguments(index, said), CallArguments(same, text) if index == same:
                result[-1] = CallArguments(index, said + text)
            case _:
                result.append(piece)
    return result
