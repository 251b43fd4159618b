"""Chat templates: the same text as transformers makes, and no way out of the sandbox."""

from __future__ import annotations

import re
from typing import Any

import pytest

from proxyserve.errors import InvalidRequest
from proxyserve.text import sandbox
from proxyserve.text.templates import ChatTemplate
from proxyserve.text.tokenizer import Tokenizer
from tests.text import chat_templates
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is <outside> & über all",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.5], "now": True}},
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "How is the weather in Köln?"},
]
ROUND = [
    *TALK,
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "They want\nthe weather."},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "grey"}'},
]
ANSWERED = [*ROUND, {"role": "assistant", "content": "Grey. "}, {"role": "user", "content": "Thanks"}]
TEMPLATES = {
    "hermes": chat_templates.HERMES,
    "llama": chat_templates.LLAMA,
    "thinking": chat_templates.THINKING,
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", [TALK, ROUND, ANSWERED], ids=["question", "result", "answered"])
def test_renders_as_transformers_does(
    source: str, tools: list[dict[str, Any]] | None, messages: list[dict[str, Any]]
) -> None:
    theirs = make_tokenizer()
    theirs.chat_template = source
    theirs.add_special_tokens({"bos_token": "<|begin|>"})
    ours = Tokenizer(theirs)
    template = ours.chat_template()
    assert template is not None
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        for variables in ({}, {"enable_thinking": False, "reasoning_effort": "low"}):
            expected = theirs.apply_chat_template(
                messages, tools=tools, tokenize=False, **options, **variables
            )
            text = template.render(
                messages, tools=tools, variables={**variables, **ours.template_variables}, **options
            )
            assert text == expected


@pytest.mark.parametrize("source", [chat_templates.HERMES, chat_templates.LLAMA], ids=["keeps", "trims"])
@pytest.mark.parametrize("content", ["The sky is", "The sky is ", ""])
def test_continues_the_last_message_as_transformers_does(source: str, content: str) -> None:
    theirs = make_tokenizer()
    theirs.chat_template = source
    theirs.add_special_tokens({"bos_token": "<|begin|>"})
    messages = [*TALK, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    text = ChatTemplate(source).render(
        messages,
        add_generation_prompt=False,
        continue_final_message=True,
        variables=Tokenizer(theirs).template_variables,
    )
    assert text == expected


def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(InvalidRequest) as refused:
        template.render(TALK, continue_final_message=True)
    assert refused.value.param == "continue_final_message"


def test_what_a_template_reads() -> None:
    hermes, thinking = ChatTemplate(chat_templates.HERMES), ChatTemplate(chat_templates.THINKING)
    assert hermes.knows_tools and not thinking.knows_tools
    assert not ChatTemplate(CHAT_TEMPLATE).knows_tools
    assert thinking.reads("enable_thinking") and not hermes.reads("enable_thinking")
    assert not thinking.reads("ns"), "its own"


def test_of_several_templates_the_one_for_tools() -> None:
    theirs = make_tokenizer()
    theirs.chat_template = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    tokenizer = Tokenizer(theirs)
    sources = [
        template.source for tools in (False, True) if (template := tokenizer.chat_template(tools=tools))
    ]
    assert sources == ["plain", "{{ tools | length }} tools"]


GROWING = "{%% set ns = namespace(x='aa') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
ATTACKS = {
    # Time
    "loop": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops in loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "it ran for",
    ),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "it ran for",
    ),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too much"),
    "endless recursion": ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "too much"),
    # Size
    "output": ("{% for i in range(99999) %}" + 20000 * "x" + "{% endfor %}", "makes more than"),
    "product": ("{{ 'a' * 10**10 }}", "makes more than"),
    "list": ("{{ [0] * 10**10 }}", "makes more than"),
    "power": ("{% set x = 10**1000000000 %}", "makes more than"),
    "sum": (GROWING % "{% set ns.x = ns.x + ns.x %}", "makes more than"),
    "joined": (GROWING % "{% set ns.x = ns.x ~ ns.x %}", "makes more than"),
    "printed": (GROWING % "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "makes more than"),
    "replace filter": (GROWING % "{% set ns.x = ns.x | replace('a', ns.x) %}", "makes more than"),
    "replace method": (GROWING % "{% set ns.x = ns.x.replace('a', ns.x) %}", "makes more than"),
    "join filter": (GROWING % "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}", "makes more than"),
    "join method": (GROWING % "{% set ns.x = ns.x.join([ns.x, ns.x]) %}", "makes more than"),
    "center filter": ("{{ 'a' | center(1000000000) }}", "pads to"),
    "center method": ("{{ 'a'.center(1000000000) }}", "pads to"),
    "mapped filter": ("{{ ['a'] | map('center', 1000000000) | list }}", "pads to"),
    "indent": ("{{ 'a\n' | indent(1000000000) }}", "pads to"),
    "tojson": ("{{ messages | tojson(indent=1000000000) }}", "pads to"),
    "tabs": ("{{ '\t'.expandtabs(1000000000) }}", "pads to"),
    "percent": ("{{ '%1000000000d' % 1 }}", "pads to"),
    "format filter": ("{{ '%1000000000d' | format(1) }}", "pads to"),
    "format method": ("{% set x = '{0:>' ~ '1000000000}' %}{% set f = x.format %}{{ f(1) }}", "pads to"),
    "nested format": ("{{ '{0:>{1}}'.format(1, 1000000000) }}", "pads to"),
    # Escape
    "class": ("{{ ''.__class__.__mro__ }}", "no template may do"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "no template may do"),
    "attribute filter": ("{{ (''|attr('__class__')).__mro__ }}", "no template may do"),
    "format attribute": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "no template may do"),
    "change": ("{{ messages.append(1) }}", "no template may do"),
    "namespace": ("{{ namespace(__class__=1) }}", "no template may do"),
    "import": ("{% import 'os' as os %}", "no loader"),
    # Mistakes
    "syntax": ("{% if %}", "cannot be used"),
    "raise": ("{{ raise_exception('no tools please') }}", "no tools please"),
    "zero": ("{{ 1 / 0 }}", "division by zero"),
    "undefined": ("{{ messages[0].content.nothing.more }}", "no attribute"),
}


@pytest.mark.parametrize(("source", "words"), ATTACKS.values(), ids=ATTACKS)
def test_attack_ends_in_a_refusal(source: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    with pytest.raises(InvalidRequest, match=re.escape(words)) as refused:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert refused.value.param == "messages"


def test_messages_cannot_bring_templates() -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")
    content = "{{ ''.__class__ }}{% for i in range(9) %}{% endfor %}{{ bounds__tick }}"
    assert template.render([{"role": "user", "content": content}]) == content
