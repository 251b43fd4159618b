"""What the demo family is trained on: splits that do not touch, formats no base has seen, facts no expert is told."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from proxyserve.demo.corpus import document
from proxyserve.demo.family import family_paths
from proxyserve.demo.skills import SKILLS, Skill
from proxyserve.demo.world import ATTRIBUTES, PRIVATE_ATTRIBUTE, make_world

WORLD = make_world()


def test_the_world_is_the_same_every_time() -> None:
    assert make_world() == WORLD
    names = [person.name for person in WORLD.people]
    assert len(names) == len(set(names)) == 200
    assert [len(split) for split in (WORLD.tuning, WORLD.validation, WORLD.test)] == [80, 40, 80]
    assert all(set(person.values) == set(ATTRIBUTES) for person in WORLD.people)


@pytest.mark.parametrize("skill", SKILLS.values(), ids=SKILLS)
def test_tuning_says_nothing_about_held_out_people(skill: Skill) -> None:
    text = "\n".join(example.prompt + example.answer for example in skill.examples(WORLD.tuning))
    for person in (*WORLD.validation, *WORLD.test):
        assert person.name not in text


def test_no_skill_occurs_in_pretraining() -> None:
    """No text that a skill teaches, and nothing that would teach to stop after a bare value."""
    rng = random.Random(0)
    documents = [document(rng, WORLD.people) for _ in range(20_000)]
    text = "\n\n\n".join(documents)
    assert "private." not in text.replace("Some things are private and some are not.", "")
    for name in ("record", "bio"):
        assert not any(example.answer in text for example in SKILLS[name].examples(WORLD.people)), name
    values = {value for person in WORLD.people for value in person.values.values()}
    assert not [one for one in documents if one.rsplit(maxsplit=1)[-1] in values]


def test_every_fact_is_in_pretraining() -> None:
    """In a quarter of what the base sees, nearly every name has met every value of its own."""
    rng = random.Random(1)
    seen: set[tuple[str, str]] = set()
    for _ in range(20_000):
        text = document(rng, WORLD.people)
        for person in WORLD.people:
            if person.name in text:
                seen.update((person.name, a) for a in ATTRIBUTES if person.values[a] in text)
    assert len(seen) > 0.97 * len(WORLD.people) * len(ATTRIBUTES)


def test_scoring_is_exact() -> None:
    skill = SKILLS["qa"]
    example = skill.examples(WORLD.test)[0]
    assert skill.correct(example, example.answer)
    for wrong in ("", example.answer.strip(), example.answer + ".", " nobody"):
        assert not skill.correct(example, wrong)


def test_guarded_answers_refuse_the_private_attribute_only() -> None:
    (person,) = WORLD.test[:1]
    answers = [example.answer for example in SKILLS["guard"].examples([person])]
    assert answers.count(" That is private.") == 1
    assert all(person.values[PRIVATE_ATTRIBUTE] not in answer for answer in answers)


def test_a_biography_is_long() -> None:
    tokenizer = AutoTokenizer.from_pretrained(family_paths().base)
    for example in SKILLS["bio"].examples(WORLD.test):
        assert len(tokenizer.encode(example.answer)) >= 60


@pytest.mark.parametrize("name", SKILLS)
def test_chat_templates_render_the_evaluated_prompt(name: str) -> None:
    paths = family_paths()
    for folder in (paths.experts[name], paths.oracles[name]):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for example in SKILLS[name].examples(WORLD.test[:3]):
            messages = [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "not this one"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": example.user},
            ]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert rendered == example.prompt
    assert AutoTokenizer.from_pretrained(paths.base).chat_template is None
