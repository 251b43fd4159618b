"""What the grammars of tool calls allow is what the parsers read."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from proxyserve.text.answer import AnswerFormat
from proxyserve.text.pieces import CallBegun, Content
from proxyserve.text.tools.formats import HERMES, LLAMA, ToolFormat
from proxyserve.text.tools.grammar import forced_calls, free_calls
from tests.text.test_reading import read

BYTES = LLTokenizer("byte")
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", 'So "called"']}},
}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
LOOSE = {
    "type": "function",
    "function": {"name": "look", "parameters": {"properties": {"x": {"format": "?"}}}},
}
NOTHING = {"type": "function", "function": {"name": "time"}}
TOOLS = (STRICT, LOOSE, NOTHING)


def allows(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(form: ToolFormat, *calls: tuple[str, Any]) -> str:
    """As the model is shown earlier calls."""
    return form.written([{"function": {"name": name, "arguments": value}} for name, value in calls])


PARIS, QUOTED = ("weather", {"city": "Paris"}), ("weather", {"city": 'So "called"'})


@pytest.mark.parametrize("form", [HERMES, LLAMA], ids=lambda form: form.name)
def test_forced_calls(form: ToolFormat) -> None:
    one = forced_calls(form, TOOLS, several=False, special={})
    more = forced_calls(form, TOOLS, several=True, special={})
    for calls in ([PARIS], [QUOTED], [("time", {})], [("look", {"x": "y", "z": [1]})], [PARIS, ("time", {})]):
        text = written(form, *calls)
        assert allows(more, text)
        assert allows(one, text) == (len(calls) == 1)
        pieces = read(AnswerFormat(tool_format=form, tools=TOOLS), text)
        assert [piece.name for piece in pieces if isinstance(piece, CallBegun)] == [name for name, _ in calls]
        assert not any(isinstance(piece, Content) for piece in pieces)
    for text in (
        "",
        "Hello",
        written(form, ("weather", {"city": "Rome"})),
        written(form, ("time", {"a": 1})),
        written(form, ("ghost", {})),
        written(form, PARIS)[:-3],
        written(form, PARIS) + " and so on",
    ):
        assert not allows(more, text)


@pytest.mark.parametrize("form", [HERMES, LLAMA], ids=lambda form: form.name)
def test_calls_or_an_answer(form: ToolFormat) -> None:
    answer = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"]}
    grammar = forced_calls(form, TOOLS, several=True, special={}, otherwise=answer)
    assert allows(grammar, written(form, PARIS))
    assert allows(grammar, '{"sky": "grey"}')
    assert not allows(grammar, '{"sky": 1}')
    assert not allows(grammar, "grey")


def test_free_calls_keep_to_strict_schemas() -> None:
    hermes, llama = free_calls(HERMES, TOOLS, special={}), free_calls(LLAMA, TOOLS, special={})
    for text in ("", "Hello {", "a <tool_cal", "Let me look.\n" + written(HERMES, PARIS) + "\nThere."):
        assert allows(hermes, text)
    for text in (
        "",
        "Hello {",
        written(LLAMA, PARIS, ("time", {"any": 1})),
        "<|python_tag|>" + written(LLAMA, PARIS),
    ):
        assert allows(llama, text)
    bad = ("weather", {"city": "Rome"})
    assert not allows(hermes, "Hm " + written(HERMES, bad))
    assert not allows(hermes, '<tool_call>\n{"name": "ghost"')
    assert not allows(llama, written(LLAMA, bad))
    assert not allows(llama, '{"answer": 1}')
    # Not strict: any object will do.
    assert allows(hermes, written(HERMES, ("time", {"any": 1})))


def test_special_tokens_are_named_by_id() -> None:
    special = {"<tool_call>": 7, "</tool_call>": 8, "<|python_tag|>": 9}
    assert "<[7]>" in forced_calls(HERMES, TOOLS, several=True, special=special)
    assert "<[8]>" in free_calls(HERMES, TOOLS, special=special)
    for grammar in (
        forced_calls(LLAMA, TOOLS, several=True, special=special),
        free_calls(LLAMA, TOOLS, special=special),
    ):
        assert "<[9]>" in grammar
        assert "python_tag" not in grammar


def test_requests_cannot_switch_enforcement_off() -> None:
    sly = {
        **STRICT,
        "function": {**STRICT["function"], "parameters": {**CITY, "x-guidance": {"lenient": True}}},
    }
    grammar = forced_calls(HERMES, (sly,), several=False, special={})
    assert '"lenient": true' not in grammar
