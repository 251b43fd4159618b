"""Results of several training seeds as JSON, as tables and as a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from proxyserve.errors import ProxyserveError
from proxyserve.evaluation.evaluate import FamilyResult, SkillResult

_COLUMNS = ("base", "untuned", "tuned", "fused", "oracle")
_HEADERS = (
    "skill",
    "seed",
    "questions",
    "base",
    "small untuned",
    "small tuned",
    "fused",
    "oracle",
    "gap closed",
)


def to_json(results: Sequence[FamilyResult]) -> str:
    """The gap closed is written too, for readers; `from_json` computes it again."""
    families = []
    for result in results:
        skills = [{**asdict(skill), "gap_closed": skill.gap_closed} for skill in result.skills]
        families.append({"label": result.label, "weight": result.weight, "skills": skills})
    return json.dumps({"families": families}, indent=2) + "\n"


def from_json(text: str) -> list[FamilyResult]:
    results = []
    for family in json.loads(text)["families"]:
        skills = [
            SkillResult(**{name: value for name, value in skill.items() if name != "gap_closed"})
            for skill in family["skills"]
        ]
        results.append(FamilyResult(family["label"], family["weight"], tuple(skills)))
    return results


def _rows(results: Sequence[FamilyResult]) -> list[tuple[str, ...]]:
    """A row per skill and seed, skills together."""
    rows = []
    for position in range(len(results[0].skills)):
        for result in results:
            skill = result.skills[position]
            accuracies = [f"{getattr(skill, column):.3f}" for column in _COLUMNS]
            rows.append(
                (skill.skill, result.label, str(skill.questions), *accuracies, f"{skill.gap_closed:.0%}")
            )
    return rows


def rich_table(results: Sequence[FamilyResult]) -> Table:
    """For a terminal."""
    table = Table(title=f"share of right answers, weight {results[0].weight:g}")
    for index, header in enumerate(_HEADERS):
        table.add_column(header, justify="left" if index < 2 else "right")
    for row in _rows(results):
        table.add_row(*row, end_section=row[1] == results[-1].label)
    return table


def markdown_table(results: Sequence[FamilyResult]) -> str:
    """For a document."""
    lines = ["| " + " | ".join(_HEADERS) + " |", "|" + " --- |" * 2 + " ---: |" * (len(_HEADERS) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(results)]
    return "\n".join(lines) + "\n"


def save_chart(results: Sequence[FamilyResult], path: Path) -> None:
    """A PNG with a group of bars per skill, a bar per law, and a dot per seed. Needs the `eval` extra (matplotlib)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProxyserveError(
            "The chart needs matplotlib: pip install 'proxyserve[eval]', or leave --chart out."
        ) from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    skills = [skill.skill for skill in results[0].skills]
    colors = ("#b0b0b0", "#d9c9a5", "#e08214", "#1b6ca8", "#4d9a57")
    names = ("base alone", "small untuned", "small tuned alone", "fused", "oracle (base tuned directly)")
    width = 0.16
    for index, (column, name, color) in enumerate(zip(_COLUMNS, names, colors, strict=True)):
        positions = [group + (index - 2) * width for group in range(len(skills))]
        per_seed = [
            [getattr(result.skills[group], column) for result in results] for group in range(len(skills))
        ]
        axes.bar(
            positions,
            [sum(values) / len(values) for values in per_seed],
            width * 0.92,
            label=name,
            color=color,
        )
        for position, values in zip(positions, per_seed, strict=True):
            axes.plot([position] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(skills)), skills)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of right answers")
    axes.set_title(f"Held-out people; bars are means, dots the {len(results)} training seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
