"""Accuracy of base, small models, fused laws and oracle on each skill of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxyserve.demo.family import FamilyPaths
from proxyserve.demo.skills import REFUSAL, SKILLS, Example, Skill
from proxyserve.demo.world import Person
from proxyserve.evaluation.laws import laws_of_all, laws_of_one
from proxyserve.evaluation.systems import Answer, Generator, Pair, Question, System
from proxyserve.fusion.fusion import Fusion

#: The skill that refuses some of its questions; those are counted once more on their own.
GUARD = "guard"


@dataclass(frozen=True, slots=True)
class Score:
    """Share of right answers (exact text, stopped). `mean_weights`, where weights are solved, maps each expert to the
    mean of its weight over all generated tokens."""

    accuracy: float
    mean_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SkillResult:
    """Scores on `questions` questions of one kind: a skill's, or those of it that are to be refused. `fused` are laws
    with the skill's own expert, `mixed` laws with all experts at once; both by the names of `laws`."""

    skill: str
    questions: int
    base: Score
    untuned: Score
    tuned: Score
    oracle: Score
    fused: Mapping[str, Score]
    mixed: Mapping[str, Score]

    def gap_closed(self, score: Score) -> float:
        """(fused - base) / (oracle - base); NaN where the oracle is no better than the base."""
        gap = self.oracle.accuracy - self.base.accuracy
        return (score.accuracy - self.base.accuracy) / gap if gap > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """One training seed. `label` says which, `weight` is that of rule `proxy` with a skill's own expert."""

    label: str
    weight: float
    skills: tuple[SkillResult, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Questions that are counted together."""

    name: str
    skill: Skill
    examples: Sequence[Example]


def _kinds(people: Sequence[Person]) -> list[_Kind]:
    kinds = [_Kind(name, skill, skill.examples(people)) for name, skill in SKILLS.items()]
    refused = [kind for kind in kinds if kind.name == GUARD]
    for kind in refused:
        private = [example for example in kind.examples if example.answer == REFUSAL]
        kinds.append(_Kind(f"{kind.name}, private", kind.skill, private))
    return kinds


def evaluate_family(
    paths: FamilyPaths,
    people: Sequence[Person],
    generator: Generator,
    *,
    label: str,
    weight: float = 1.0,
    progress: Callable[[str], None] = lambda message: None,
) -> FamilyResult:
    """Ask the questions about `people` of every law that the generator supports. One server with all experts answers
    everything that is fused, and the base's part; each small model and each oracle is a server of its own."""
    kinds = _kinds(people)
    experts = {name: Pair(paths.experts[name], paths.untuned) for name in SKILLS}
    asker = _Asker(generator, label, progress)

    def own(skill: str) -> list[_Kind]:
        return [kind for kind in kinds if kind.skill.name == skill]

    def alone(what: str, folders: Mapping[str, Path]) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        for skill, folder in folders.items():
            scores |= asker.ask(f"{skill}, {what}", System(folder), own(skill))
        return scores

    base = asker.ask("base", System(paths.base, experts), kinds)
    fused: dict[str, dict[str, Score]] = {kind.name: {} for kind in kinds}
    for skill in SKILLS:
        for law, fusion in asker.supported(laws_of_one(skill, weight)):
            scores = asker.ask(f"{skill}, {law}", System(paths.base, experts, fusion), own(skill))
            for kind, score in scores.items():
                fused[kind][law] = score
    mixed = {
        law: asker.ask(f"all experts, {law}", System(paths.base, experts, fusion), kinds)
        for law, fusion in asker.supported(laws_of_all(tuple(SKILLS)))
    }
    untuned = asker.ask("small untuned", System(paths.untuned), kinds)
    tuned = alone("small tuned", paths.experts)
    oracle = alone("oracle", paths.oracles)
    results = [
        SkillResult(
            kind.name,
            len(kind.examples),
            base=base[kind.name],
            untuned=untuned[kind.name],
            tuned=tuned[kind.name],
            oracle=oracle[kind.name],
            fused=fused[kind.name],
            mixed={law: scores[kind.name] for law, scores in mixed.items()},
        )
        for kind in kinds
    ]
    return FamilyResult(label, weight, tuple(results))


@dataclass(frozen=True, slots=True)
class _Asker:
    generator: Generator
    label: str
    progress: Callable[[str], None]

    def supported(self, laws: Mapping[str, Fusion]) -> list[tuple[str, Fusion]]:
        return [(law, fusion) for law, fusion in laws.items() if self.generator.supports(fusion)]

    def ask(self, what: str, system: System, kinds: Sequence[_Kind]) -> dict[str, Score]:
        """Scores by kind. A question that belongs to several kinds is asked once."""
        asked = list(dict.fromkeys(_question(kind, example) for kind in kinds for example in kind.examples))

        def report(done: int) -> None:
            self.progress(f"{self.label}: {what}, {done} of {len(asked)} answers")

        report(0)
        answers = dict(zip(asked, self.generator.generate(asked, system, report), strict=True))
        return {kind.name: _score(kind, answers) for kind in kinds}


def _question(kind: _Kind, example: Example) -> Question:
    return Question(example.prompt, kind.skill.max_tokens)


def _score(kind: _Kind, answers: Mapping[Question, Answer]) -> Score:
    given = [answers[_question(kind, example)] for example in kind.examples]
    right = sum(
        answer.text is not None and kind.skill.correct(example, answer.text)
        for example, answer in zip(kind.examples, given, strict=True)
    )
    return Score(right / len(given), _mean_weights(given))


def _mean_weights(answers: Sequence[Answer]) -> dict[str, float]:
    """Each token counts the same, so long answers count more."""
    solved = [answer for answer in answers if answer.mean_weights]
    tokens = sum(answer.tokens for answer in solved)
    return {
        expert: sum(answer.mean_weights[expert] * answer.tokens for answer in solved) / tokens
        for expert in (solved[0].mean_weights if solved else ())
    }
