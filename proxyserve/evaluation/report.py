"""Results of several training seeds as JSON and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from proxyserve.evaluation.evaluate import FamilyResult, Score, SkillResult
from proxyserve.evaluation.laws import OWN

_ALONE = ("base", "untuned", "tuned", "oracle")


def to_json(results: Sequence[FamilyResult]) -> str:
    """The gap closed by each fused law is written too, for readers; `from_json` computes it again."""
    families = []
    for result in results:
        skills = [
            {
                **asdict(skill),
                "gap_closed": {law: skill.gap_closed(score) for law, score in skill.fused.items()},
            }
            for skill in result.skills
        ]
        families.append({"label": result.label, "weight": result.weight, "skills": skills})
    return json.dumps({"families": families}, indent=2) + "\n"


def from_json(text: str) -> list[FamilyResult]:
    return [
        FamilyResult(
            family["label"], family["weight"], tuple(_skill_result(skill) for skill in family["skills"])
        )
        for family in json.loads(text)["families"]
    ]


def _skill_result(data: Mapping[str, Any]) -> SkillResult:
    return SkillResult(
        data["skill"],
        data["questions"],
        **{name: Score(**data[name]) for name in _ALONE},
        fused={law: Score(**score) for law, score in data["fused"].items()},
        mixed={law: Score(**score) for law, score in data["mixed"].items()},
    )


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table before it is drawn. The first two columns are words, the rest numbers."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def as_markdown(self) -> str:
        words = 2
        lines = [
            f"**{self.title}**",
            "",
            "| " + " | ".join(self.headers) + " |",
            "|" + " --- |" * words + " ---: |" * (len(self.headers) - words),
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"

    def as_rich(self) -> Table:
        table = Table(title=self.title)
        for index, header in enumerate(self.headers):
            table.add_column(header, justify="left" if index < 2 else "right")
        for row, following in zip(self.rows, (*self.rows[1:], None), strict=True):
            table.add_row(*row, end_section=following is None or following[0] != row[0])
        return table


def sheets(results: Sequence[FamilyResult]) -> list[Sheet]:
    """The tables of a report: each skill with its own expert, all experts at once, and the weights that were solved."""
    return [_own_expert(results), _all_experts(results), *_solved_weights(results)]


def markdown(results: Sequence[FamilyResult]) -> str:
    """For a document."""
    return "\n".join(sheet.as_markdown() for sheet in sheets(results))


def _own_expert(results: Sequence[FamilyResult]) -> Sheet:
    laws = tuple(results[0].skills[0].fused)

    def cells(skill: SkillResult) -> list[str]:
        fused = [_with_gap(skill, skill.fused[law]) for law in laws]
        return [*map(_share, (skill.base, skill.untuned, skill.tuned)), *fused, _share(skill.oracle)]

    return Sheet(
        f"Own expert alone: share of right answers (gap closed); weight of proxy {results[0].weight:g}",
        ("skill", "seed", "questions", "base", "small untuned", "small tuned", *laws, "oracle"),
        _rows(results, cells),
    )


def _all_experts(results: Sequence[FamilyResult]) -> Sheet:
    laws = tuple(results[0].skills[0].mixed)

    def cells(skill: SkillResult) -> list[str]:
        return [_share(skill.base), *(_share(skill.mixed[law]) for law in laws), _share(skill.fused[OWN])]

    return Sheet(
        "All experts at once: share of right answers",
        ("skill", "seed", "questions", "base", *laws, f"own expert alone, {OWN}"),
        _rows(results, cells),
    )


def _solved_weights(results: Sequence[FamilyResult]) -> list[Sheet]:
    """No sheet if no weights were solved."""
    first = results[0].skills[0]
    fused = [law for law, score in first.fused.items() if score.mean_weights]
    mixed = [law for law, score in first.mixed.items() if score.mean_weights]
    if not fused and not mixed:
        return []

    def cells(skill: SkillResult) -> list[str]:
        scores = [*(skill.fused[law] for law in fused), *(skill.mixed[law] for law in mixed)]
        return [_weights(score) for score in scores]

    headers = [*(f"own: {law}" for law in fused), *(f"all: {law}" for law in mixed)]
    return [
        Sheet(
            "Mean of the solved weight over generated tokens",
            ("skill", "seed", "questions", *headers),
            _rows(results, cells),
        )
    ]


def _rows(
    results: Sequence[FamilyResult], cells: Callable[[SkillResult], list[str]]
) -> tuple[tuple[str, ...], ...]:
    """A row per kind of question and seed, kinds together."""
    return tuple(
        (skill.skill, result.label, str(skill.questions), *cells(skill))
        for position in range(len(results[0].skills))
        for result in results
        for skill in [result.skills[position]]
    )


def _share(score: Score) -> str:
    return f"{score.accuracy:.3f}"


def _with_gap(skill: SkillResult, score: Score) -> str:
    gap = skill.gap_closed(score)
    return f"{_share(score)} (-)" if math.isnan(gap) else f"{_share(score)} ({gap:.0%})"


def _weights(score: Score) -> str:
    """One number where all experts have the same weight, as along a ray of equal weights."""
    shown = {expert: f"{weight:.2f}" for expert, weight in score.mean_weights.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{expert} {weight}" for expert, weight in shown.items())
