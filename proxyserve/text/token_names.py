"""Names of single tokens, where an answer must name them by text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

#: What stands before the number where a token is named by its id, as vLLM does.
ID_PREFIX = "token_id:"


class NamesTokens(Protocol):
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for."""


def text_name(tokenizer: NamesTokens, token: int) -> str:
    """The token's text, or `bytes:\\xNN...` where it is a part of a character, as OpenAI writes it."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def id_name(token: int) -> str:
    return f"{ID_PREFIX}{token}"


def id_of_name(name: str) -> int | None:
    """The id in `token_id:N`; None for any other name."""
    number = name.removeprefix(ID_PREFIX)
    return int(number) if number != name and number.isascii() and number.isdecimal() else None


def unique_names(tokenizer: NamesTokens, ids: Iterable[int]) -> dict[str, int]:
    """Text name -> id, for the names that only one of `ids` has."""
    found: dict[str, int] = {}
    shared: set[str] = set()
    for token in ids:
        name = text_name(tokenizer, token)
        if name in found:
            shared.add(name)
        found[name] = token
    return {name: token for name, token in found.items() if name not in shared}
