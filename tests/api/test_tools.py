"""Tools and reasoning over HTTP: what the prompt says, how answers are written, whole and streamed, and to openai's
client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from proxyserve.config import ChatConfig, Limits, ServerConfig
from proxyserve.engine.submission import Submission
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason, OutputEvent
from tests.api.fakes import FakeEngine, last
from tests.api.live import Live, serve
from tests.text import chat_templates
from tests.tiny import CHAT_TEMPLATE

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "How is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALLED = (
    'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


class Scripted:
    """A server whose model says `text`, in pieces of `width` characters. It has the templates of `chat`."""

    def __init__(self, models: ModelSet, chat: ChatConfig) -> None:
        self.text = ""
        self.width = 3
        self.reason = FinishReason.STOP
        self.engine = FakeEngine(models, self._script)
        self.config = ServerConfig(
            chat=chat, limits=Limits(max_tools=3, max_tool_bytes=4096, max_tool_depth=8)
        )

    async def _script(self, submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        [submission] = submissions
        pieces = [self.text[start : start + self.width] for start in range(0, len(self.text), self.width)]
        for index in range(submission.n):
            for piece in pieces:
                yield OutputEvent(submission.request_id, index, (65,), piece)
            end = last(submission, index=index, tokens=len(pieces) + 1)
            yield replace(end, finish_reason=self.reason)

    @property
    def prompt(self) -> str:
        """The base's prompt of the last request."""
        return self.engine.models.base.tokenizer.decode(self.engine.submitted[-1].prompts.default)


@contextmanager
def opened(models: ModelSet, **chat: Any) -> Iterator[tuple[Scripted, Live]]:
    scripted = Scripted(models, ChatConfig(**chat))
    with serve(scripted.engine, scripted.config) as live:
        yield scripted, live
    assert scripted.engine.open_streams == 0


@pytest.fixture(scope="module")
def hermes(tiny_models: ModelSet) -> Iterator[tuple[Scripted, Live]]:
    with opened(tiny_models, template=chat_templates.HERMES) as both:
        yield both


@pytest.fixture(scope="module")
def thinking(tiny_models: ModelSet) -> Iterator[tuple[Scripted, Live]]:
    with opened(tiny_models, template=chat_templates.THINKING) as both:
        yield both


