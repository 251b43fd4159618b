"""Which law answers, what is asked, and what a thing that can answer looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from proxyserve.fusion.fusion import Fusion


@dataclass(frozen=True, slots=True)
class Pair:
    """Folders of an expert."""

    tuned: Path
    untuned: Path


@dataclass(frozen=True, slots=True)
class System:
    """What a server holds, a base and named pairs, and the fusion that every request to it asks for. The default fusion
    is the base alone."""

    base: Path
    experts: Mapping[str, Pair] = field(default_factory=dict)
    fusion: Fusion = field(default_factory=Fusion)


class Question(NamedTuple):
    """A prompt, the same for every lane, and how many tokens the answer may have."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The text up to the stop, without special tokens; None where the model did not stop in time. `tokens` counts the
    stop as well. `mean_weights`, where weights were solved, maps each expert to the mean of its weight over them."""

    text: str | None
    tokens: int = 0
    mean_weights: Mapping[str, float] = field(default_factory=dict)


class Generator(Protocol):
    """Answers questions greedily under a system."""

    def supports(self, fusion: Fusion) -> bool:
        """Whether it can answer under this fusion."""
        ...

    def generate(
        self,
        questions: Sequence[Question],
        system: System,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """An answer per question. `progress` is told how many are done."""
        ...
