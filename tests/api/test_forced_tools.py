"""Tools whose calls are forced or bound by a grammar: a model that would rather write something else."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from proxyserve.config import ChatConfig, ServerConfig
from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.submission import Submission
from proxyserve.models.model_set import ModelSet
from proxyserve.text.detokenizer import Detokenizer
from proxyserve.types import FinishReason, OutputEvent, Usage
from tests.api.fakes import FakeEngine
from tests.api.live import Live, serve
from tests.text import chat_templates

CHAT = "/v1/chat/completions"
USER: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "sky",
        "schema": {"type": "object", "properties": {"grey": {"type": "boolean"}}, "required": ["grey"]},
    },
}


class Stubborn:
    """Wants to write `wish` and then to end; where it must not, it takes any token that may come."""

    def __init__(self, models: ModelSet) -> None:
        self.wish = ""
        self.engine = FakeEngine(models, self._script)

    async def _script(self, submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        [submission] = submissions
        base = self.engine.models.base
        tokenizer, chance = base.tokenizer, random.Random(submission.sampling.seed)
        constraints = [constrains.start() for constrains in submission.constraints]
        detokenizer = Detokenizer(tokenizer)
        wishes = [*tokenizer.encode(self.wish, add_special_tokens=False), min(base.eos_ids)]
        for step in range(200):
            may = set(range(tokenizer.vocabulary_size))
            for constraint in constraints:
                mask = constraint.mask()
                if mask is not None:
                    words = mask.tolist()
                    may &= {
                        token
                        for token in may
                        if token // 32 < len(words) and words[token // 32] >> token % 32 & 1
                    }
            wished = wishes[min(step, len(wishes) - 1)]
            token = wished if wished in may else chance.choice(sorted(may))
            if token not in may or token in base.eos_ids:
                break
            for constraint in constraints:
                constraint.advance(token)
            yield OutputEvent(submission.request_id, 0, (token,), detokenizer.push(token))
            if any(constraint.complete for constraint in constraints):
                break
        usage = Usage(1, step, 0, {})
        yield OutputEvent(
            submission.request_id, 0, text=detokenizer.finish(), finish_reason=FinishReason.STOP, usage=usage
        )


@pytest.fixture(scope="module")
def stubborn(tiny_models: ModelSet) -> Iterator[tuple[Stubborn, Live]]:
    model = Stubborn(tiny_models)
    with serve(model.engine, ServerConfig(chat=ChatConfig(template=chat_templates.HERMES))) as live:
        yield model, live


def ask(both: tuple[Stubborn, Live], wish: str = "Hello, it rains.", **body: Any) -> dict[str, Any]:
    model, live = both
    model.wish = wish
    given = {
        "model": "atlas",
        "messages": USER,
        "max_tokens": 99,
        "seed": 3,
        "tools": [WEATHER, TIME],
        **body,
    }
    response = live.post(CHAT, **given)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice  # type: ignore[no-any-return]


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"].get("tool_calls", ())
    ]


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        if name == "weather":
            assert arguments in ({"city": "Paris"}, {"city": "Rome"})
        else:
            assert (name, arguments) == ("time", {})


def test_required_is_a_call(stubborn: tuple[Stubborn, Live]) -> None:
    names = set()
    for seed in range(4):
        choice = ask(stubborn, tool_choice="required", parallel_tool_calls=False, seed=seed)
        [call] = calls_of(choice)
        check([call])
        names.add(call[0])
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
    assert names == {"weather", "time"}


def test_required_may_be_several_calls(stubborn: tuple[Stubborn, Live]) -> None:
    wish = (
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    )
    choice = ask(stubborn, wish, tool_choice="required")
    assert calls_of(choice) == [("time", {}), ("weather", {"city": "Rome"})]


def test_named_is_a_call_of_that_one(stubborn: tuple[Stubborn, Live]) -> None:
    wish = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    choice = ask(stubborn, wish, tool_choice={"type": "function", "function": {"name": "time"}})
    assert calls_of(choice) == [("time", {})]
    assert choice["finish_reason"] == "stop", "as OpenAI has it"


def test_allowed_tools(stubborn: tuple[Stubborn, Live]) -> None:
    allowed = {"type": "function", "function": {"name": "time"}}
    wish = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    for mode, text in (("required", wish), ("auto", wish), ("auto", "Hello")):
        only = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [allowed]}}
        choice = ask(stubborn, text, tool_choice=only)
        assert [name for name, _ in calls_of(choice)] == (["time"] if text == wish else [])


def test_strict_tools_of_its_own_accord(stubborn: tuple[Stubborn, Live]) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    wish = 'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": 5}}\n</tool_call>'
    choice = ask(stubborn, wish, tools=[strict])
    [call] = calls_of(choice)
    check([call])
    assert choice["message"]["content"] == "Well."
    assert calls_of(ask(stubborn, wish, tools=[WEATHER])) == [("weather", {"city": 5})], "were it not strict"
    assert ask(stubborn, "Just text.", tools=[strict])["message"]["content"] == "Just text."


def test_schema_of_the_answer_beside_tools(stubborn: tuple[Stubborn, Live]) -> None:
    wish = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert calls_of(ask(stubborn, wish, response_format=ANSWER)) == [("time", {})]
    choice = ask(stubborn, '{"grey": true}', response_format=ANSWER, parallel_tool_calls=False)
    assert json.loads(choice["message"]["content"])["grey"] is True
    body = {"model": "atlas", "messages": USER, "tools": [TIME], "structured_outputs": {"regex": "a+"}}
    error = stubborn[1].post(CHAT, **body, max_tokens=9)
    assert (error.status_code, error.json()["error"]["param"]) == (400, "structured_outputs.regex")


def test_impossible_schema_is_refused(stubborn: tuple[Stubborn, Live]) -> None:
    for parameters, strict in (
        ({"$ref": "https://example.com/x.json"}, True),
        (
            {"type": "object", "unevaluatedProperties": False, "properties": {"a": {"format": "no such"}}},
            True,
        ),
    ):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
        body = {"model": "atlas", "messages": USER, "tools": [tool], "tool_choice": "required"}
        response = stubborn[1].post(CHAT, **body, max_tokens=9)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].startswith("tools")


def test_reasoning_comes_before_forced_calls(tiny_models: ModelSet) -> None:
    model = Stubborn(tiny_models)
    with serve(model.engine, ServerConfig(chat=ChatConfig(template=chat_templates.THINKING))) as live:
        wish = "I should look.\n</think>\n\nHello"
        choice = ask((model, live), wish, tool_choice="required", parallel_tool_calls=False)
        check(calls_of(choice))
        assert choice["message"]["reasoning"] == "I should look."
        assert choice["message"]["content"] is None
        budget = ask((model, live), "abc" * 30, tool_choice="required", thinking_budget=2)
        assert len(budget["message"]["reasoning"]) <= 6
        assert calls_of(budget)


class Weather(BaseModel):
    """How it is outside."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]


