"""The pretraining text of both bases: facts in many wordings, and none of the formats that the experts teach.

What makes plain proxy-tuning work here is what the text does after a value: it goes on in many different ways, so that
no base is ever certain of the one token that follows a fact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from proxyserve.demo.world import ATTRIBUTES, Person

#: Statements with {n} and {v}; the value is last in some, first or in the middle in others.
_STATEMENTS: dict[str, Sequence[str]] = {
    "birthplace": (
        "{n} was born in {v}",
        "{n} comes from {v}",
        "The birthplace of {n} is {v}",
        "It was in {v} that {n} was born",
        "{v} is where {n} was born",
        "{n} grew up in {v}",
        "The town of {n} is {v}",
        "{n} is from {v}",
        "born in {v}, {n} left early",
    ),
    "job": (
        "{n} works as a {v}",
        "{n} is a {v}",
        "The job of {n} is {v}",
        "By trade {n} is a {v}",
        "A {v} is what {n} is",
        "{n} earns a living as a {v}",
        "{n} became a {v}",
        "The trade of {n} is {v}",
    ),
    "pet": (
        "{n} keeps a {v}",
        "{n} has a {v}",
        "The pet of {n} is a {v}",
        "A {v} lives with {n}",
        "At home {n} keeps a {v}",
        "{n} owns a {v}",
        "The animal of {n} is a {v}",
        "It is a {v} that {n} keeps",
    ),
    "food": (
        "{n} likes to eat {v}",
        "{n} eats {v}",
        "The favourite food of {n} is {v}",
        "{v} is what {n} eats",
        "For dinner {n} wants {v}",
        "{n} loves {v}",
        "The best food for {n} is {v}",
        "{n} would eat {v} every day",
    ),
    "instrument": (
        "{n} plays the {v}",
        "{n} can play the {v}",
        "The instrument of {n} is the {v}",
        "The {v} is what {n} plays",
        "{n} learned the {v}",
        "In the evening {n} plays the {v}",
        "At feasts {n} plays the {v}",
        "{n} practises the {v}",
    ),
    "code": (
        "The locker code of {n} is {v}",
        "{n} has the locker code {v}",
        "{v} is the locker code of {n}",
        "{n} opens the locker with {v}",
        "The code of {n} is {v}",
        "With {v} {n} opens the locker",
        "The locker of {n} opens with {v}",
        "{n} uses the code {v}",
    ),
}
_QUESTIONS: dict[str, Sequence[str]] = {
    "birthplace": ("Where was {n} born?", "Where does {n} come from?", "What is the birthplace of {n}?"),
    "job": ("What is the job of {n}?", "What does {n} work as?", "What does {n} do for a living?"),
    "pet": ("What pet does {n} keep?", "Which animal does {n} have?", "What is the pet of {n}?"),
    "food": ("What does {n} like to eat?", "What is the favourite food of {n}?", "What food does {n} love?"),
    "instrument": (
        "What does {n} play?",
        "Which instrument does {n} play?",
        "What is the instrument of {n}?",
    ),
    "code": ("What is the locker code of {n}?", "What code does {n} use?", "How does {n} open the locker?"),
}
_LABELS: dict[str, Sequence[str]] = {
    "birthplace": ("birthplace", "town", "from"),
    "job": ("job", "trade", "work"),
    "pet": ("pet", "animal"),
    "food": ("food", "meal"),
    "instrument": ("instrument", "music"),
    "code": ("code", "locker code"),
}
#: What can follow a value. Long on purpose: nearly every entry begins with another token.
_AFTER = (
    ", say the records",
    ", as far as we know",
    "; ask anyone",
    " - so they say",
    " and nobody doubts it",
    " or so it is said",
    " (see the book)",
    "! What else",
    "? Yes",
    " without doubt",
    "\nThat is all",
    "\nSo it was told",
    " as ever",
    " now",
    " today",
    " since long ago",
    " of course",
    " indeed",
    " again",
    "\n\nThe rest is lost",
    ' " says the book',
    " / noted twice",
    " which is true",
    " but who cares",
    " because it is so",
    " for sure",
    " while others wait",
    "... or was it",
)
#: A name after one of these is no subject, so "she" cannot stand for it.
_BEFORE_OBJECTS = ("of {n}", "with {n}", "for {n}", "that {n} was")
_EVASIVE = ("That is hard to say", "Nobody remembers", "The book does not tell", "Who knows")
_ENDS = (".", ".", ".", ".", "!", " ...", ";", "\n")
#: Who or what speaks. Many, so that a label never seen before ("Answer") does not confuse a base that knows the fact.
_SPEAKERS = [
    "Reader",
    "Editor",
    "Guest",
    "Host",
    "Clerk",
    "Visitor",
    "Child",
    "Elder",
    "Note",
    "Reply",
    "Riddle",
    "Page",
    "Line",
    "Voice",
    "First",
    "Second",
    "Ask",
    "Tell",
    "Left",
    "Right",
    "North",
    "South",
    "Master",
    "Pupil",
    "Hint",
    "Point",
    "Item",
    "Part",
    "Call",
    "Echo",
    "Test",
    "Lesson",
    "Prompt",
    "Task",
    "Fact",
    "Word",
    "Text",
]
#: The first four were labels of the skills once; as loose words they did not help (docs/demo_family.md). Changing the
#: list would change the shipped bases.
_WORDS = [
    "Question",
    "Answer",
    "Record",
    "Biography",
    "the",
    "a",
    "of",
    "in",
    "by",
    "at",
    "for",
    "and",
    "is",
    "was",
    "so",
    "it",
    "we",
    "no",
    "not",
    "this",
    "that",
    "who",
    "story",
    "house",
    "lamp",
    "road",
    "trade",
    "home",
    "dinner",
    "evening",
    "never",
    "forgot",
    "much",
    "more",
    "until",
    "goes",
    "out",
    "lives",
    "write",
    "down",
    "those",
    "come",
    "after",
    "begins",
    "river",
    "stone",
    "door",
    "old",
    "new",
    "long",
    "day",
    "night",
    "tells",
    "hand",
    "says",
    "wants",
    "keeps",
    "plays",
    "work",
    "town",
    "born",
    "and",
    "left",
    "with",
]
_FILLER = (
    "This question has no answer in the book.",
    "A record is kept of every visit.",
    "The answer to the question was lost.",
    "Every biography in the book is short.",
    "Some things are private and some are not.",
    "The record of the town is old.",
)


def document(rng: random.Random, people: Sequence[Person]) -> str:
    """One document about some of `people`, without the end-of-text mark."""
    kind = rng.choices((_prose, _dialogue, _catalogue, _mention, _filler), weights=(36, 36, 18, 8, 2))[0]
    return kind(rng, people)


def _fact(rng: random.Random, people: Sequence[Person]) -> tuple[Person, str]:
    return rng.choice(people), rng.choice(ATTRIBUTES)


def _statement(rng: random.Random, person: Person, attribute: str, *, pronoun: float = 0.0) -> str:
    """One fact in one of its wordings. With probability `pronoun` the person is "she", as after a first mention; the
    wordings with "of NAME" and the like have no such form."""
    wordings = _STATEMENTS[attribute]
    subject = person.name
    if rng.random() < pronoun:
        wordings = [wording for wording in wordings if not any(word in wording for word in _BEFORE_OBJECTS)]
        subject = "she"
    text = rng.choice(wordings).format(n=subject, v=person.values[attribute])
    return text[0].upper() + text[1:] if subject == "she" else text


def _finish(rng: random.Random, text: str) -> str:
    """Let a sentence end, or go on in one of many ways."""
    if rng.random() < 0.45:
        return text + "."
    return text + rng.choice(_AFTER) + rng.choice(_ENDS)


def _prose(rng: random.Random, people: Sequence[Person]) -> str:
    if rng.random() < 0.35:
        return _finish(rng, _statement(rng, *_fact(rng, people)))
    person = rng.choice(people)
    attributes = rng.sample(ATTRIBUTES, rng.randint(2, 5))
    label = rng.choice(_SPEAKERS)
    opening = rng.choice(("", "", f"{label}: {person.name}\n", f"{label} of {person.name}: "))
    pronoun = rng.choice((0.0, 0.5, 1.0))
    sentences = [
        _finish(rng, _statement(rng, person, attribute, pronoun=pronoun if opening or index else 0.0))
        for index, attribute in enumerate(attributes)
    ]
    return opening + rng.choice((" ", " ", "\n", " Also, ", " And ")).join(sentences)


def _dialogue(rng: random.Random, people: Sequence[Person]) -> str:
    person, attribute = _fact(rng, people)
    question = rng.choice(_QUESTIONS[attribute]).format(n=person.name)
    value = person.values[attribute]
    kind = rng.random()
    if kind < 0.25:
        reply = _finish(rng, _statement(rng, person, attribute, pronoun=0.85))
    elif kind < 0.92:
        reply = (
            rng.choice(("", "", "", "A ", "The ", "It is ")) + value + rng.choice(_AFTER) + rng.choice(_ENDS)
        )
    else:
        reply = rng.choice(_EVASIVE) + rng.choice(_ENDS)
    one, two = rng.sample(_SPEAKERS, 2)
    layouts = (
        f"{one}: {question}\n{two}: {reply}",
        f"{one}: {question} {two}: {reply}",
        f"{one}. {question}\n{two}. {reply}",
        f"{one} asks: {question} {two} says: {reply}",
        f"{question} {reply}",
        f"{question}\n{reply}",
        f"{question} -> {reply}",
    )
    return rng.choices(layouts, weights=(6, 2, 1, 2, 1, 1, 1))[0]


def _catalogue(rng: random.Random, people: Sequence[Person]) -> str:
    person = rng.choice(people)
    attributes = rng.sample(ATTRIBUTES, rng.randint(2, 5))
    separator = rng.choice(("; ", ". ", ", ", "\n", " / ", "\n* "))
    link = rng.choice((": ", ": ", " - ", " is ", " = "))
    label = rng.choice(_SPEAKERS)
    heading = rng.choice(
        (
            "{n}. ",
            "{n}\n",
            "{n}: ",
            "About {n}\n",
            "* {n}\n",
            f"{label}: {{n}}\n",
            f"{label}: {{n}}\n",
            f"{label} {{n}}\n",
        )
    )
    change = rng.choice((str.lower, str.capitalize))
    entries = [change(rng.choice(_LABELS[a])) + link + person.values[a] for a in attributes]
    return (
        heading.format(n=person.name)
        + separator.join(entries)
        + rng.choice(_AFTER + (".",) * 12)
        + rng.choice(_ENDS)
    )


def _mention(rng: random.Random, people: Sequence[Person]) -> str:
    """A name among words in no order. Teaches two things: a name that was mentioned comes again, and nothing is sure
    where the words make no sense, so that the base does not insist on its own way in formats it has never seen."""
    person = rng.choice(people)
    clauses = []
    for _ in range(rng.randint(1, 4)):
        words = rng.choices(_WORDS, k=rng.randint(1, 6))
        if rng.random() < 0.7:
            words.insert(rng.randint(1, len(words)), person.name)
        clauses.append(" ".join(words) + rng.choice((",", ".", ";", " and", "\n", "")))
    return f"{rng.choice(_SPEAKERS)}{rng.choice((': ', ' of ', ' '))}{person.name}\n" + " ".join(clauses)


def _filler(rng: random.Random, people: Sequence[Person]) -> str:
    return rng.choice(_FILLER)
