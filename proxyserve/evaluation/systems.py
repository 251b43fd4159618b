"""Which law answers, and what a thing that can answer looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Pair:
    """Folders of an expert."""

    tuned: Path
    untuned: Path


@dataclass(frozen=True, slots=True)
class System:
    """`base` alone, or `base` plus weighted deltas. The keys of `experts` name the pairs."""

    base: Path
    experts: Mapping[str, tuple[Pair, float]] = field(default_factory=dict)


class Generator(Protocol):
    """Answers prompts greedily under a system."""

    def generate(self, prompts: Sequence[str], system: System, max_tokens: int) -> list[str | None]:
        """The text of each answer up to its stop, without special tokens; None where the model did not stop within
        `max_tokens`."""
        ...
