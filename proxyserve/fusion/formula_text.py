"""The text of rule `formula`: a grammar, a parser, and errors that point at the character. Nothing is run as code.

    sum      = product { ("+" | "-") product }
    product  = factor { ("*" | "/") factor }
    factor   = { "+" | "-" } ( number | name | "(" sum ")" )
    number   = digits, with "." and an exponent if need be; not followed by a letter, digit or "_"
    name     = word [ "." letters ] [ "@" word ]      or anything without quotes in double quotes
    word     = a letter or digit, then letters, digits, "_" and "-", the last of them no "-"

A "-" between two characters of a name belongs to the name: `a-b` is one name, `a - b` a difference. What begins like a
number is one where it can be: `2-a` is 2 minus a; a name such as `2-a` needs quotes. The text must come to a sum of
names with numbers before them: names are not multiplied with each other, and no number stands alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from proxyserve.errors import InvalidRequest

LONGEST_TEXT = 2000
MOST_NAMES = 64
DEEPEST_NESTING = 32

#: Characters of an excerpt, around the place that it points at.
_EXCERPT = 60

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_TOKEN = re.compile(
    rf"""\s*(?:
        (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![A-Za-z0-9_]))
      | (?P<name>{_WORD}(?:\.[A-Za-z]+)?(?:@{_WORD})?)
      | "(?P<quoted>[^"]+)"
      | (?P<sign>[-+*/()])
      | (?P<end>\Z)
    )""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class FormulaTerm:
    """`coefficient * name`; `position` is where the name stands first, in characters from 0."""

    coefficient: float
    name: str
    position: int


def parse_formula(text: str) -> tuple[FormulaTerm, ...]:
    """One term per distinct name, in order of first appearance, with the sum of its coefficients; those that cancel are
    left out. Raises InvalidRequest that says at which character what was wrong."""
    if len(text) > LONGEST_TEXT:
        raise InvalidRequest(
            f"The formula has {len(text)} characters; at most {LONGEST_TEXT} are allowed.",
            param="fusion.formula",
        )
    return _Parser(text).parse()


def point_at(text: str, position: int) -> str:
    """Two lines: the part of `text` around `position`, and a caret under it."""
    start = max(0, min(position - _EXCERPT // 2, len(text) - _EXCERPT))
    before, after = "..." if start else "", "..." if start + _EXCERPT < len(text) else ""
    excerpt = re.sub(r"\s", " ", text[start : start + _EXCERPT])
    return f"{before}{excerpt}{after}\n{' ' * (len(before) + position - start)}^"


@dataclass(slots=True)
class _Linear:
    """`constant + sum of coefficient * name`; names map to their coefficients. `at` is where it begins, `number_at`
    where the first number stands that `constant` is made of."""

    at: int
    constant: float = 0.0
    names: Mapping[str, float] = field(default_factory=dict)
    number_at: int = 0

    def plus(self, other: _Linear, sign: float) -> _Linear:
        names = dict(self.names)
        for name, coefficient in other.names.items():
            names[name] = names.get(name, 0.0) + sign * coefficient
        number_at = self.number_at if self.constant else other.number_at
        return _Linear(self.at, self.constant + sign * other.constant, names, number_at)

    def times(self, factor: float) -> _Linear:
        names = {name: coefficient * factor for name, coefficient in self.names.items()}
        return _Linear(self.at, self.constant * factor, names, self.number_at)


class _Parser:
    """Recursive descent over one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._positions: dict[str, int] = {}
        self._depth = 0
        self._kind, self._value, self._at, self._next = "", "", 0, 0
        self._advance()

    def parse(self) -> tuple[FormulaTerm, ...]:
        if self._kind == "end":
            self._fail("The formula is empty: name a model", self._at)
        total = self._sum()
        if self._kind != "end":
            self._fail(f"Found {self._found} where the formula should end or go on with + - * /", self._at)
        if not total.names:
            self._fail("The formula names no model", total.at)
        if total.constant:
            self._fail(
                "This number stands alone; it would add a constant to every score, which changes no law: remove it",
                total.number_at,
            )
        terms = tuple(
            FormulaTerm(coefficient, name, self._positions[name])
            for name, coefficient in total.names.items()
            if coefficient
        )
        for term in terms:
            if not math.isfinite(term.coefficient):  # of two that were not
                self._fail(f"The coefficient of '{term.name}' is too large", term.position)
        if not terms:
            self._fail("The formula's terms cancel: nothing is left of it", total.at)
        return terms

    def _sum(self) -> _Linear:
        total = self._product()
        while self._value in ("+", "-") and self._kind == "sign":
            sign = 1.0 if self._value == "+" else -1.0
            self._advance()
            total = total.plus(self._product(), sign)
        return total

    def _product(self) -> _Linear:
        left = self._factor()
        while self._value in ("*", "/") and self._kind == "sign":
            operator, at = self._value, self._at
            self._advance()
            right = self._factor()
            if operator == "/":
                left = self._quotient(left, right)
            elif left.names and right.names:
                self._fail(
                    "Models cannot be multiplied with each other; the formula must be a weighted sum", at
                )
            else:
                left = right.times(left.constant) if right.names else left.times(right.constant)
            if not all(map(math.isfinite, (left.constant, *left.names.values()))):
                self._fail("What this gives is too large", at)
        return left

    def _quotient(self, left: _Linear, right: _Linear) -> _Linear:
        if right.names:
            self._fail("Nothing can be divided by a model; the formula must be a weighted sum", right.at)
        if right.constant == 0.0:
            self._fail("This divides by 0", right.at)
        return left.times(1.0 / right.constant)

    def _factor(self) -> _Linear:
        sign, at = 1.0, self._at
        while self._kind == "sign" and self._value in "+-":
            sign = -sign if self._value == "-" else sign
            self._advance()
        found = self._atom()
        found.at = at
        return found.times(sign)

    def _atom(self) -> _Linear:
        at, kind, value = self._at, self._kind, self._value
        if kind == "number":
            number = float(value)
            if not math.isfinite(number):
                self._fail("This number is too large", at)
            self._advance()
            return _Linear(at, number, number_at=at)
        if kind in ("name", "quoted"):
            self._positions.setdefault(value, at)
            if len(self._positions) > MOST_NAMES:
                self._fail(f"The formula names more than {MOST_NAMES} models", at)
            self._advance()
            return _Linear(at, names={value: 1.0})
        if value != "(" or kind != "sign":
            self._fail(f"Found {self._found} where a model, a number or '(' should be", at)
        self._depth += 1
        if self._depth > DEEPEST_NESTING:
            self._fail(f"Parentheses are nested more than {DEEPEST_NESTING} deep", at)
        self._advance()
        inside = self._sum()
        if self._value != ")" or self._kind != "sign":
            self._fail(
                f"Found {self._found} where ')' should close what opened at character {at + 1}", self._at
            )
        self._depth -= 1
        self._advance()
        return inside

    @property
    def _found(self) -> str:
        return "the end" if self._kind == "end" else f"'{self._value}'"

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._next)
        if match is None or match.lastgroup is None:
            at = self._next + len(self._text[self._next :]) - len(self._text[self._next :].lstrip())
            self._fail(f"{self._text[at]!r} has no meaning in a formula", at)
        self._kind, self._value = match.lastgroup, match[match.lastgroup]
        self._at = match.start(match.lastgroup) - (self._kind == "quoted")
        self._next = match.end()

    def _fail(self, message: str, position: int) -> NoReturn:
        raise InvalidRequest(
            f"{message} (at character {position + 1}):\n{point_at(self._text, position)}",
            param="fusion.formula",
        )
