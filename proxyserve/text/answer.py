"""How the text of an answer is to be read, and reading it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from proxyserve.text.markers import split_at_marker
from proxyserve.text.pieces import Content, Piece, joined
from proxyserve.text.reasoning import ReasoningMarks, ReasoningReader
from proxyserve.text.tools.formats import Tool, ToolFormat


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """`reasoning` None: the answer is content from its first character on; else, with `thinking`, the prompt has begun
    the reasoning already. `tool_format` None: it holds no calls. With `special_marks` a mark is a special token, and
    the text must be decoded with them; `hidden` are those that are taken out again."""

    reasoning: ReasoningMarks | None = None
    thinking: bool = False
    tool_format: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    special_marks: bool = False
    hidden: frozenset[str] = frozenset()

    @property
    def marks(self) -> frozenset[str]:
        """The texts that must reach the reader even if they are special tokens."""
        found = [self.reasoning.start, self.reasoning.end] if self.reasoning is not None else []
        if self.tool_format is not None:
            found += [self.tool_format.marks.open, self.tool_format.marks.close]
        return frozenset(found) - {""}

    def with_special_tokens(self, special: Collection[str]) -> AnswerFormat:
        """The format for a tokenizer that has these special tokens. Where a mark is one of them, answers must be
        decoded with all of them, and the others are hidden."""
        others = frozenset(special) - self.marks
        return replace(self, special_marks=True, hidden=others) if len(others) < len(special) else self

    def reader(self) -> AnswerReader:
        return AnswerReader(self)


class AnswerReader:
    """The `PieceReader` of one answer. `reasoning_tokens` counts, of the tokens that the texts came with, those of
    reasoning, its marks included."""

    def __init__(self, form: AnswerFormat) -> None:
        self.reasoning_tokens = 0
        self._hidden = _HiddenText(form.hidden) if form.hidden else None
        self._reasoning = (
            None if form.reasoning is None else ReasoningReader(form.reasoning, inside=form.thinking)
        )
        self._calls = None if form.tool_format is None else form.tool_format.reader(form.tools)

    @property
    def thinking(self) -> bool:
        """Whether reasoning goes on."""
        return self._reasoning is not None and self._reasoning.inside

    @property
    def calls(self) -> int:
        """Tool calls that have begun."""
        return 0 if self._calls is None else self._calls.calls

    @property
    def ended_calls(self) -> int:
        """Tool calls that are complete."""
        return 0 if self._calls is None else self._calls.ended

    def push(self, text: str, tokens: int = 0) -> Sequence[Piece]:
        thought = self.thinking
        pieces = self._read(text if self._hidden is None else self._hidden.push(text))
        if thought or self.thinking:
            self.reasoning_tokens += tokens
        return pieces

    def finish(self) -> Sequence[Piece]:
        pieces = list(self._read("" if self._hidden is None else self._hidden.finish()))
        if self._reasoning is not None:
            for piece in self._reasoning.finish():
                pieces += self._content(piece)
        if self._calls is not None:
            pieces += self._calls.finish()
        return joined(pieces)

    def _read(self, text: str) -> Sequence[Piece]:
        if not text:
            return []
        split = [Content(text)] if self._reasoning is None else self._reasoning.push(text)
        return joined([found for piece in split for found in self._content(piece)])

    def _content(self, piece: Piece) -> Sequence[Piece]:
        if self._calls is not None and isinstance(piece, Content):
            return self._calls.push(piece.text)
        return [piece]


class _HiddenText:
    """Takes given texts out of a text that comes in pieces."""

    def __init__(self, texts: frozenset[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""

    def push(self, text: str) -> str:
        text, shown = self._held + text, ""
        while True:
            before, marker, text = split_at_marker(text, self._texts)
            shown += before
            if marker is None:
                self._held = text
                return shown

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held