def say(both: tuple[Scripted, Live], text: str, **body: Any) -> dict[str, Any]:
    scripted, live = both
    scripted.text, scripted.reason = text, FinishReason.STOP
    response = live.post(CHAT, **{"model": "atlas", "messages": USER, "max_tokens": 99, **body})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def refused(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post(CHAT, **{"model": "atlas", "messages": USER, "max_tokens": 9, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]  # type: ignore[no-any-return]


def assembled(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A message from a stream, the slow way."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if choice["index"] != index:
                continue
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["type"] == "function"
                    assert call["function"]["arguments"] == ""
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append([call["id"], call["function"]["name"], ""])
                else:
                    message["tool_calls"][call["index"]][2] += call["function"]["arguments"]
    return message


# Answers --------------------------------------------------------------------------------------------------------


def test_calls_whole(hermes: tuple[Scripted, Live]) -> None:
    [choice] = say(hermes, CALLED, tools=[WEATHER, TIME])["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Paris"}'},
        {"name": "time", "arguments": "{}"},
    ]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(entry.startswith("call_") for entry in ids)
    assert "reasoning" not in message


@pytest.mark.parametrize("width", [1, 2, 7, 1000])
def test_calls_streamed(hermes: tuple[Scripted, Live], width: int) -> None:
    scripted, live = hermes
    scripted.text, scripted.width = CALLED, width
    body = {"model": "atlas", "messages": USER, "max_tokens": 99, "tools": [WEATHER, TIME], "n": 2}
    chunks = live.stream(CHAT, **body, stream_options={"include_usage": True})
    scripted.width = 3
    for index in (0, 1):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": None}
        assert parts[-1]["delta"] == {}
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["tool_calls"]
        message = assembled(chunks, index)
        assert message["content"] == "Let me look."
        assert [call[1:] for call in message["tool_calls"]] == [
            ["weather", '{"city": "Paris"}'],
            ["time", "{}"],
        ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert "completion_tokens_details" not in chunks[-1]["usage"]


def test_only_calls_have_no_content(hermes: tuple[Scripted, Live]) -> None:
    [choice] = say(hermes, CALLED.partition("\n")[2], tools=[WEATHER, TIME])["choices"]
    assert choice["message"]["content"] is None
    assert len(choice["message"]["tool_calls"]) == 2


def test_text_is_content(hermes: tuple[Scripted, Live]) -> None:
    for text in ("It rains.", "", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'):
        [choice] = say(hermes, text, tools=[WEATHER])["choices"]
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"


def test_cut_off_call_ends_by_length(hermes: tuple[Scripted, Live]) -> None:
    scripted, live = hermes
    scripted.text, scripted.reason = CALLED[:70], FinishReason.LENGTH
    answer = live.post(CHAT, model="atlas", messages=USER, max_tokens=9, tools=[WEATHER]).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"ci')


def test_without_tools_nothing_is_read(hermes: tuple[Scripted, Live]) -> None:
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
        [choice] = say(hermes, CALLED, **body)["choices"]
        assert choice["message"]["content"] == CALLED
        assert "<tools>" not in hermes[0].prompt


def test_logprobs_have_every_token_of_calls(live: Live) -> None:
    """Ones that become no content as well."""
    body = {"model": "atlas+qa", "messages": USER, "max_tokens": 8, "temperature": 0, "logprobs": True}
    plain = live.post(CHAT, **body).json()["choices"][0]["logprobs"]
    chunks = live.stream(CHAT, **body)
    entries = [
        entry for chunk in chunks for part in chunk["choices"] for entry in part["logprobs"]["content"]
    ]
    assert entries == plain["content"]


def test_one_call_ends_the_answer_without_parallel_calls(hermes: tuple[Scripted, Live]) -> None:
    say(hermes, CALLED, tools=[WEATHER, TIME], parallel_tool_calls=False)
    [constrains] = hermes[0].engine.submitted[-1].constraints
    constraint = constrains.start()
    tokenizer = hermes[0].engine.models.base.tokenizer
    for token in tokenizer.encode(CALLED, add_special_tokens=False):
        constraint.advance(token)
        if constraint.complete:
            break
    assert constraint.complete
    say(hermes, CALLED, tools=[WEATHER, TIME], parallel_tool_calls=True)
    assert hermes[0].engine.submitted[-1].constraints == ()


# Prompts --------------------------------------------------------------------------------------------------------


def test_conversation_with_calls_comes_back(hermes: tuple[Scripted, Live]) -> None:
    """An assistant's message as openai's client dumps it, and the tools' results."""
    scripted, live = hermes
    scripted.text = CALLED
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
        tools: Any = [WEATHER, TIME]
        messages: list[Any] = list(USER)
        answer = client.chat.completions.create(model="atlas", messages=messages, tools=tools, max_tokens=99)
        message = answer.choices[0].message
        calls = message.tool_calls or []
        results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in calls]
        prompts = []
        for dumped in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            turns: Any = [*messages, dumped, *results]
            client.chat.completions.create(model="atlas", messages=turns, tools=tools, max_tokens=99)
            prompts.append(scripted.prompt)
    assert len(set(prompts)) == 1
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in prompts[0]
    assert prompts[0].count("<tool_response>\nfine\n</tool_response>") == 2
    assert prompts[0].count("<tools>") == 1


def test_template_without_tools_is_told_of_them(tiny_models: ModelSet) -> None:
    with opened(tiny_models, template=CHAT_TEMPLATE) as both:
        call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
        turns = [
            {"role": "system", "content": "Be brief."},
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        ]
        message = say(both, CALLED, tools=[WEATHER, TIME], messages=turns)["choices"][0]["message"]
        prompt = both[0].prompt
        assert len(message["tool_calls"]) == 2, "in the form that the instruction teaches"
        assert prompt.startswith("[system] Be brief.\n\nYou may call functions")
        assert json.dumps(WEATHER) in prompt
        assert '[assistant] <tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>' in prompt
        assert "[user] <tool_response>\nnoon\n</tool_response>" in prompt
        say(both, "", tools=[TIME])
        assert both[0].prompt.startswith("[system] You may call functions"), "without a system message"
        say(both, "", messages=turns)
        assert "You may call" not in both[0].prompt
        assert "noon" in both[0].prompt, "history stays where tools are not offered any more"


def test_llama_form(tiny_models: ModelSet) -> None:
    text = '{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "time", "parameters": {}}'
    for chat in ({"template": chat_templates.LLAMA}, {"template": CHAT_TEMPLATE, "tool_parser": "llama"}):
        with opened(tiny_models, **chat) as both:
            [choice] = say(both, text, tools=[WEATHER, TIME])["choices"]
            names = [call["function"]["name"] for call in choice["message"]["tool_calls"]]
            assert names == ["weather", "time"]
            assert choice["message"]["content"] is None
            assert '"parameters"' in both[0].prompt


def test_unknown_form_is_refused_unless_it_is_named(tiny_models: ModelSet) -> None:
    template = "{{ tools }}[TOOL_CALLS]{% for message in messages %}{{ message.content }}{% endfor %}"
    with opened(tiny_models, template=template) as (_, live):
        error = refused(live, tools=[TIME])
        assert error["param"] == "tools"
        assert "--tool-parser" in error["message"]
    with opened(tiny_models, template=template, tool_parser="hermes") as both:
        assert say(both, CALLED, tools=[WEATHER, TIME])["choices"][0]["message"]["tool_calls"]


def test_own_template_comes_before_the_operators(tiny_models: ModelSet) -> None:
    """An expert's own, for its lanes; the operator's for the base."""
    with opened(tiny_models, template=chat_templates.HERMES) as both:
        say(both, "", model="atlas+qa")
        prompts = both[0].engine.submitted[-1].prompts
        texts = {
            name: tiny_models.base.tokenizer.decode(prompts.of(name))
            for name in ("base", "qa.tuned", "qa.untuned")
        }
        assert texts["base"].startswith("<|im_start|>user\n")
        assert texts["qa.tuned"] == texts["qa.untuned"] == f"[user] {USER[0]['content']}\n[assistant] "
        assert both[1].post("/tokenize", messages=USER).json()["tokens"] == list(prompts.default)


# Reasoning ------------------------------------------------------------------------------------------------------


THOUGHT = "The user\nasks.\n</think>\n\nIt rains.\n"


def test_reasoning_is_told_apart(thinking: tuple[Scripted, Live]) -> None:
    answer = say(thinking, THOUGHT, n=2)
    assert thinking[0].prompt.endswith("<think>\n")
    for choice in answer["choices"]:
        assert choice["message"] == {
            "role": "assistant",
            "content": "It rains.\n",
            "refusal": None,
            "reasoning": "The user\nasks.",
            "reasoning_content": "The user\nasks.",
        }
        assert choice["finish_reason"] == "stop"
    pieces = -(-(THOUGHT.index("</think>") + len("</think>")) // 3)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * pieces}
    body = {"model": "atlas", "messages": USER, "max_tokens": 99, "n": 2}
    chunks = thinking[1].stream(CHAT, **body, stream_options={"include_usage": True})
    assert assembled(chunks) == {"content": "It rains.\n", "reasoning": "The user\nasks.", "tool_calls": []}
    assert chunks[-1]["usage"] == answer["usage"]


def test_reasoning_that_never_ends_has_no_content(thinking: tuple[Scripted, Live]) -> None:
    message = say(thinking, "I wonder")["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "I wonder")


def test_template_variables(thinking: tuple[Scripted, Live]) -> None:
    off = say(thinking, "It rains.", chat_template_kwargs={"enable_thinking": False})
    assert thinking[0].prompt.endswith("<think>\n\n</think>\n\n")
    assert off["choices"][0]["message"] == {"role": "assistant", "content": "It rains.", "refusal": None}
    say(thinking, "", reasoning_effort="low")
    assert "<|effort|>low" in thinking[0].prompt


def test_reasoning_comes_back_in_the_prompt(thinking: tuple[Scripted, Live]) -> None:
    for names in (["reasoning"], ["reasoning_content"], ["reasoning", "reasoning_content"]):
        turn = {"role": "assistant", "content": "Hm", **dict.fromkeys(names, "I see")}
        say(thinking, "", messages=[*USER, turn])
        assert "<think>\nI see\n</think>\n\nHm" in thinking[0].prompt


def test_thinking_budget_becomes_a_constraint(thinking: tuple[Scripted, Live]) -> None:
    say(thinking, THOUGHT, thinking_budget=0)
    [constrains] = thinking[0].engine.submitted[-1].constraints
    assert constrains.start().mask() is not None


def test_parsers_can_be_switched_off_and_on(tiny_models: ModelSet) -> None:
    with opened(tiny_models, template=chat_templates.THINKING, reasoning_parser="none") as both:
        assert say(both, THOUGHT)["choices"][0]["message"]["content"] == THOUGHT
        assert refused(both[1], thinking_budget=5)["param"] == "thinking_budget"
    with opened(tiny_models, template=CHAT_TEMPLATE, reasoning_parser="deepseek") as both:
        message = say(both, "<think>Hm</think>Yes")["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("Hm", "Yes")


def test_last_message_is_continued(hermes: tuple[Scripted, Live]) -> None:
    turns = [*USER, {"role": "assistant", "content": "It is"}]
    say(hermes, " fine", messages=turns, continue_final_message=True)
    assert hermes[0].prompt.endswith("<|im_start|>assistant\nIt is")
    say(hermes, "", messages=turns, add_generation_prompt=False)
    assert hermes[0].prompt.endswith("It is<|im_end|>\n")


# Refusals -------------------------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    return {"items": deep(levels - 1)} if levels else {}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [named("bad name")]}, "tools[0].function.name"),
    ({"tools": [named("f"), named("f")]}, "tools[1].function.name"),
    ({"tools": [named(f"f{number}") for number in range(4)]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f", "cost": 1}}]}, "tools[0].function.cost"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 5000}}]}, "tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep(9)}}]},
        "tools[0].function.parameters",
    ),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "maybe", "tools": [TIME]}, "tool_choice"),
    ({"tool_choice": {"type": "auto"}, "tools": [TIME]}, "tool_choice"),
    ({"tool_choice": named("ghost"), "tools": [TIME]}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "function"}, "tools": [TIME]}, "tool_choice.function"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"thinking_budget": 5}, "thinking_budget"),
    ({"thinking_budget": -1}, "thinking_budget"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": None}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {f"x{number}": 1 for number in range(17)}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": "y" * 5000}}, "chat_template_kwargs.x"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}]},
        "messages[0].reasoning",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "function_call": {}}]}, "messages[0].function_call"),
    ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages[0].refusal"),
    (
        {"fusion": {"prompts": {"base": {"messages": [{"role": "tool", "content": "x"}]}}}},
        "fusion.prompts.base.messages[0].tool_call_id",
    ),
    (
        {"fusion": {"rule": "guidance", "negative_messages": [{"role": "user"}]}},
        "fusion.negative_messages[0].content",
    ),
]


