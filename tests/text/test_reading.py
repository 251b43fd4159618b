"""What an answer holds does not depend on where its text is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyserve.text.answer import AnswerFormat
from proxyserve.text.pieces import CallArguments, CallBegun, Content, Piece, Reasoning, joined
from proxyserve.text.reasoning import ReasoningMarks
from proxyserve.text.tools.formats import FORMATS, HERMES, LLAMA, ToolFormat, format_of_template
from tests.text import chat_templates
from tests.tiny import CHAT_TEMPLATE

TOOLS = tuple({"type": "function", "function": {"name": name}} for name in ("f", "get_weather"))
THINK = ReasoningMarks()


def read(form: AnswerFormat, texts: Sequence[str]) -> list[Piece]:
    reader = form.reader()
    pieces = [piece for text in texts for piece in reader.push(text)]
    return joined([*pieces, *reader.finish()])


def call(index: int, name: str, arguments: str) -> list[Piece]:
    return [CallBegun(index, name), CallArguments(index, arguments)]


F = '{"name": "f", "arguments": {"a": 1}}'
CASES: list[tuple[str, str, list[Piece]]] = [
    ("hermes", "Just text \n", [Content("Just text \n")]),
    ("hermes", "", []),
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", call(0, "f", '{"a": 1}')),
    (
        "hermes",
        f"Let me see. \n<tool_call>{F}</tool_call>\n<tool_call>\n{F}\n</tool_call>\n",
        [Content("Let me see."), *call(0, "f", '{"a": 1}'), *call(1, "f", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{"x":"}</tool_call>\\"{<tool_call>","y":[{}]}}</tool_call> so',
        [*call(0, "f", '{"x":"}</tool_call>\\"{<tool_call>","y":[{}]}'), Content(" so")],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', call(0, "f", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "f", "id": "7"}</tool_call>', call(0, "f", "{}")),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', call(0, "f", "{}")),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        call(0, "f", '{"a": 1}'),
    ),
    # Cut off, and wrong after the call has begun: still calls.
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "lo', call(0, "f", '{"a": "lo')),
    ("hermes", f"<tool_call>{F}\n</tool_", call(0, "f", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}</tool_call>x', [*call(0, "f", "{}"), Content("x")]),
    # No calls at all.
    *(
        ("hermes", text, [Content(text)])
        for text in (
            "2 <tool_cal",
            "<tool_call>",
            "<tool_call> not JSON </tool_call>",
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            '<tool_call>{"arguments": {}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>',
            '<tool_call>{"name": "f"',
            '{"name": "f", "arguments": {}}',
        )
    ),
    (
        "hermes",
        f"<tool_call> or <tool_call>{F}</tool_call>",
        [Content("<tool_call> or"), *call(0, "f", '{"a": 1}')],
    ),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', call(0, "f", '{"a": 1}')),
    (
        "llama",
        ' {"type": "function", "name": "f", "parameters": {}}; {"name": "f", "arguments": {"a": 1}}',
        [*call(0, "f", "{}"), *call(1, "f", '{"a": 1}')],
    ),
    (
        "llama",
        '<|python_tag|>{"name": "f", "parameters": {}}{"name": "get_weather", "parameters": {}}',
        [*call(0, "f", "{}"), *call(1, "get_weather", "{}")],
    ),
    (
        "llama",
        'Sure: <|python_tag|>{"name": "f", "parameters": {}} done',
        [Content("Sure:"), *call(0, "f", "{}"), Content(" done")],
    ),
    *(
        ("llama", text, [Content(text)])
        for text in (
            ' {"answer": {"name": "f"}}',
            'As JSON: {"name": "f", "parameters": {}}',
            "<|python_tag|>print(1)",
            "<|pyth",
            " \n",
        )
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES, ids=[case[1][:60] for case in CASES])
def test_calls_however_the_text_is_cut(name: Any, text: str, expected: list[Piece]) -> None:
    form = AnswerFormat(tool_format=FORMATS[name], tools=TOOLS)
    assert read(form, [text]) == expected
    assert read(form, text) == expected, "character by character"
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == expected


REASONED: list[tuple[bool, str, list[Piece]]] = [
    (
        False,
        "<think>\nHm.\n\nYes.\n</think>\n\nIt is so.\n",
        [Reasoning("Hm.\n\nYes."), Content("It is so.\n")],
    ),
    (True, "\nHm.\n</think>\nIt is so.", [Reasoning("Hm."), Content("It is so.")]),
    (True, "</think>\n\nIt is so.", [Content("It is so.")]),
    (False, "\n\nIt is <think>so</think>.", [Content("\n\nIt is <think>so</think>.")]),
    (False, " <think>Hm.</think>", [Reasoning("Hm.")]),
    (False, "<thin", [Content("<thin")]),
    (True, "Hm </thi", [Reasoning("Hm </thi")]),
    (False, "", []),
]


@pytest.mark.parametrize(("inside", "text", "expected"), REASONED, ids=[case[1] for case in REASONED])
def test_reasoning_however_the_text_is_cut(inside: bool, text: str, expected: list[Piece]) -> None:
    form = AnswerFormat(reasoning=THINK, thinking=inside)
    assert read(form, [text]) == expected
    assert read(form, text) == expected
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == expected


def test_calls_inside_reasoning_are_thoughts() -> None:
    form = AnswerFormat(THINK, thinking=True, tool_format=HERMES, tools=TOOLS)
    thought = f"I could say <tool_call>{F}</tool_call>."
    text = f"{thought}</think>\n\n<tool_call>\n{F}\n</tool_call>"
    assert read(form, text) == [Reasoning(thought), *call(0, "f", '{"a": 1}')]


def test_special_tokens_are_taken_out_unless_they_are_marks() -> None:
    special = frozenset({"<|eot|>", "<|python_tag|>", "<|pad|>"})
    form = AnswerFormat(tool_format=LLAMA, tools=TOOLS).with_special_tokens(special)
    assert form.special_marks
    text = '<|pad|>Hi<|eot|><|python_tag|>{"name": "f", "parameters": {}}<|eot|>'
    assert read(form, text) == read(form, [text]) == [Content("Hi"), *call(0, "f", "{}")]
    assert not AnswerFormat(tool_format=HERMES, tools=TOOLS).with_special_tokens(special).special_marks


def slow_calls(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """What a well-formed Hermes answer holds: content and calls, found in the whole text at once."""
    pattern = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>\s*", re.DOTALL)
    found = [json.loads(match) for match in pattern.findall(text)]
    return pattern.sub("", text), [(entry["name"], entry[form.arguments]) for entry in found]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[]<>/, \n\u00e9\U0001f642', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('ab{}"', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


ARGUMENTS = st.dictionaries(st.text("ab", max_size=2), VALUES, max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(st.text("ab", max_size=2), VALUES)),
        max_size=3,
    ),
    st.text("<tol_ca>{} ", max_size=12).filter(
        lambda text: "<tool_call>" not in text and text.strip() == text
    ),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
)
def test_reader_agrees_with_a_slow_one(
    calls: list[tuple[str, Any]], before: str, cuts: list[int], ascii_only: bool
) -> None:
    objects = [
        json.dumps({"name": name, "arguments": value}, ensure_ascii=ascii_only) for name, value in calls
    ]
    text = before + "".join(f"\n<tool_call>\n{entry}\n</tool_call>" for entry in objects)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = read(
        AnswerFormat(tool_format=HERMES, tools=TOOLS),
        [text[start:end] for start, end in pairwise(places)],
    )
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    names = [piece.name for piece in pieces if isinstance(piece, CallBegun)]
    arguments = [json.loads(piece.text) for piece in pieces if isinstance(piece, CallArguments)]
    assert (content, list(zip(names, arguments, strict=True))) == slow_calls(HERMES, text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text('<>/tol_ca|pyhng{}":;fname, \n', max_size=60),
    st.sampled_from([HERMES, LLAMA]),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_any_text_reads_the_same_however_it_is_cut(text: str, form: ToolFormat, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in pairwise(places)]
    answer = AnswerFormat(THINK, tool_format=form, tools=TOOLS)
    whole = read(answer, [text])
    assert read(answer, parts) == whole
    if not any(isinstance(piece, CallBegun | Reasoning) for piece in whole) and "<think>" not in text:
        assert "".join(piece.text for piece in whole if isinstance(piece, Content)) == text


def test_form_of_a_template() -> None:
    assert format_of_template(chat_templates.HERMES) is HERMES
    assert format_of_template(chat_templates.LLAMA) is LLAMA
    assert format_of_template(CHAT_TEMPLATE) is None
