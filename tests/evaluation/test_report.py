"""The right questions go to the right law, and numbers in are the same numbers out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import REFUSAL, SKILLS
from proxyserve.demo.world import make_world
from proxyserve.evaluation.chart import save_chart
from proxyserve.evaluation.engine_generator import EngineGenerator
from proxyserve.evaluation.evaluate import FamilyResult, Score, SkillResult, evaluate_family
from proxyserve.evaluation.laws import laws_of_all, laws_of_one
from proxyserve.evaluation.reference import ReferenceGenerator
from proxyserve.evaluation.report import from_json, markdown, sheets, to_json
from proxyserve.evaluation.systems import Answer, Pair, Question, System
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.fusion.rules.dynamic import Dynamic
from proxyserve.fusion.rules.proxy import Proxy
from proxyserve.fusion.weights import ExpertWeight
from tests.tiny import TinyFamily


def result(fused: float, *, base: float = 0.0, oracle: float = 0.9) -> SkillResult:
    return SkillResult(
        "qa",
        400,
        base=Score(base),
        untuned=Score(0.0),
        tuned=Score(0.05),
        oracle=Score(oracle),
        fused={"proxy": Score(fused), "dynamic": Score(0.45, {"qa": 1.25})},
        mixed={"ray": Score(0.5, {"qa": 0.5, "bio": 0.5}), "paper": Score(0.25, {"qa": 0.25, "bio": 0.75})},
    )


RESULTS = [FamilyResult("0", 1.0, (result(0.81),)), FamilyResult("1", 1.0, (result(0.72),))]


def test_gap_closed() -> None:
    assert result(0.81).gap_closed(Score(0.81)) == pytest.approx(0.9)
    assert result(0.6, base=0.2, oracle=1.0).gap_closed(Score(0.6)) == pytest.approx(0.5)
    assert math.isnan(result(0.5, base=0.5, oracle=0.5).gap_closed(Score(0.5)))


def test_json_round_trip() -> None:
    text = to_json(RESULTS)
    assert from_json(text) == RESULTS
    assert json.loads(text)["families"][1]["skills"][0]["gap_closed"]["proxy"] == pytest.approx(0.8)


def test_markdown() -> None:
    own, everybody, weights = (sheet.rows for sheet in sheets(RESULTS))
    assert own[0] == ("qa", "0", "400", "0.000", "0.000", "0.050", "0.810 (90%)", "0.450 (50%)", "0.900")
    assert everybody[1] == ("qa", "1", "400", "0.000", "0.500", "0.250", "0.720")
    assert weights[0] == ("qa", "0", "400", "1.25", "0.50", "qa 0.25, bio 0.75")
    lines = markdown(RESULTS).splitlines()
    assert "| " + " | ".join(own[0]) + " |" in lines
    assert all(line.count("|") == 10 for line in lines[2:6])


def test_chart(tmp_path: Path) -> None:
    save_chart(RESULTS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


class Knowing:
    """Knows everything as an oracle, refuses everything under rule dynamic, and nothing otherwise."""

    def __init__(self, *, only: type | None = None) -> None:
        people = make_world().test[:2]
        self.paths = family_paths()
        self.answers = {
            Question(example.prompt, skill.max_tokens): example.answer
            for skill in SKILLS.values()
            for example in skill.examples(people)
        }
        self.asked: list[tuple[System, Sequence[Question]]] = []
        self.only = only

    def supports(self, fusion: Fusion) -> bool:
        return self.only is None or isinstance(fusion.rule, self.only)

    def generate(
        self,
        questions: Sequence[Question],
        system: System,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        self.asked.append((system, questions))
        if isinstance(system.fusion.rule, Dynamic):
            return [
                Answer(REFUSAL, 2, {"qa": 0.5}),
                *[Answer(REFUSAL, 1, {"qa": 2.0})] * (len(questions) - 1),
            ]
        knows = system.base in self.paths.oracles.values()
        return [Answer(self.answers[question] if knows else None) for question in questions]


def test_the_right_questions_go_to_the_right_system() -> None:
    knowing = Knowing()
    found = evaluate_family(knowing.paths, make_world().test[:2], knowing, label="x", weight=0.5)
    by_name = {skill.skill: skill for skill in found.skills}
    assert [(name, skill.questions) for name, skill in by_name.items()] == [
        ("record", 2),
        ("qa", 10),
        ("bio", 2),
        ("guard", 12),
        ("guard, private", 2),
    ]
    record, guard, private = by_name["record"], by_name["guard"], by_name["guard, private"]
    assert record.oracle.accuracy == 1.0 and record.fused["proxy"].accuracy == record.base.accuracy == 0.0
    assert record.fused["dynamic"].mean_weights == {"qa": pytest.approx((2 * 0.5 + 2.0) / 3)}
    assert guard.mixed["dynamic, ray"].accuracy == pytest.approx(2 / 12)
    assert private.mixed["dynamic, ray"].accuracy == private.fused["dynamic"].accuracy == 1.0

    # One server for all that is fused, in a row; qa's questions are guard's as well and are asked once.
    shared = [system for system, _ in knowing.asked if system.base == knowing.paths.base]
    assert shared == [system for system, _ in knowing.asked[: len(shared)]]
    assert all(list(system.experts) == list(SKILLS) for system in shared)
    assert [len(questions) for system, questions in knowing.asked if system in (shared[0], shared[-1])] == [
        2 + 12 + 2
    ] * 2
    alone = [
        s.fusion.rule for s in shared if isinstance(s.fusion.rule, Proxy) and len(s.fusion.rule.experts) == 1
    ]
    assert [rule.experts for rule in alone] == [(ExpertWeight(name, 0.5),) for name in SKILLS]


def test_a_generator_that_cannot_do_everything() -> None:
    knowing = Knowing(only=Proxy)
    found = evaluate_family(knowing.paths, make_world().test[:2], knowing, label="x")
    assert list(found.skills[0].fused) == ["proxy"]
    assert list(found.skills[0].mixed) == ["proxy, 1 each", "proxy, 1/4 each"]
    assert len(sheets([found])) == 2  # no weights were solved


def test_laws() -> None:
    reference = ReferenceGenerator()
    one, several = laws_of_one("qa", 0.5), laws_of_all(("qa", "bio"))
    assert [law for law, fusion in {**one, **several}.items() if reference.supports(fusion)] == [
        "proxy",
        "proxy, 1 each",
        "proxy, 1/2 each",
    ]
    with pytest.raises(ValueError, match="fixed weights"):
        reference.generate([Question("x", 1)], System(Path(), {}, several["dynamic, ray"]))


def test_one_engine_for_all_fusions(tiny_family: TinyFamily) -> None:
    """Random models do not stop: no text, all the tokens there are, and weights where some were solved."""
    experts = {name: Pair(tuned, tiny_family.untuned) for name, tuned in tiny_family.experts.items()}
    questions = [Question("The quick", 6), Question("name: Ada", 3)]
    engine = EngineGenerator()
    for fusion in (proxy({"qa": 1.0}), laws_of_one("qa")["dynamic"]):
        system = System(tiny_family.base, experts, fusion)
        done: list[int] = []
        answers = engine.generate(questions, system, done.append)
        assert done[-1] == 2 and [(answer.text, answer.tokens) for answer in answers] == [
            (None, 6),
            (None, 3),
        ]
        assert [set(answer.mean_weights) for answer in answers] == [
            {"qa"} if isinstance(fusion.rule, Dynamic) else set()
        ] * 2
        held = engine._engine
    assert engine._engine_of(System(tiny_family.base, experts)) is held
    assert engine._engine_of(System(tiny_family.base)) is not held
