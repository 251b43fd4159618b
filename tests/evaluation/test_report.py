"""Numbers in, the same numbers out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import make_world
from proxyserve.evaluation.evaluate import FamilyResult, SkillResult, evaluate_family
from proxyserve.evaluation.report import from_json, markdown_table, save_chart, to_json
from proxyserve.evaluation.systems import System

RESULTS = [
    FamilyResult(
        label,
        1.0,
        (SkillResult("qa", 400, 0.0, 0.0, 0.05, fused, 0.9), SkillResult("bio", 80, 0.0, 0.0, 0.0, 0.5, 1.0)),
    )
    for label, fused in (("0", 0.81), ("1", 0.72))
]


def test_gap_closed() -> None:
    assert RESULTS[0].skills[0].gap_closed == pytest.approx(0.9)
    assert SkillResult("x", 1, 0.2, 0.0, 0.0, 0.6, 1.0).gap_closed == pytest.approx(0.5)
    assert math.isnan(SkillResult("x", 1, 0.5, 0.0, 0.0, 0.5, 0.5).gap_closed)


def test_json_round_trip() -> None:
    text = to_json(RESULTS)
    assert from_json(text) == RESULTS
    assert json.loads(text)["families"][1]["skills"][0]["gap_closed"] == pytest.approx(0.8)


def test_markdown() -> None:
    lines = markdown_table(RESULTS).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == "| qa | 0 | 400 | 0.000 | 0.000 | 0.050 | 0.810 | 0.900 | 90% |"


def test_chart(tmp_path: Path) -> None:
    save_chart(RESULTS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_right_questions_go_to_the_right_system() -> None:
    """A generator that knows everything as an oracle and nothing otherwise."""
    paths, people = family_paths(), make_world().test[:2]
    answers = {
        example.prompt: example.answer for skill in SKILLS.values() for example in skill.examples(people)
    }
    asked: list[System] = []

    class Knowing:
        def generate(self, prompts: Sequence[str], system: System, max_tokens: int) -> list[str | None]:
            asked.append(system)
            knows = system.base in paths.oracles.values()
            return [answers[prompt] if knows else None for prompt in prompts]

    result = evaluate_family(paths, people, Knowing(), label="x", weight=0.5)
    by_name = {skill.skill: skill for skill in result.skills}
    assert by_name["record"].questions == 2 and by_name["guard"].questions == 12
    assert by_name["record"].oracle == 1.0 and by_name["record"].fused == by_name["record"].base == 0.0
    fused = [system for system in asked if system.experts]
    assert [next(iter(system.experts)) for system in fused] == list(SKILLS)
    assert all(weight == 0.5 for system in fused for _, weight in system.experts.values())
