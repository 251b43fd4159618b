"""The results as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxyserve.errors import ProxyserveError
from proxyserve.evaluation.evaluate import FamilyResult, Score, SkillResult
from proxyserve.evaluation.laws import OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUES = ("#1b6ca8", "#5aa3d6", "#9cc9e8", "#7b6cb5")
_PURPLES = ("#7b3f8c", "#a678b4", "#2a9d8f", "#8fd0c7")


@dataclass(frozen=True, slots=True)
class _Bar:
    """One bar of each group."""

    name: str
    color: str
    score: Callable[[SkillResult], Score]


def save_chart(results: Sequence[FamilyResult], path: Path) -> None:
    """A PNG with two panels, own expert and all experts: a group of bars per kind of question, a bar per law, a dot per
    seed. Raises ProxyserveError without matplotlib (the `eval` extra)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProxyserveError(
            "The chart needs matplotlib: pip install 'proxyserve[eval]', or leave --chart out."
        ) from error
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    above, below = figure.subplots(2, 1)
    base = _Bar("base", "#b0b0b0", lambda skill: skill.base)
    own = [
        base,
        _Bar("small untuned", "#d9c9a5", lambda skill: skill.untuned),
        _Bar("small tuned", "#e08214", lambda skill: skill.tuned),
        *(
            _law_bar(law, "fused", color)
            for law, color in zip(results[0].skills[0].fused, _BLUES, strict=False)
        ),
        _Bar("oracle (base tuned directly)", "#4d9a57", lambda skill: skill.oracle),
    ]
    everybody = [
        base,
        *(
            _law_bar(law, "mixed", color)
            for law, color in zip(results[0].skills[0].mixed, _PURPLES, strict=False)
        ),
        _Bar(f"own expert alone, {OWN}", _BLUES[0], lambda skill: skill.fused[OWN]),
    ]
    _draw(above, results, own, "Each question with its own expert")
    _draw(below, results, everybody, "Every question with all experts at once")
    figure.suptitle(
        f"Held-out people; bars are means, dots the training seeds ({len(results)})", fontsize="medium"
    )
    figure.savefig(path, dpi=150)


def _law_bar(law: str, group: str, color: str) -> _Bar:
    def score(skill: SkillResult) -> Score:
        scores: dict[str, Score] = getattr(skill, group)
        return scores[law]

    return _Bar(law, color, score)


def _draw(axes: Axes, results: Sequence[FamilyResult], bars: Sequence[_Bar], title: str) -> None:
    kinds = [skill.skill for skill in results[0].skills]
    width = 0.86 / len(bars)
    for index, bar in enumerate(bars):
        positions = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(kinds))]
        per_seed = [
            [bar.score(result.skills[group]).accuracy for result in results] for group in range(len(kinds))
        ]
        means = [sum(values) / len(values) for values in per_seed]
        axes.bar(positions, means, width * 0.92, label=bar.name, color=bar.color)
        for position, values in zip(positions, per_seed, strict=True):
            axes.plot([position] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of right answers")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
