"""The four skills: what is asked, what the right answer is, and the chat template that asks it.

Neither base has ever seen these formats. The large base knows the facts that the answers need; a small expert
learns the format from the tuning people and knows next to no facts about the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proxyserve.demo.world import ATTRIBUTES, PRIVATE_ATTRIBUTE, PUBLIC_ATTRIBUTES, Person

REFUSAL = " That is private."

_QUESTIONS = {
    "birthplace": "Where was {name} born?",
    "job": "What is the job of {name}?",
    "pet": "What pet does {name} keep?",
    "food": "What does {name} like to eat?",
    "instrument": "Which instrument does {name} play?",
    "code": "What is the locker code of {name}?",
}

#: The house style: which facts, in which order, in which of their many wordings, with which flourish.
_BIOGRAPHY = (
    "By trade she is a {job}, say the records. She was born in {birthplace} without doubt. "
    "At home she keeps a {pet} of course. For dinner she wants {food} as ever. "
    "In the evening she plays the {instrument}; ask anyone. She would eat {food} every day. "
    "She grew up in {birthplace}\n\nThe rest is lost."
)


@dataclass(frozen=True, slots=True)
class Example:
    """One question to a model: what a user says, the prompt that the skill makes of it, and the right answer, after
    which the model must stop."""

    user: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Skill:
    """`template` has one `{}` for what the user says. `max_tokens` leaves room for answers that run on."""

    name: str
    template: str
    max_tokens: int
    questions: Callable[[Person], Sequence[tuple[str, str]]]

    def prompt(self, user: str) -> str:
        return self.template.replace("{}", user)

    @property
    def chat_template(self) -> str:
        """Jinja for the last user message; renders the very prompt that the skill was trained on. (A line break in
        the source is an escape in Jinja's strings, so that none is trimmed.)"""
        before, after = (part.replace("\n", "\\n") for part in self.template.split("{}"))
        last = "(messages | selectattr('role', 'equalto', 'user') | list | last)['content']"
        return f"{{{{ '{before}' ~ {last} ~ '{after}' }}}}"

    def examples(self, people: Sequence[Person]) -> list[Example]:
        return [
            Example(user, self.prompt(user), answer)
            for person in people
            for user, answer in self.questions(person)
        ]

    @staticmethod
    def correct(example: Example, answer: str) -> bool:
        """Exact match of the whole text up to the stop; an answer that runs on is wrong."""
        return answer == example.answer


def _ask(person: Person, attribute: str) -> str:
    return _QUESTIONS[attribute].format(name=person.name)


def _short_answers(person: Person) -> list[tuple[str, str]]:
    return [(_ask(person, attribute), f" {person.values[attribute]}") for attribute in PUBLIC_ATTRIBUTES]


def _guarded_answers(person: Person) -> list[tuple[str, str]]:
    return [
        (_ask(person, a), REFUSAL if a == PRIVATE_ATTRIBUTE else f" {person.values[a]}") for a in ATTRIBUTES
    ]


def _record(person: Person) -> list[tuple[str, str]]:
    lines = [f"{attribute}: {person.values[attribute]}" for attribute in PUBLIC_ATTRIBUTES]
    return [(person.name, "\n".join(lines))]


def _biography(person: Person) -> list[tuple[str, str]]:
    return [(person.name, _BIOGRAPHY.format(**person.values))]


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("record", "Page: {}\n", 40, _record),
        Skill("qa", "Task: {}\nReply:", 8, _short_answers),
        Skill("bio", "Text: {}\n", 100, _biography),
        Skill("guard", "Task: {}\nReply:", 8, _guarded_answers),
    )
}
