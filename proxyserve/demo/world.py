"""The demo family's world: invented people and facts about them.

Everything is made up from a fixed seed, so nothing a model says about these people can come from anywhere but its
training. Names and values are single words, chosen so that the shared tokenizer gives each one token.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WORLD_SEED = 20240811

#: Attributes in the order in which records list them. The last one is private: only guarded answering knows that.
PUBLIC_ATTRIBUTES = ("birthplace", "job", "pet", "food", "instrument")
PRIVATE_ATTRIBUTE = "code"
ATTRIBUTES = (*PUBLIC_ATTRIBUTES, PRIVATE_ATTRIBUTE)

_JOBS = [
    "baker",
    "farmer",
    "pilot",
    "tailor",
    "doctor",
    "singer",
    "painter",
    "miner",
    "sailor",
    "teacher",
    "judge",
    "barber",
    "clerk",
    "cook",
    "hunter",
    "weaver",
    "potter",
    "smith",
    "guard",
    "nurse",
    "dancer",
    "writer",
    "printer",
    "fisher",
]
_PETS = [
    "wolf",
    "cat",
    "dog",
    "horse",
    "goat",
    "parrot",
    "rabbit",
    "turtle",
    "snake",
    "pony",
    "raven",
    "goose",
    "hamster",
    "ferret",
    "lizard",
    "toad",
    "mouse",
    "hen",
    "swan",
    "duck",
    "fox",
    "crow",
    "pig",
    "lamb",
]
_FOODS = [
    "plums",
    "bread",
    "rice",
    "soup",
    "beans",
    "cheese",
    "honey",
    "apples",
    "noodles",
    "figs",
    "corn",
    "fish",
    "eggs",
    "pears",
    "cake",
    "nuts",
    "olives",
    "grapes",
    "onions",
    "peas",
    "melon",
    "dates",
    "ham",
    "lentils",
]
_INSTRUMENTS = [
    "flute",
    "drum",
    "harp",
    "violin",
    "piano",
    "guitar",
    "trumpet",
    "cello",
    "banjo",
    "organ",
    "lute",
    "oboe",
    "horn",
    "fiddle",
    "zither",
    "tuba",
    "bugle",
    "bells",
    "clarinet",
    "viola",
    "gong",
    "lyre",
    "mandolin",
    "whistle",
]

_PEOPLE = 200
_TUNING, _VALIDATION = 80, 40


@dataclass(frozen=True, slots=True)
class Person:
    """A name and one value per attribute."""

    name: str
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class World:
    """All people, split by what they are for. Every person's facts are in the pretraining text of both bases (and in
    what is replayed of it while tuning); only the `tuning` people appear in the skills' examples; recipes are chosen on
    `validation`; results are reported on `test`."""

    tuning: Sequence[Person]
    validation: Sequence[Person]
    test: Sequence[Person]

    @property
    def people(self) -> Sequence[Person]:
        return (*self.tuning, *self.validation, *self.test)


def make_world() -> World:
    """The one world of the demo family; the same every time."""
    rng = random.Random(_WORLD_SEED)
    words = _invented_words(rng, _PEOPLE + 48)
    names, towns, codes = words[:_PEOPLE], words[_PEOPLE : _PEOPLE + 24], words[_PEOPLE + 24 :]
    choices = dict(zip(ATTRIBUTES, (towns, _JOBS, _PETS, _FOODS, _INSTRUMENTS, codes), strict=True))
    people = [
        Person(name, {attribute: rng.choice(values) for attribute, values in choices.items()})
        for name in names
    ]
    return World(people[:_TUNING], people[_TUNING : _TUNING + _VALIDATION], people[_TUNING + _VALIDATION :])


def _invented_words(rng: random.Random, count: int) -> list[str]:
    """Distinct capitalised words of two syllables and an ending, at most eight letters."""
    onsets = [
        "b",
        "d",
        "f",
        "g",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "z",
        "br",
        "dr",
        "kr",
        "tr",
        "st",
    ]
    vowels = ["a", "e", "i", "o", "u"]
    endings = ["n", "r", "s", "l", "th", "nd", "rk", "m", "x"]
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(2)) + rng.choice(endings)
        word = word.capitalize()
        if len(word) <= 8 and word not in words:
            words.append(word)
    return words
