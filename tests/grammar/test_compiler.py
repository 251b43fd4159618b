"""Beside the step loop: hostile grammars, the helper process, what is kept."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxyserve.config import EngineConfig, GrammarLimits
from proxyserve.engine.engine import Engine
from proxyserve.errors import InvalidRequest, NotReady, QueueFull
from proxyserve.grammar import grammar as forms
from proxyserve.grammar.compiler import GrammarCompiler
from proxyserve.grammar.grammar import Grammar
from proxyserve.models.model_set import ModelSet
from proxyserve.text.tokenizer import Tokenizer
from tests.api.live import wait_until
from tests.engine.driver import submission

LIMITS = GrammarLimits()
#: Compiles for many seconds.
SLOW = forms.json_schema({"type": "integer", "multipleOf": 9_999_991}, LIMITS, "slow")


@contextmanager
def compiling(
    tokenizer: Tokenizer, outcomes: list[str] | None = None, **limits: Any
) -> Iterator[GrammarCompiler]:
    """`outcomes` gets what came of each request, with `!` where something was compiled."""
    seen = [] if outcomes is None else outcomes

    def observe(outcome: str, seconds: float | None) -> None:
        seen.append(outcome if seconds is None else f"{outcome}!")

    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids, replace(LIMITS, **limits), observe=observe)
    try:
        yield compiler
    finally:
        compiler.close()
        assert compiler.gatekeeper.pid is None


def refusal(future: Future[Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        future.result(timeout=60)
    return error.value


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


# At a glance ------------------------------------------------------------------------------------------------------

GLANCES: list[tuple[Any, str]] = [
    (lambda: forms.json_schema(nested(63), LIMITS, "f"), ""),
    (lambda: forms.json_schema(nested(64), LIMITS, "f"), "64 levels"),
    (lambda: forms.json_schema(nested(900), LIMITS, "f"), "64 levels"),
    (lambda: forms.json_schema({"enum": list(range(5001))}, LIMITS, "f"), "5001 values"),
    (lambda: forms.json_schema({"const": {"enum": list(range(5001)), "$ref": "x"}}, LIMITS, "f"), ""),
    (lambda: forms.json_schema({"properties": {str(i): {} for i in range(5001)}}, LIMITS, "f"), "5001 prop"),
    (lambda: forms.json_schema({"properties": {"properties": {"enum": "x"}, "$ref": {}}}, LIMITS, "f"), ""),
    (lambda: forms.json_schema({"title": "x" * 2**18}, LIMITS, "f"), "characters"),
    (lambda: forms.json_schema({"items": {"pattern": "a" * 5000}}, LIMITS, "f"), "f: pattern"),
    (lambda: forms.json_schema({"$ref": "http://example.org/s"}, LIMITS, "f"), "nothing is fetched"),
    (lambda: forms.json_schema({"items": {"$ref": "file:///etc/passwd"}}, LIMITS, "f"), "nothing is fetched"),
    (lambda: forms.json_schema({"x-guidance": {"lenient": True}}, LIMITS, "f"), "x-guidance"),
    (lambda: forms.regex("", LIMITS, "f"), "empty"),
    (lambda: forms.regex("a" * 4097, LIMITS, "f"), "4097"),
    (lambda: forms.regex("\udc00", LIMITS, "f"), "surrogate"),
    (lambda: forms.choice([], LIMITS, "f"), "empty"),
    (lambda: forms.choice(["a", ""], LIMITS, "f"), "f[1]"),
    (lambda: forms.choice(["a"] * 1025, LIMITS, "f"), "1025 choices"),
    (lambda: forms.lark('root ::= "a"', LIMITS, "f"), "GBNF"),
    (lambda: forms.lark("start: /::=/", LIMITS, "f"), ""),
    (lambda: forms.tags([forms.Tag("<a>", {}, "</a>")], LIMITS, "f", triggers=["<b"]), "exactly one"),
    (lambda: forms.tags([forms.Tag("<a>", {}, "</a>")], LIMITS, "f", triggers=["<", "<a"]), "exactly one"),
    (lambda: forms.tags([forms.Tag("<a>", {}, "</a>")], LIMITS, "f", least=2, most=1), "impossible"),
    (lambda: forms.tags([forms.Tag("<a>", nested(64), "</a>")], LIMITS, "f"), "64 levels"),
]


@pytest.mark.parametrize(("make", "complaint"), GLANCES)
def test_refused_at_a_glance(make: Any, complaint: str) -> None:
    if not complaint:
        make()
        return
    with pytest.raises(InvalidRequest) as error:
        make()
    assert complaint in error.value.message
    assert error.value.param is not None and error.value.param.startswith("f")


# On trial ---------------------------------------------------------------------------------------------------------


def schema(document: Any) -> Grammar:
    return forms.json_schema(document, LIMITS, "f")


def doubling(keyword: str, levels: int) -> dict[str, Any]:
    """`$ref`s that would unfold to 2**levels parts."""
    defs: dict[str, Any] = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{levels}": {"type": "string"}}}


def either(left: str, right: str) -> dict[str, Any]:
    return {"anyOf": [{"required": [left]}, {"required": [right]}]}


def unfolding(levels: int) -> Grammar:
    rules = [f"A{i}: A{i + 1} A{i + 1}" for i in range(levels)]
    return forms.lark("\n".join(["start: A0", *rules, f'A{levels}: "x"']), LIMITS, "f")


def intersections(letters: str) -> Grammar:
    parts = [f"/.*{letter}.{{2{number}}}/" for number, letter in enumerate(letters)]
    return forms.lark(f"start: A\nA: {' & '.join(parts)}", LIMITS, "f")


#: What must be refused, and with which word; None where it may also pass, as long as it does so soon.
HOSTILE: list[tuple[str, Grammar, str | None]] = [
    ("unknown type", schema({"type": "strin"}), "strin"),
    ("bad value", schema({"minLength": "x"}), "minLength"),
    ("not", schema({"items": {"not": {}}}), "'not'"),
    ("several", schema({"contains": {}, "uniqueItems": True, "type": "array"}), "'contains', 'uniqueItems'"),
    ("dynamic", schema({"$dynamicRef": "#x"}), "$dynamicRef"),
    ("conditional", schema({"if": {}, "then": {}}), "'if', 'then'"),
    ("oneOf", schema({"oneOf": [{"type": "string"}, {"const": "x"}]}), "anyOf"),
    ("format", schema({"type": "string", "format": "credit-card"}), "credit-card"),
    ("dialect", schema({"$schema": "http://example.org/own", "type": "null"}), "nothing is fetched"),
    ("empty law", schema({"type": "integer", "minimum": 3, "maximum": 2}), ""),
    ("no value", schema({"enum": []}), ""),
    ("endless reference", schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no text"),
    ("dangling reference", schema({"$ref": "#/$defs/a"}), "$defs/a"),
    ("doubling allOf", schema(doubling("allOf", 30)), None),
    ("doubling prefixItems", schema(doubling("prefixItems", 30)), None),
    ("doubling anyOf", schema(doubling("anyOf", 30)), None),
    ("all of any", schema({"allOf": [either(f"a{i}", f"b{i}") for i in range(30)]}), ""),
    ("many properties", schema({"properties": {f"p{i}": {} for i in range(1500)}, "type": "object"}), "work"),
    ("large counts", schema({"type": "array", "items": nested(9), "minItems": 10**9}), None),
    ("long string", schema({"type": "string", "minLength": 10**9, "maxLength": 10**15}), None),
    ("large number", schema({"type": "integer", "maximum": 10**300}), None),
    ("NUL", schema({"enum": ["\0", "a\0b"]}), None),
    ("nested stars", forms.regex("(a|a)*{1000}", LIMITS, "f"), None),
    ("nested counts", forms.regex("((((a{1000}){1000}){1000}){1000}){1000}", LIMITS, "f"), None),
    ("states", forms.regex("(.*a.{60}){30}x", LIMITS, "f"), None),
    ("memory of a choice", forms.regex(r"[ab]*a[ab]{2000}", LIMITS, "f"), None),
    ("half a group", forms.regex("(a", LIMITS, "f"), "unclosed group"),
    ("look-ahead", forms.regex("(?=a)b", LIMITS, "f"), "look-around"),
    ("back-reference", forms.regex(r"(a)\1", LIMITS, "f"), "backreferences"),
    ("no text", forms.regex(r"[^\s\S]", LIMITS, "f"), "no text"),
    ("deep groups", forms.regex("(" * 2000 + "a" + ")" * 2000, LIMITS, "f"), ""),
    ("deep rules", forms.lark(f"start: {'(' * 5000}\"a\"{')' * 5000}", LIMITS, "f"), "nested"),
    ("no start", forms.lark('a: "b"', LIMITS, "f"), "start"),
    ("unknown rule", forms.lark("start: a", LIMITS, "f"), '"a"'),
    ("ambiguous", forms.lark('start: s\ns: s s | s s s | "a" | ""', LIMITS, "f"), None),
    ("unfolding", unfolding(40), "big"),
    ("intersections", intersections("abcdefgh"), ""),
    ("file", forms.lark("%import .secrets.INT\nstart: INT", LIMITS, "f"), "secrets"),
    ("no Lark", forms.lark("{\"grammars\": []}", LIMITS, "f"), ""),
    ("NUL in Lark", forms.lark("start: \0", LIMITS, "f"), ""),
    ("sampling", forms.lark("start: a\na[temperature=0.5]: /b/", LIMITS, "f"), "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("grammar", "complaint"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_hostile_grammars_end_soon(
    compiler: GrammarCompiler, grammar: Grammar, complaint: str | None
) -> None:
    begun = time.monotonic()
    helper = compiler.gatekeeper.pid
    future = compiler.compile(grammar)
    if complaint is None:
        future.exception(timeout=60)
    else:
        error = refusal(future)
        assert complaint in error.message
        assert error.message.startswith("'f' ") and len(error.message) < 600
        assert error.param == "f"
    assert time.monotonic() - begun < 15
    assert helper is None or compiler.gatekeeper.pid == helper, "nothing here kills the process"


def test_too_slow_a_grammar_is_given_up(tokenizer: Tokenizer) -> None:
    outcomes: list[str] = []
    with compiling(tokenizer, outcomes, compile_seconds=0.3) as compiler:
        assert "0.3 seconds" in refusal(compiler.compile(SLOW)).message
        begun = time.monotonic()
        assert "0.3 seconds" in refusal(compiler.compile(SLOW)).message
        assert time.monotonic() - begun < 0.25, "it is remembered"
        assert compiler.gatekeeper.pid is None
        compiler.compile(forms.json_object("f")).result(timeout=60)
    assert outcomes == ["timed_out!", "refused", "compiled!"]


def test_too_large_a_grammar_is_given_up(tokenizer: Tokenizer) -> None:
    with compiling(tokenizer, compile_seconds=30.0, compile_memory=8 * 2**20) as compiler:
        assert "memory" in refusal(compiler.compile(SLOW)).message
        compiler.compile(forms.json_object("f")).result(timeout=60)


def kill(compiler: GrammarCompiler, signum: signal.Signals = signal.SIGKILL) -> None:
    """Kill the process and wait until that is known."""
    helper = compiler.gatekeeper.pid
    assert helper is not None
    os.kill(helper, signum)
    wait_until(lambda: compiler.gatekeeper.pid != helper)


def test_the_process_may_be_killed(tokenizer: Tokenizer) -> None:
    with compiling(tokenizer, compile_seconds=30.0) as compiler:
        for number, signum in enumerate((signal.SIGKILL, signal.SIGSEGV)):
            compiler.compile(forms.regex(f"a{number}", LIMITS, "f")).result(timeout=60)
            kill(compiler, signum)
        long = compiler.compile(forms.json_schema({"type": "integer", "multipleOf": 19_997}, LIMITS, "f"))
        wait_until(lambda: compiler.gatekeeper.pid)
        kill(compiler)  # while it starts or works: somebody else's doing
        long.result(timeout=60)
        slow = compiler.compile(SLOW)
        while not slow.done():  # every time: the grammar's doing
            if compiler.gatekeeper.pid is not None:
                kill(compiler)
        assert isinstance(slow.exception(), InvalidRequest | NotReady)
        compiler.compile(forms.json_object("f")).result(timeout=60)


# What is kept -----------------------------------------------------------------------------------------------------


def test_equal_grammars_are_compiled_once(tokenizer: Tokenizer) -> None:
    outcomes: list[str] = []
    with compiling(tokenizer, outcomes) as compiler:
        futures = [compiler.compile(forms.json_object(f"field {n}")) for n in range(50)]
        assert len({id(future.result(timeout=60)) for future in futures}) == 1
        assert sorted(outcomes) == ["cached"] * 49 + ["compiled!"]
        bad = [compiler.compile(forms.regex("(", LIMITS, f"field {n}")) for n in range(3)]
        assert [refusal(future).param for future in bad] == ["field 0", "field 1", "field 2"]


def test_what_was_used_last_is_kept(tokenizer: Tokenizer) -> None:
    def ask(text: str) -> Any:
        return compiler.compile(forms.regex(text, LIMITS, "f")).result(timeout=60)

    outcomes: list[str] = []
    with compiling(tokenizer, outcomes, max_cached=2) as compiler:
        first = ask("a")
        ask("b")
        assert ask("a") is first
        ask("c")  # instead of b
        assert ask("a") is first
        ask("b")
        assert outcomes.count("compiled!") == 4
    with compiling(tokenizer, max_cached_bytes=0) as compiler:
        assert ask("a") is not ask("a")


def test_only_so_many_wait(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, (), replace(LIMITS, max_waiting=2, compile_seconds=60.0))
    waiting = [compiler.compile(SLOW), compiler.compile(forms.json_object("f"))]
    compiler.compile(SLOW)  # waits with the first
    with pytest.raises(QueueFull):
        compiler.compile(forms.regex("a", LIMITS, "f"))
    assert waiting[1].cancel(), "who asked has left"
    compiler.close()
    with pytest.raises(NotReady):
        waiting[0].result(timeout=60)
    with pytest.raises(NotReady):
        compiler.compile(forms.regex("a", LIMITS, "f"))
    compiler.close()


def test_steps_go_on_while_a_hostile_grammar_compiles(tiny_models: ModelSet) -> None:
    engine = Engine(tiny_models, EngineConfig(max_batch=8, max_batch_tokens=64, kv_memory=4 * 2**20))
    tokenizer = tiny_models.base.tokenizer
    with compiling(tokenizer, compile_seconds=1.0) as compiler:
        compiler.compile(forms.json_object("f")).result(timeout=60)
        hostile = compiler.compile(SLOW)
        steps, longest = 0, 0.0
        while not hostile.done():
            if not engine.has_work:
                engine.submit(
                    submission(f"r{steps}", tokenizer.encode("The quick"), {"qa": 1.0}, max_tokens=100)
                )
            begun = time.monotonic()
            assert engine.step()
            longest = max(longest, time.monotonic() - begun)
            steps += 1
        assert "1 seconds" in refusal(hostile).message
    assert steps > 5
    assert longest < 0.7, "no step waits for the compiler"


def test_nothing_is_left_behind(tokenizer: Tokenizer) -> None:
    """Threads, open files and processes of a compiler that is gone."""

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = held()
    with compiling(tokenizer, compile_seconds=0.3) as compiler:
        futures = [compiler.compile(forms.regex(f"a{n}", LIMITS, "f")) for n in range(3)]
        chance = random.Random(1)
        for future in futures:
            helper = compiler.gatekeeper.pid
            if helper is not None and chance.random() < 0.7:
                os.kill(helper, signal.SIGKILL)
            future.exception(timeout=60)
        refusal(compiler.compile(SLOW))
    assert held() == before
