"""Compiling a grammar on trial: does it compile, and do its first steps keep to the limits?"""

from __future__ import annotations

import random
import re

from llguidance import LLMatcher, LLTokenizer

from proxyserve.config import GrammarLimits
from proxyserve.grammar.grammar import GrammarKind
from proxyserve.grammar.source import source_of
from proxyserve.grammar.table import TokenTable, matcher

#: Random texts that are begun, and tokens of each.
_WALKS, _STEPS = 2, 24

_LONGEST_MESSAGE = 400
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_WHERE = re.compile(r"^(?:at )?\d+\(\d+\): ")


class Refused(Exception):
    """The message says what is wrong with the grammar, in words that go on from "the field"."""


class TookTooLong(Refused):
    """There was no answer in time."""


def try_out(
    kind: GrammarKind, text: str, table: TokenTable, tokenizer: LLTokenizer, limits: GrammarLimits
) -> str:
    """What llguidance is to compile. Raises Refused."""
    try:
        source = source_of(kind, text, table)
    except (ValueError, RecursionError) as error:
        raise Refused(_shown(str(error))) from error
    first = matcher(source, tokenizer, limits)
    if first.is_error():
        raise Refused(_explained(first.get_error(), kind))
    for seed in range(_WALKS):
        _walk(first.deep_copy(), random.Random(seed), table)
    return source


def _walk(state: LLMatcher, chance: random.Random, table: TokenTable) -> None:
    """Some way into a random text, to see whether steps cost too much."""
    for step in range(_STEPS):
        mask = state.compute_bitmask()
        if state.is_error():
            if not step and "NoExtension" in state.get_error():
                raise Refused("allows no text at all")
            if "NoExtension" in state.get_error():
                return  # this way led nowhere; others may not
            raise Refused(f"takes too much work per token: {_shown(state.get_error())}")
        token = _any_bit(mask, chance)
        if token == table.end:
            return
        if not state.consume_token(token):
            raise Refused(f"takes too much work per token: {_shown(state.get_error())}")
        if state.is_stopped():
            return


def _any_bit(mask: bytes, chance: random.Random) -> int:
    """A set bit of a mask that is not empty; each byte that has one is about as likely."""
    start = chance.randrange(len(mask))
    place = next(index for index in (*range(start, len(mask)), *range(start)) if mask[index])
    return place * 8 + chance.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def _explained(error: str, kind: GrammarKind) -> str:
    if found := _UNIMPLEMENTED.search(error):
        names = found.group(1).replace('"', "'")
        return f"uses what cannot be enforced here: {names}"
    if "coerce_one_of" in error:
        return (
            "uses 'oneOf' with alternatives that do not evidently exclude each other; use 'anyOf', or give each a "
            "required property with a 'const' of its own"
        )
    if "Default retriever" in error:
        return "refers to something outside of itself ('$ref', '$id' or '$schema'): nothing is fetched"
    if kind is GrammarKind.REGEX:
        error = _WHERE.sub("", error).partition("\n   1 | ")[0]
    return f"cannot be used: {_shown(error)}"


def _shown(message: str) -> str:
    message = message.removesuffix("\n<non-verbose/>").strip()
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