@pytest.mark.parametrize(
    ("body", "param"), REFUSALS, ids=[f"{i} {case[1]}" for i, case in enumerate(REFUSALS)]
)
def test_refusal_names_the_field(hermes: tuple[Scripted, Live], body: dict[str, Any], param: str) -> None:
    error = refused(hermes[1], **body)
    assert error["param"] == param
    assert error["message"]


def test_runaway_template_is_a_refusal(tiny_models: ModelSet) -> None:
    template = "{% for i in range(99999) %}" + 20000 * "x" + "{% endfor %}"
    with opened(tiny_models, template=template) as (_, live):
        error = refused(live)
    assert error["param"] == "messages"
    assert "makes more than" in error["message"]


# openai's client ------------------------------------------------------------------------------------------------


class Weather(BaseModel):
    """How it is outside."""

    city: str


WEATHER_CALL = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_openai_stream_helper(hermes: tuple[Scripted, Live]) -> None:
    scripted, live = hermes
    scripted.text, scripted.reason = WEATHER_CALL, FinishReason.STOP
    tool = openai.pydantic_function_tool(Weather)
    tools: Any = [
        {**tool, "function": {**tool["function"], "strict": False}}
    ]  # a strict one takes a real engine
    messages: Any = USER
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client,
        client.chat.completions.stream(
            model="atlas", messages=messages, tools=tools, max_tokens=99
        ) as stream,
    ):
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [
        event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"
    ]
    assert "".join(deltas) == '{"city": "Paris"}'
    assert len(deltas) > 2, "as they come"
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert (done.name, done.arguments) == ("Weather", '{"city": "Paris"}')
    choice = final.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].id.startswith("call_")
