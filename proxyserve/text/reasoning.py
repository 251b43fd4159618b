"""Telling what a model thinks from what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxyserve.text.markers import split_at_marker
from proxyserve.text.pieces import Content, Piece, Reasoning


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """What stands before and after the reasoning."""

    start: str = "<think>"
    end: str = "</think>"

    def found_in(self, template: str) -> bool:
        """Whether a chat template (its source) knows them."""
        return self.start in template or self.end in template

    def opened_by(self, prompt: str) -> bool:
        """Whether a rendered prompt ends with reasoning begun, so that the answer goes on with it."""
        return prompt.rstrip().endswith(self.start)


class ReasoningReader:
    """Splits an answer into reasoning and content. Reasoning is what stands between the marks at the very beginning;
    with `inside` the prompt has opened it already. Line breaks next to the marks belong to neither."""

    def __init__(self, marks: ReasoningMarks, *, inside: bool) -> None:
        self._marks = marks
        self._state = "inside" if inside else "before"
        self._held = ""
        self._fresh = True  # nothing but line breaks since the last mark

    @property
    def inside(self) -> bool:
        """Whether reasoning goes on."""
        return self._state == "inside"

    def push(self, text: str) -> Sequence[Piece]:
        pieces: list[Piece] = []
        if self._state == "before":
            text = self._begin(text)
        if self._state == "inside":
            text = self._reason(text, pieces)
        if self._state == "after" and self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        if self._state == "after" and text:
            pieces.append(Content(text))
        return pieces

    def finish(self) -> Sequence[Piece]:
        held, self._held = self._held, ""
        if not held:
            return []
        if self._state == "inside":
            return [Reasoning(held)]
        self._state = "after"
        return [Content(held)]

    def _begin(self, text: str) -> str:
        """Wait until it is clear whether the answer begins with the start mark. Returns what follows what is clear."""
        text, start = self._held + text, self._marks.start
        bare = text.lstrip()
        self._held = ""
        if bare.startswith(start):
            self._state = "inside"
            return bare[len(start) :]
        if start.startswith(bare):
            self._held = text
            return ""
        self._state, self._fresh = "after", False
        return text

    def _reason(self, text: str, pieces: list[Piece]) -> str:
        """Take the reasoning from the text. Returns what follows the end mark."""
        before, marker, after = split_at_marker(self._held + text, [self._marks.end])
        if self._fresh:
            before = before.lstrip("\n")
            self._fresh = not before
        said = before.rstrip("\n")
        self._held = "" if marker else before[len(said) :] + after
        if said:
            pieces.append(Reasoning(said))
        if marker is None:
            return ""
        self._state, self._fresh = "after", True
        return after