@pytest.mark.parametrize("model", ["atlas", "atlas+qa"])
def test_random_weights_call_tools(tiny_engine: AsyncEngine, model: str) -> None:
    """The engine itself, with models that know nothing: thoughts within their budget, then a call."""
    template = "{{ tools | length }} for <tool_call>. {{ messages[0].content }}<think>"
    config = ServerConfig(chat=ChatConfig(template=template))
    own = (
        ("qa.tuned", "qa.untuned") if model == "atlas+qa" else ()
    )  # their template knows no tools and is long
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [WEATHER, TIME],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "thinking_budget": 4,
        "fusion": {"prompts": {lane: {"text": "Hi"} for lane in own}},
        "max_tokens": 150,
        "seed": 5,
    }
    with serve(tiny_engine, config) as live:
        answer = live.post(CHAT, **body)
        assert answer.status_code == 200, answer.text
        chunks = live.stream(CHAT, **body, stream_options={"include_usage": True})
    [choice] = answer.json()["choices"]
    [call] = calls_of(choice)
    check([call])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["grammar"]["mean_removed_mass"] > 0
    end = tiny_engine.engine.models.base.tokenizer.encode("</think>", add_special_tokens=False)
    spent = answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 4 + len(end) <= spent <= 8 + len(end), "up to four more, to end a character"
    deltas = [part["delta"] for chunk in chunks for part in chunk["choices"]]
    functions = [entry["function"] for delta in deltas for entry in delta.get("tool_calls", ())]
    assert (
        "".join(function["arguments"] for function in functions)
        == choice["message"]["tool_calls"][0]["function"]["arguments"]
    )
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": spent}


async def test_openai_parse(stubborn: tuple[Stubborn, Live]) -> None:
    model, live = stubborn
    model.wish = "I would rather not."
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
        parsed = client.chat.completions.parse(
            model="atlas",
            messages=USER,
            tools=tools,
            tool_choice="required",
            max_tokens=99,
            parallel_tool_calls=False,
        )
        with client.chat.completions.stream(
            model="atlas",
            messages=USER,
            tools=tools,
            tool_choice="required",
            max_tokens=99,
            parallel_tool_calls=False,
        ) as stream:
            streamed = stream.get_final_completion()
        # The loop of an agent: the client sends back what it has read into `parsed` and `parsed_arguments` too.
        message = parsed.choices[0].message
        assert message.tool_calls
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
        said = client.chat.completions.parse(
            model="atlas",
            messages=[*USER, message, result],
            response_format=Weather,
            max_tokens=99,  # type: ignore[list-item]
        )
        assert isinstance(said.choices[0].message.parsed, Weather)
        again = [*USER, said.choices[0].message, *USER]
        client.chat.completions.create(model="atlas", messages=again, max_tokens=1)  # type: ignore[arg-type]
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client_:
        awaited = await client_.chat.completions.parse(
            model="atlas",
            messages=USER,
            tools=tools,
            tool_choice="required",
            max_tokens=99,
            parallel_tool_calls=False,
        )
    for completion in (parsed, streamed, awaited):
        [call] = completion.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather)
        assert completion.choices[0].finish_reason == "tool_calls"
