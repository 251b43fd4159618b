"""Which tokens may come: against a slow twin, and by what texts come of it."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs
import pytest
import torch
from llguidance import LLMatcher

from proxyserve.config import GrammarLimits
from proxyserve.engine.constraint import ConstraintFailed
from proxyserve.grammar import grammar as forms
from proxyserve.grammar.compiler import GrammarCompiler
from proxyserve.grammar.constraint import CompiledGrammar, GrammarConstraint
from proxyserve.grammar.grammar import Grammar, Tag
from proxyserve.grammar.table import TokenTable
from proxyserve.grammar.workers import MaskWorkers
from proxyserve.text.tokenizer import Tokenizer
from tests.grammar.twin import SpellingTwin
from tests.grammar.walks import allowed, text_of, walk

LIMITS = GrammarLimits()
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


def compiled(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
    return compiler.compile(grammar).result()


def schema(document: Any) -> Grammar:
    return forms.json_schema(document, LIMITS, "schema")


# The twin ---------------------------------------------------------------------------------------------------------

GRAMMARS = {
    "schema": schema({"type": "array", "items": {"enum": ["The quick", "ja", 12, None]}, "maxItems": 3}),
    "regex": forms.regex(r"(Zwölf|日本)+ [0-9]{2,3}(name|na|n)?", LIMITS, "regex"),
    "choice": forms.choice(["The", "The quick", "The quick brown", "🙂", 'a"/\\\n'], LIMITS, "choice"),
    "lark": forms.lark(
        'start: pair ("," pair)*\npair: WORD "=" NUMBER\nWORD: /[a-z]+/\nNUMBER: /[0-9]+/', LIMITS, "g"
    ),
    "tags": forms.tags([Tag("<tool_call>", POINT, "<|end|>"), Tag("<|call|>", POINT, "</x>")], LIMITS, "t"),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_mask_is_what_can_be_spelt(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    """A token may come if its bytes, one after another, can go on from the text."""
    grammar, chance, seen = GRAMMARS[name], random.Random(5), 0
    for _ in range(3):
        twin = SpellingTwin(grammar, TokenTable.of(tokenizer), tokenizer.eos_ids)
        constraint = compiled(compiler, grammar).start()
        for _ in range(12):
            may = allowed(constraint.mask())
            assert set(may) == twin.allowed()
            seen += len(may) > 1
            token = chance.choice(may)
            constraint.advance(token)
            if token in tokenizer.eos_ids:
                assert constraint.complete
                break
            twin.advance(token)
            assert constraint.complete == twin.complete
            if constraint.complete:
                break
    assert seen > 3, "there was something to choose"


def test_regex_against_re(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """The same question answered by Python's own `re`, for all texts of a small alphabet."""
    expression = r"(ab?|ba)*c{2,3}"
    constrains = compiled(compiler, forms.regex(expression, LIMITS, "regex"))
    ids = {letter: tokenizer.token_to_id[letter] for letter in "abc"}
    (end,) = tokenizer.eos_ids
    texts = {"": constrains.start()}
    whole = 0
    for _ in range(6):
        longer = {}
        for text, constraint in texts.items():
            may = set(allowed(constraint.mask())) if not constraint.complete else {end}
            assert (end in may) == (re.fullmatch(expression, text) is not None), text
            whole += end in may
            for letter, token in ids.items():
                if token in may:
                    again = constrains.start()
                    for earlier in text:
                        again.advance(ids[earlier])
                    again.advance(token)
                    longer[text + letter] = again
        texts = longer
    assert whole > 5


