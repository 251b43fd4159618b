"""`proxyserve formula`: what it prints, and errors that point at the character."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.in_process import Ended, run_command


def run_formula(*arguments: str) -> Ended:
    return run_command("formula", *arguments)


def test_coefficients_and_program() -> None:
    text = "base + 0.8*(qa.tuned - small) + 0.3*guard"
    command = [sys.executable, "-m", "proxyserve", "formula", text]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == "+1 base +0.8 qa.tuned -0.8 small +0.3 guard.tuned -0.3 guard.untuned"
    program = run_formula(text, "--explain")
    assert program.stdout.splitlines() == [
        "lanes    base, qa.tuned, small, guard.tuned, guard.untuned",
        "scores   l(base)",
        "         + 0.8 * (l(qa.tuned) - l(small))",
        "         + 0.3 * (l(guard.tuned) - l(guard.untuned))",
        "sum of weights  1",
    ]


def test_names_of_the_caller() -> None:
    result = run_formula(
        "0.5*base + up - 2*mini@short", "--expert", "up=/nowhere/t,/nowhere/mini", "--explain"
    )
    assert result.returncode == 0, result.stderr
    assert "- 2 * l(mini@short)" in result.stdout
    twice = run_formula("base + half", "--preset", 'half={"rule": "formula", "formula": "0.5*base"}')
    assert twice.stdout.split() == ["+1.5", "base"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base + * qa"], "at character 8"),
        (["base + nobody"], "There is no model 'nobody'"),
        (["base * qa"], "multiplied"),
        (["base - base"], "cancel"),
        (["base + a", "--preset", 'a={"rule": "formula", "formula": "base + a"}'], "made of itself"),
        (["base + up", "--expert", "up=/nowhere/t"], "without an untuned model"),
        (["base + d", "--preset", 'd={"rule": "dynamic", "experts": {"qa": 1}}'], "no plain sum"),
    ],
    ids=str,
)
def test_errors(arguments: list[str], words: str) -> None:
    result = run_formula(*arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
