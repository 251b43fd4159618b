"""The grammar of formulas: what is read, what is refused, and where the errors point."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.formula_text import parse_formula, point_at

GOOD = {
    "base": {"base": 1.0},
    "base + qa": {"base": 1.0, "qa": 1.0},
    "base + 0.8*(qa.tuned - small) + 0.3*arith": {"base": 1.0, "qa.tuned": 0.8, "small": -0.8, "arith": 0.3},
    "2*base - base@short": {"base": 2.0, "base@short": -1.0},
    "(1+0.5)*base -0.5*base@no-context": {"base": 1.5, "base@no-context": -0.5},
    "(base + qa)/2": {"base": 0.5, "qa": 0.5},
    "-0.5*qa.untuned+base": {"qa.untuned": -0.5, "base": 1.0},
    "a-b": {"a-b": 1.0},
    "a - b": {"a": 1.0, "b": -1.0},
    "a- b": {"a": 1.0, "b": -1.0},
    "2-1*a + a*3 - 2": {"a": 2.0},
    "7b": {"7b": 1.0},
    '2*"2-a" - "x.y z"': {"2-a": 2.0, "x.y z": -1.0},
    "1e-1*a": {"a": 0.1},
    ".5*a + 1.*b": {"a": 0.5, "b": 1.0},
    "--a": {"a": 1.0},
    "-+-(a)": {"a": 1.0},
    "a + b - a": {"b": 1.0},
    " \n base \t": {"base": 1.0},
    "2*3*a/4/5": {"a": 0.3},
    "-2*(a - (b - c))": {"a": -2.0, "b": 2.0, "c": -2.0},
    "x_1@v_2": {"x_1@v_2": 1.0},
}

BAD = [
    ("", 1, "empty"),
    ("   ", 4, "empty"),
    ("base +", 7, "the end"),
    ("base + * qa", 8, "'*'"),
    ("base qa", 6, "'qa'"),
    ("(base", 6, "opened at character 1"),
    ("base)", 5, "')'"),
    ("base * qa", 6, "multiplied"),
    ("2 / base", 5, "divided by a model"),
    ("base / 0", 8, "divides by 0"),
    ("base / (1 - 1)", 8, "divides by 0"),
    ("base + 1", 8, "constant"),
    ("3 + 4", 1, "names no model"),
    ("base - base", 1, "cancel"),
    ("base + $", 8, "'$' has no meaning"),
    ("base + é", 8, "no meaning"),
    ('base + "qa', 8, "no meaning"),
    ("1e999*base", 1, "too large"),
    ("1e300*1e300*base", 6, "too large"),
    ("base-0.5*qa", 7, "'.5'"),
    ("1e308*base + 1e308*base", 7, "too large"),
    ("(" * 33 + "base" + ")" * 33, 33, "32 deep"),
    ("__import__('os')", 1, "no meaning"),
]


@pytest.mark.parametrize("text", GOOD)
def test_good(text: str) -> None:
    found = {term.name: term.coefficient for term in parse_formula(text)}
    assert found == pytest.approx(GOOD[text])
    assert list(found) == list(GOOD[text]), "in order of appearance"
    for term in parse_formula(text):
        assert text[term.position :].lstrip('"').startswith(term.name)


@pytest.mark.parametrize(("text", "character", "words"), BAD)
def test_bad(text: str, character: int, words: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_formula(text)
    assert refusal.value.param == "fusion.formula"
    message, _, excerpt = refusal.value.message.partition("\n")
    assert words in message
    assert f"at character {character})" in message
    assert excerpt == point_at(text, character - 1)


def test_limits() -> None:
    with pytest.raises(InvalidRequest, match="2000"):
        parse_formula("a" * 2001)
    assert len(parse_formula(" + ".join(f"m{index}" for index in range(64)))) == 64
    with pytest.raises(InvalidRequest, match="more than 64"):
        parse_formula(" + ".join(f"m{index}" for index in range(65)))
    assert parse_formula("-" * 1999 + "a")[0].coefficient == -1.0


def test_excerpts() -> None:
    assert point_at("base + * qa", 7) == "base + * qa\n       ^"
    long = " + ".join(f"model{index}" for index in range(100))
    top, bottom = point_at(long, 500).split("\n")
    assert top.startswith("...") and top.endswith("...") and len(top) == 66
    assert top[bottom.index("^")] == long[500]


def render(rng: random.Random, depth: int) -> tuple[str, float, dict[str, float]]:
    """A random linear text, and what it comes to: (text, constant, coefficients), by an arithmetic of its own."""
    space = rng.choice(("", " "))
    if depth == 0 or rng.random() < 0.3:
        if rng.random() < 0.6:
            name = rng.choice(("base", "qa", "qa.tuned", "a-b", "x@v"))
            return f" {name} ", 0.0, {name: 1.0}
        number = rng.randint(1, 40) / 8
        return f"{number:g} ", number, {}
    left, c1, n1 = render(rng, depth - 1)
    kind = rng.choice("+-*/n(")
    if kind == "n":
        return f"-({left})", -c1, {name: -value for name, value in n1.items()}
    if kind == "(":
        return f"({space}{left}{space})", c1, n1
    if kind in "*/":
        number = rng.randint(1, 16) / 4
        factor = number if kind == "*" else 1 / number
        return (
            f"({left}){space}{kind}{space}{number:g} ",
            c1 * factor,
            {name: v * factor for name, v in n1.items()},
        )
    right, c2, n2 = render(rng, depth - 1)
    sign = 1.0 if kind == "+" else -1.0
    names = {name: n1.get(name, 0.0) + sign * n2.get(name, 0.0) for name in {**n1, **n2}}
    return f"{left} {kind} ({right})", c1 + sign * c2, names


@given(st.integers(0, 10**9))
def test_random_sums(seed: int) -> None:
    text, constant, names = render(random.Random(seed), 5)
    expected = {name: value for name, value in names.items() if abs(value) > 1e-9}
    if abs(constant) > 1e-9 or not expected or len(text) > 2000:
        # Without its constant, and with a name that no random text has, every text is a formula.
        text, expected = f"{text} - {constant!r} * one + {constant!r} * one + zero", {**expected, "zero": 1.0}
        if abs(constant) > 1e-9 or len(text) > 2000:
            with pytest.raises(InvalidRequest):
                parse_formula(text)
            return
    found = {term.name: term.coefficient for term in parse_formula(text) if abs(term.coefficient) > 1e-9}
    assert found == pytest.approx(expected)


@given(st.text(alphabet='base qa.tuned@x+-*/()0123456789"e_$é\n', max_size=60))
def test_garbage_is_refused_in_order(text: str) -> None:
    try:
        terms = parse_formula(text)
    except InvalidRequest as refusal:
        assert refusal.param == "fusion.formula"
    else:
        assert terms
