"""Grammars in the engine: masked after fusion, each choice for itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest

from proxyserve.config import EngineConfig, GrammarLimits
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import Submission
from proxyserve.grammar import grammar as forms
from proxyserve.grammar.compiler import GrammarCompiler
from proxyserve.grammar.grammar import Grammar
from proxyserve.grammar.table import TokenTable
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason
from tests.engine.driver import run, submission
from tests.grammar.twin import SpellingTwin
from tests.naive import NaiveFusion
from tests.tiny import TinyFamily, make_tokenizer

LIMITS = GrammarLimits()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada Lovelace", "Viktor", "nobody", "Zwölf"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "jobs": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "age", "jobs"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": forms.json_schema(SCHEMA, LIMITS, "schema"),
    "regex": forms.regex("[a-z]{2,5} [0-9]{1,3}", LIMITS, "regex"),
    "choice": forms.choice(["quick", "quickly", "brown"], LIMITS, "choice"),
}
#: White space between the parts of JSON is free, and random models like it too much.
NO_SPACE = {make_tokenizer().get_vocab()[space]: -100.0 for space in "ĠĊĉč"}
PROMPT = (5, 17, 200, 33, 9, 120, 64, 88, 301, 2, 45)


@pytest.fixture(scope="module")
def compiler(tiny_models: ModelSet) -> Iterator[GrammarCompiler]:
    base = tiny_models.base
    compiler = GrammarCompiler(base.tokenizer, base.eos_ids)
    yield compiler
    compiler.close()


def make_engine(models: ModelSet, **config: Any) -> Engine:
    values: dict[str, Any] = {"max_batch": 16, "max_batch_tokens": 64, "kv_memory": 2**21, **config}
    return Engine(models, EngineConfig(**values))


def constrained(compiler: GrammarCompiler, grammar: Grammar, name: str, **options: Any) -> Submission:
    made = submission(name, PROMPT, {"qa": 0.8}, **{"max_tokens": 150, "ignore_eos": False, **options})
    return replace(made, constraints=(compiler.compile(grammar).result(),))


@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy_is_the_best_of_what_may_come(
    tiny_family: TinyFamily, tiny_models: ModelSet, compiler: GrammarCompiler, name: str
) -> None:
    """Against plain forwards in float64 and a twin that spells each token: tokens, the law that log-probs are of, and
    the probability that the grammar took."""
    grammar = GRAMMARS[name]
    (result,) = run(
        make_engine(tiny_models), [constrained(compiler, grammar, "r", max_tokens=25, logprobs=0)]
    ).values()
    naive = NaiveFusion(tiny_family.base, {"qa": (tiny_family.experts["qa"], tiny_family.untuned)})
    base = tiny_models.base
    twin = SpellingTwin(grammar, TokenTable.of(base.tokenizer), base.eos_ids)
    removed = []
    for number, token in enumerate(result.tokens):
        prompt = (*PROMPT, *result.tokens[:number])
        law = naive.greedy({"base": prompt}, {"qa": 0.8}, 1, base.vocabulary.size).laws[0]
        may = sorted(twin.allowed())
        assert token == may[int(law[may].argmax())]
        assert result.logprobs[number].logprob == pytest.approx(float(law[token]), abs=1e-4)
        removed.append(1.0 - float(law[may].exp().sum()))
        if token not in base.eos_ids:
            twin.advance(token)
    assert result.last is not None
    assert result.last.removed_mass == pytest.approx(sum(removed) / len(removed), abs=1e-4)
    if len(result.tokens) < 25:
        assert result.last.finish_reason is FinishReason.STOP
        assert twin.complete or result.tokens[-1] in base.eos_ids


def mixed(compiler: GrammarCompiler) -> list[Submission]:
    """Constrained requests among free ones, n of 1 and 2."""
    found = []
    for seed, grammar in enumerate(GRAMMARS.values()):
        options = {"temperature": 1.0 + 0.3 * seed, "seed": seed, "n": 1 + seed % 2, "logit_bias": NO_SPACE}
        found.append(constrained(compiler, grammar, f"c{seed}", max_tokens=100, **options))
        found.append(submission(f"f{seed}", PROMPT, {"qa": 0.8}, max_tokens=40, **options))
    return found


def test_each_choice_for_itself(tiny_models: ModelSet, compiler: GrammarCompiler) -> None:
    """The same answers in a crowd, alone, and when preempted; what is constrained is valid, what is not is free."""
    submissions = mixed(compiler)
    together = run(make_engine(tiny_models), submissions)
    crowded = make_engine(tiny_models, kv_memory=2**18)
    again = run(crowded, submissions)
    assert crowded.counters.preemptions > 0
    for one in submissions:
        for key, alone in run(make_engine(tiny_models), [one]).items():
            assert together[key].tokens == again[key].tokens == alone.tokens
            last = together[key].last
            assert last is not None
            assert last.finish_reason is (FinishReason.STOP if one.constraints else FinishReason.LENGTH)
            assert (last.removed_mass is None) == (not one.constraints)
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(together["c0/0"].text))
    assert len({tuple(result.tokens) for result in together.values()}) > 6


def test_the_last_token_of_a_whole_text_is_the_last(tiny_models: ModelSet, compiler: GrammarCompiler) -> None:
    """No step is spent on an end that alone may come."""
    (result,) = run(
        make_engine(tiny_models), [constrained(compiler, GRAMMARS["schema"], "r", logit_bias=NO_SPACE)]
    ).values()
    assert result.last is not None
    assert result.last.finish_reason is FinishReason.STOP
    assert result.text.endswith("}")
    assert not tiny_models.base.eos_ids & set(result.tokens)


def test_room_may_be_too_short(tiny_models: ModelSet, compiler: GrammarCompiler) -> None:
    one = constrained(compiler, GRAMMARS["schema"], "r", max_tokens=5)
    (result,) = run(make_engine(tiny_models), [one]).values()
    assert result.last is not None
    assert result.last.finish_reason is FinishReason.LENGTH
    assert result.text.startswith("{")


def test_several_grammars_all_hold(tiny_models: ModelSet, compiler: GrammarCompiler) -> None:
    both = tuple(
        compiler.compile(forms.regex(expression, LIMITS, "regex")).result()
        for expression in ("[a-m]{3,9}", "[h-z]{2,4}|x")
    )
    for seed in range(3):
        one = submission("r", PROMPT, {"qa": 1.0}, temperature=1.5, seed=seed, ignore_eos=False)
        (result,) = run(make_engine(tiny_models), [replace(one, constraints=both)]).values()
        assert set(result.text) <= set("hijklm") and 3 <= len(result.text) <= 4
