"""The slow twin of masks: one token at a time, spelt out byte by byte."""

from __future__ import annotations

from llguidance import LLMatcher

from proxyserve.grammar.grammar import Grammar
from proxyserve.grammar.source import source_of
from proxyserve.grammar.table import TokenTable


class SpellingTwin:
    """Follows a text under a grammar with a matcher that knows single bytes and the special tokens only."""

    def __init__(self, grammar: Grammar, table: TokenTable, ends: frozenset[int]) -> None:
        special = sorted(table.special)
        bytes_and_special = TokenTable(
            (*(bytes([byte]) for byte in range(256)), *(table.tokens[token] for token in special)),
            frozenset(range(256, 256 + len(special))),
        )
        source = source_of(grammar.kind, grammar.text, bytes_and_special)
        self._matcher = LLMatcher(bytes_and_special.tokenizer(), source, log_level=0)
        self._spelt = [
            [256 + special.index(token)] if token in table.special else list(data)
            for token, data in enumerate(table.tokens)
        ]
        self._ends = ends

    def allowed(self) -> set[int]:
        """Ids that can be spelt from here, and the ends where the text is whole."""
        found = {
            token
            for token, spelt in enumerate(self._spelt)
            if spelt and self._matcher.validate_tokens(spelt) == len(spelt)
        }
        return found - self._ends | (self._ends if self._matcher.is_accepting() else set())

    def advance(self, token: int) -> None:
        assert self._matcher.consume_tokens(self._spelt[token])

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped()