# Texts ------------------------------------------------------------------------------------------------------------

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    POINT,
    {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
    },
    {"type": "integer", "minimum": -7, "maximum": 1012},
    {"type": "integer", "multipleOf": 7, "exclusiveMinimum": 0, "maximum": 5000},
    {"type": "number", "minimum": 0.25, "exclusiveMaximum": 3},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,3}-[0-9]+$", "maxLength": 9},
    {"type": "string", "pattern": "b+", "maxLength": 6},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {
        "type": "array",
        "prefixItems": [{"const": 1}, {"type": "null"}],
        "items": {"type": "boolean"},
        "maxItems": 5,
    },
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"a": True},
        "additionalProperties": {"type": "null"},
        "required": ["a"],
    },
    {"anyOf": [{"type": "null"}, {"allOf": [POINT, {"properties": {"x": {"maximum": 3}}}]}]},
    {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "boolean"}]},
    {"enum": ['ä\u0000\n"', {"k": [1.5, None]}, "日本語"]},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
]


@pytest.mark.parametrize("document", SCHEMAS, ids=lambda document: json.dumps(document)[:40])
def test_random_texts_are_valid(
    compiler: GrammarCompiler, tokenizer: Tokenizer, document: dict[str, Any]
) -> None:
    constrains = compiled(compiler, schema(document))
    validator = jsonschema_rs.Draft202012Validator(document, validate_formats=True)
    found = 0
    for seed in range(12):
        tokens = walk(constrains.start(), random.Random(seed), 160, sorted(tokenizer.eos_ids))
        if tokens is not None:
            text = text_of(tokenizer, tokens)
            assert validator.is_valid(json.loads(text)), text
            found += 1
    assert found > 2


def test_white_space_comes_to_an_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    pretty = json.dumps({"x": 1}, indent=2)
    for text, outcome in [
        (pretty, "whole"),
        ('{"x": 1 }', "whole"),
        ('{"x":1}', "whole"),
        ('{\n"x"\n:\n1\n}', "whole"),
        ("{\n" + " " * 32, "goes on"),
        ("{\n" + " " * 33, "not  "),
        ("{  ", "not  "),
        ("{\n\n", "not \n"),
    ]:
        constraint = compiled(compiler, schema(POINT)).start()
        assert spoken(tokenizer, constraint, *text) == outcome, text


def spoken(tokenizer: Tokenizer, constraint: GrammarConstraint, *parts: str) -> str:
    """Say the parts, special tokens among them; what then holds: the rest of what cannot be said, or whether the text
    may end or must."""
    for part in parts:
        named = tokenizer.token_to_id.get(part)
        tokens = (
            [named]
            if named is not None and tokenizer.is_special(named)
            else tokenizer.encode(part, add_special_tokens=False)
        )
        for number, token in enumerate(tokens):
            if constraint.complete or token not in allowed(constraint.mask()):
                return f"not {tokenizer.decode(tokens[number:], skip_special_tokens=False)}"
            constraint.advance(token)
    if constraint.complete:
        return "whole"
    return "may end" if tokenizer.eos_ids <= set(allowed(constraint.mask())) else "goes on"


CALL = '<tool_call>\n{"x": 1}\n</tool_call>'


@pytest.mark.parametrize(
    ("options", "parts", "outcome"),
    [
        ({}, ["Hello <tool_cal"], "may end"),
        ({}, ["Hello", "<|end|>", "again", "<|call|>"], "may end"),  # no trigger here, so no call
        ({}, [f"Hello {CALL} and {CALL} bye"], "may end"),
        ({}, ["Hello <tool_call>Hello"], "not Hello"),
        ({}, ['Hello <tool_call>{"x": 1}', "<|end|>"], "not <|end|>"),
        ({}, ['Hello <tool_call>{"x": '], "goes on"),
        ({"least": 1}, ["Hello"], "goes on"),
        ({"least": 1}, [f"Hello {CALL} bye"], "may end"),
        ({"least": 1, "most": 1}, ["Hello"], "goes on"),
        ({"most": 1}, [f"Hello {CALL}", "<tool_call>"], "not <tool_call>"),
        ({"free": False, "least": 1}, ["H"], "not H"),
        ({"free": False, "least": 1}, [""], "goes on"),
        ({"free": False, "least": 1}, [f"{CALL}\n{CALL}"], "may end"),
        ({"free": False, "least": 1, "most": 1}, [CALL], "whole"),
        ({"free": False, "least": 2, "most": 2}, [CALL], "goes on"),
        ({"free": False}, [""], "may end"),
    ],
    ids=str,
)
def test_tags(
    compiler: GrammarCompiler, tokenizer: Tokenizer, options: dict[str, Any], parts: list[str], outcome: str
) -> None:
    grammar = forms.tags([Tag("<tool_call>", POINT, "</tool_call>")], LIMITS, "tags", **options)
    assert spoken(tokenizer, compiled(compiler, grammar).start(), *parts) == outcome


