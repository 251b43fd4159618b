"""Which texts a request allows."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from proxyserve.config import GrammarLimits
from proxyserve.errors import InvalidRequest
from proxyserve.grammar.checks import check_count, check_text, schema_text

_GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class GrammarKind(enum.StrEnum):
    """How the text of a `Grammar` is read."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"
    TAGS = "tags"


@dataclass(frozen=True, slots=True)
class Tag:
    """`begin`, then JSON of `schema`, then `end`. Up to eight characters of white space may come between them. A
    `begin` or `end` that is the whole of a special token means that token."""

    begin: str
    schema: Any
    end: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """A form that a whole text must have. `text` is the schema or the expression itself, or JSON. `param` is the field
    of the request that it came from, for errors. Made by the functions below, which refuse what is too large."""

    kind: GrammarKind
    text: str
    param: str = field(compare=False)

    @property
    def digest(self) -> str:
        """Equal for grammars that allow the same for the same reason."""
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode()).hexdigest()


def json_object(param: str) -> Grammar:
    """Any JSON object."""
    return Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}', param)


def json_schema(schema: Any, limits: GrammarLimits, param: str) -> Grammar:
    """JSON that is valid under `schema`, with little white space between its parts."""
    return Grammar(GrammarKind.JSON_SCHEMA, schema_text(schema, limits, param), param)


def regex(expression: str, limits: GrammarLimits, param: str) -> Grammar:
    """Text that matches the expression as a whole. Syntax of Rust's `regex`: no look-around, no back-references."""
    check_text(expression, limits.max_regex_length, param)
    return Grammar(GrammarKind.REGEX, expression, param)


def choice(options: Sequence[str], limits: GrammarLimits, param: str) -> Grammar:
    """One of `options`."""
    check_count(options, limits.max_choices, param, "choices")
    for number, option in enumerate(options):
        check_text(option, limits.max_regex_length, f"{param}[{number}]")
    text = json.dumps(list(options))
    check_text(text, limits.max_length, param)
    return Grammar(GrammarKind.CHOICE, text, param)


def lark(text: str, limits: GrammarLimits, param: str) -> Grammar:
    """A context-free grammar in llguidance's dialect of Lark, beginning at rule `start`."""
    check_text(text, limits.max_length, param)
    if _GBNF_RULE.search(text):
        raise InvalidRequest(
            f"'{param}' looks like GBNF; write it in Lark: 'rule: ...' for 'rule ::= ...', and 'start' for 'root'.",
            param=param,
        )
    return Grammar(GrammarKind.LARK, text, param)


def tags(
    structures: Sequence[Tag],
    limits: GrammarLimits,
    param: str,
    *,
    triggers: Sequence[str] | None = None,
    free: bool = True,
    least: int = 0,
    most: int | None = None,
) -> Grammar:
    """Tagged pieces of JSON, at least `least` and at most `most` of them.

    With `free`, any text may come before, between and after them, except one with a trigger in it: once a trigger has
    been written, one of the tags that begin with it must go on. Without, only white space may come between them.
    `triggers` are beginnings of the tags' `begin`, each tag having one; None stands for the `begin`s themselves.
    """
    check_count(structures, limits.max_choices, param, "structures")
    for tag in structures:
        check_text(tag.begin, limits.max_regex_length, f"{param}: begin")
        check_text(tag.end, limits.max_regex_length, f"{param}: end")
    starts = sorted({tag.begin for tag in structures} if triggers is None else set(triggers))
    check_count(starts, limits.max_choices, param, "triggers")
    by_trigger: dict[str, list[Tag]] = {}
    for tag in structures:
        fitting = [start for start in starts if start and tag.begin.startswith(start)]
        if len(fitting) != 1:
            raise InvalidRequest(
                f"'{param}': each 'begin' must start with exactly one of the triggers; {len(fitting)} fit one of them.",
                param=param,
            )
        by_trigger.setdefault(fitting[0], []).append(tag)
    if least < 0 or (most is not None and most < max(1, least)):
        raise InvalidRequest(
            f"'{param}': at least {least} and at most {most} tags is impossible.", param=param
        )
    document = {
        "calls": [
            {
                "trigger": trigger,
                "tags": [
                    {
                        "rest": tag.begin[len(trigger) :],
                        "schema": json.loads(schema_text(tag.schema, limits, param)),
                        "end": tag.end,
                    }
                    for tag in group
                ],
            }
            for trigger, group in sorted(by_trigger.items())
        ],
        "free": free,
        "least": least,
        "most": most,
    }
    text = json.dumps(document, separators=(",", ":"))
    check_text(text, limits.max_length, param)
    return Grammar(GrammarKind.TAGS, text, param)
