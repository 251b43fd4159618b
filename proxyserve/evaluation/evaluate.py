"""Accuracy of base, small models, fused law and oracle on each skill of a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proxyserve.demo.family import FamilyPaths
from proxyserve.demo.skills import SKILLS, Skill
from proxyserve.demo.world import Person
from proxyserve.evaluation.systems import Generator, Pair, System


@dataclass(frozen=True, slots=True)
class SkillResult:
    """Share of right answers (exact text, stopped) of each law on one skill, over `questions` questions."""

    skill: str
    questions: int
    base: float
    untuned: float
    tuned: float
    fused: float
    oracle: float

    @property
    def gap_closed(self) -> float:
        """(fused - base) / (oracle - base); NaN where the oracle is no better than the base."""
        gap = self.oracle - self.base
        return (self.fused - self.base) / gap if gap > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """One training seed. `label` says which."""

    label: str
    weight: float
    skills: tuple[SkillResult, ...]


def evaluate_family(
    paths: FamilyPaths,
    people: Sequence[Person],
    generator: Generator,
    *,
    label: str,
    weight: float = 1.0,
    progress: Callable[[str], None] = lambda message: None,
) -> FamilyResult:
    """Ask all questions about `people` of every law. `weight` multiplies the expert's delta in the fused law."""
    results = []
    for name, skill in SKILLS.items():
        pair = Pair(paths.experts[name], paths.untuned)
        systems = {
            "base": System(paths.base),
            "untuned": System(paths.untuned),
            "tuned": System(pair.tuned),
            "fused": System(paths.base, {name: (pair, weight)}),
            "oracle": System(paths.oracles[name]),
        }
        accuracies = {}
        for system_name, system in systems.items():
            progress(f"{label}: {name}, {system_name}")
            accuracies[system_name] = _accuracy(skill, people, generator, system)
        results.append(SkillResult(name, len(skill.examples(people)), **accuracies))
    return FamilyResult(label, weight, tuple(results))


def _accuracy(skill: Skill, people: Sequence[Person], generator: Generator, system: System) -> float:
    examples = skill.examples(people)
    answers = generator.generate([example.prompt for example in examples], system, skill.max_tokens)
    right = sum(
        answer is not None and skill.correct(example, answer)
        for example, answer in zip(examples, answers, strict=True)
    )
    return right / len(examples)