def test_tags_with_shared_triggers_and_special_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    named = forms.tags(
        [Tag("<f=a>", POINT, "</f>"), Tag("<f=b>", {"type": "string"}, "</f>")], LIMITS, "t", triggers=["<f="]
    )
    for text, outcome in [('x<f=a>{"x":1}</f>', "may end"), ('x<f=b>"n"</f>', "may end"), ("<f=c", "not c")]:
        assert spoken(tokenizer, compiled(compiler, named).start(), text) == outcome
    tokens = forms.tags([Tag("<|call|>", POINT, "<|end|>")], LIMITS, "t")
    said = [(["hi", "<|end|>", "ho"], "may end"), (["hi", "<|call|>", '{"x":2}', "<|end|>", "ho"], "may end")]
    for parts, outcome in [*said, (["<|call|>", "ho"], "not ho")]:
        assert spoken(tokenizer, compiled(compiler, tokens).start(), *parts) == outcome


# The end of the text ----------------------------------------------------------------------------------------------


def test_every_end_may_come_where_the_text_is_whole(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    ends = {tokenizer.token_to_id["<|end|>"], *tokenizer.eos_ids}
    constrains = compiled(compiler, forms.regex("[0-9]+", LIMITS, "regex")).ending_with({*ends, 10**9})
    constraint = constrains.start()
    assert not ends & set(allowed(constraint.mask()))
    constraint.advance(tokenizer.token_to_id["7"])
    assert ends <= set(allowed(constraint.mask()))
    constraint.advance(min(ends))
    assert constraint.complete


def test_an_end_that_the_grammar_names_is_no_dead_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    end = tokenizer.token_to_id["<|end|>"]
    grammar = forms.lark('start: "7" <|end|> "8"', LIMITS, "grammar")
    constraint = compiled(compiler, grammar).ending_with({end}).start()
    constraint.advance(tokenizer.token_to_id["7"])
    assert allowed(constraint.mask()) == [end]


def test_a_token_that_may_not_come_fails_the_choice_alone(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constrains = compiled(compiler, forms.choice(["yes", "no"], LIMITS, "choice"))
    broken, sound = constrains.start(), constrains.start()
    broken.advance(tokenizer.token_to_id["x"])
    assert not broken.complete
    masks = torch.zeros((2, 13), dtype=torch.int32)
    for _ in range(2):
        with pytest.raises(ConstraintFailed, match="error"):
            broken.mask()
        with pytest.raises(ConstraintFailed):
            GrammarConstraint.fill([sound, broken], masks, [0, 1])
    assert allowed(sound.mask())


@pytest.mark.parametrize("threads", [1, 3])
def test_filled_together_as_alone(compiler: GrammarCompiler, tokenizer: Tokenizer, threads: int) -> None:
    """Masks of many choices at once, of several grammars and buffers wider and narrower than the vocabulary."""
    workers = MaskWorkers(TokenTable.of(tokenizer).words, threads)
    for width in (9, 12, 20):
        together, alone = [], []
        for seed, grammar in enumerate(list(GRAMMARS.values()) * 2):
            pair = [compiled(compiler, grammar).start() for _ in range(2)]
            pair[0]._workers = workers
            chance = random.Random(seed)
            for _ in range(seed):
                if not pair[1].complete:
                    token = chance.choice(allowed(pair[1].mask()))
                    for constraint in pair:
                        constraint.advance(token)
            if not pair[1].complete:
                together.append(pair[0])
                alone.append(pair[1])
        assert len(together) > 4
        masks = torch.full((len(together) + 2, width), 77, dtype=torch.int32)
        rows = list(range(len(together), 0, -1))
        for _ in range(2):  # the second time nothing is left to compute
            GrammarConstraint.fill(together, masks, rows)
            for constraint, row in zip(alone, rows, strict=True):
                expected = torch.zeros(width, dtype=torch.int32)
                own = constraint.mask()[:width]
                expected[: len(own)] = own
                assert torch.equal(masks[row], expected)
        assert (masks[0] == 77).all() and (masks[-1] == 77).all()


def test_two_ids_of_the_same_bytes_both_may_come() -> None:
    table = TokenTable((b"a", b"a", b"", b"b"), frozenset())
    matcher = LLMatcher(table.tokenizer(), 'start: "a"\n%llguidance {"no_forcing": true}', log_level=0)
    constraint = CompiledGrammar(matcher, table, MaskWorkers(table.words), frozenset()).start()
    assert allowed(constraint.mask()) == [0, 1]


def test_a_vocabulary_of_whole_words_of_bits() -> None:
    """The place that stands for the end lies in a word of its own then, which is no part of the mask."""
    table = TokenTable(tuple(bytes([byte]) for byte in range(64)), frozenset())
    assert table.words == 3
    matcher = LLMatcher(table.tokenizer(), 'start: /1+/\n%llguidance {"no_forcing": true}', log_level=0)
    constraint = CompiledGrammar(matcher, table, MaskWorkers(table.words), frozenset({2})).start()
    constraint.advance(ord("1"))
    assert constraint.mask().shape == (2,)
    assert allowed(constraint.mask()) == [2, ord("1")]


# Coming back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAMMARS)
def test_tokens_taken_back_leave_nothing(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    """As fresh with the kept tokens: also after the text was whole and its end was said, after tokens that may not
    come, and whether masks were asked for on the way or not."""
    constrains, chance = compiled(compiler, GRAMMARS[name]), random.Random(11)
    met = dict.fromkeys(("ended", "stopped", "broken"), 0)
    for _ in range(8):
        constraint, kept = constrains.start(), list[int]()
        for _ in range(40):
            over = constraint.complete or constraint._matcher.is_error()
            if chance.random() < (0.8 if over else 0.25):
                count = min(chance.choice((1, 1, 2, 7)), len(kept))
                met["ended"] += bool(constraint._over)
                met["broken"] += constraint._matcher.is_error()
                met["stopped"] += constraint.complete and not constraint._over
                constraint.rollback(count)
                del kept[len(kept) - count :]
            else:
                may = [] if over else allowed(constraint.mask())
                ends = [token for token in sorted(tokenizer.eos_ids) if token in may]
                # The lowest often: signs, which lead on where letters go round in circles.
                token = chance.choice(ends or [*may[:1], chance.choice(may or [5])])
                token = token if chance.random() < 0.95 else chance.randrange(300)
                constraint.advance(token)
                kept.append(token)
            fresh = constrains.start()
            for token in kept:
                fresh.advance(token)
            if chance.random() < 0.7:
                assert outlook(constraint) == outlook(fresh)
    assert met["broken"] and met["ended"] + met["stopped"], "there was something to come back from"


def outlook(constraint: GrammarConstraint) -> tuple[bool, list[int] | str]:
    """Whether it is complete, and what may come next."""
    if constraint.complete:
        return True, []
    try:
        return False, allowed(constraint.mask())
    except ConstraintFailed:
        return False, "failed"
