"""Drafts from the text itself, against a search through all of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from proxyserve.engine.speculation.lookup import Lookup


def searched(text: Sequence[int], most: int) -> list[int]:
    for size in (4, 3, 2):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return list(text[start + size : start + size + most])
    return []


def test_finds_what_a_search_finds() -> None:
    generator = random.Random(0)
    for vocabulary in (4, 20):
        prompt = [generator.randrange(vocabulary) for _ in range(generator.randint(1, 12))]
        lookup, output = Lookup(prompt), list[int]()
        for _ in range(60):
            expected = searched([*prompt, *output], 5)
            # Only the last places of a pair are looked at, which only short vocabularies notice.
            found = lookup.propose(output, 5)
            assert found == expected or (vocabulary == 4 and bool(found) == bool(expected))
            output.extend(generator.randrange(vocabulary) for _ in range(generator.randint(1, 3)))


def test_prefers_the_longer_match_to_the_later_one() -> None:
    lookup = Lookup([1, 2, 3, 4, 50, 51, 3, 4, 60, 61, 1, 2, 3, 4])
    assert lookup.propose([], 2) == [50, 51]
    assert lookup.propose([50], 8) == [51, 3, 4, 60, 61, 1, 2, 3]


def test_repeats_a_loop_as_far_as_it_is_known() -> None:
    assert Lookup([7, 8, 7, 8, 7, 8]).propose([], 4) == [7, 8]
    assert Lookup([7]).propose([], 4) == []
    assert Lookup([7, 8]).propose([7], 4) == []


def test_a_long_prompt_comes_in_over_several_calls() -> None:
    generator = random.Random(0)
    prompt = [generator.randrange(30_000) for _ in range(5_000)]
    lookup = Lookup([*prompt, *prompt[4_000:4_010]])
    calls = [lookup.propose([], 3) for _ in range(3)]
    assert calls == [[], prompt[4_010:4_013], prompt[4_010:4_013]]
