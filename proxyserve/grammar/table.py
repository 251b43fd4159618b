"""The vocabulary as bytes, which is all that a grammar knows of a tokenizer. Light: the gatekeeper's process has it
too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from proxyserve.config import GrammarLimits

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenTable:
    """`tokens[i]` are the bytes of id i, none for an id that no text has. Those of `special` are never part of a text;
    a grammar may only name them as tokens."""

    tokens: tuple[bytes, ...]
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenTable:
        """Takes a second for 150,000 tokens."""
        known = set(tokenizer.token_to_id.values())
        ids = range(tokenizer.vocabulary_size)
        return cls(
            tuple(tokenizer.token_bytes(token) if token in known else b"" for token in ids),
            frozenset(token for token in known if tokenizer.is_special(token)),
        )

    @classmethod
    def from_json(cls, document: dict[str, list[str] | list[int]]) -> TokenTable:
        """The inverse of `to_json`."""
        tokens = tuple(str(token).encode("latin-1") for token in document["tokens"])
        return cls(tokens, frozenset(map(int, document["special"])))

    def to_json(self) -> dict[str, list[str] | list[int]]:
        """Each byte as the character of that number."""
        return {"tokens": [token.decode("latin-1") for token in self.tokens], "special": sorted(self.special)}

    @property
    def end(self) -> int:
        """The id that stands for the end of the text in masks: the first above the vocabulary, since which real ids end
        a text differs from request to request."""
        return len(self.tokens)

    @property
    def words(self) -> int:
        """Words of 32 bits in a mask over the vocabulary and `end`."""
        return len(self.tokens) // 32 + 1

    def special_named(self, text: str) -> int | None:
        """The special token that is written `text`."""
        wanted = text.encode()
        return next((token for token in sorted(self.special) if self.tokens[token] == wanted), None)

    def tokenizer(self) -> LLTokenizer:
        """What grammars are compiled for."""
        return LLTokenizer(_Wrapper(self))  # type: ignore[arg-type]


class _Wrapper:
    """`llguidance.TokenizerWrapper`'s protocol. No text is ever encoded: grammars are compiled such that a forced text
    may come in any tokens that spell it, and the mask is then the law's own restriction."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenTable) -> None:
        self.tokens: Sequence[bytes] = [*table.tokens, b"<end>"]
        self.special_token_ids: Sequence[int] = [*sorted(table.special), table.end]
        self.eos_token_id = table.end

    def __call__(self, text: object) -> list[int]:
        raise NotImplementedError("grammars force no tokens")


def matcher(source: str, tokenizer: LLTokenizer, limits: GrammarLimits) -> LLMatcher:
    """Compile; never raises, errors are in the result. Releases the GIL."""
    return LLMatcher(
        tokenizer,
        source,
        log_level=0,
        limits=LLParserLimits(
            step_lexer_fuel=limits.step_fuel,
            step_max_items=limits.step_items,
            max_lexer_states=limits.lexer_states,
            verbose_errors=False,
        ),
    )


def id_ranges(ids: Iterable[int]) -> str:
    """`{1, 2, 3, 7}` as `1-3,7`, which is how grammars name sets of tokens."""
    parts: list[list[int]] = []
    for token in sorted(ids):
        if parts and token == parts[-1][1] + 1:
            parts[-1][1] = token
        else:
            parts.append([token, token])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
