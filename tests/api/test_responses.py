"""POST /v1/responses: whole and streamed, on tiny models, and on scripted engines that reason and call tools."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import ResponseStreamEvent

from proxyserve.api.app import create_app
from proxyserve.config import ChatConfig, ServerConfig
from proxyserve.engine.submission import Submission
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason, FusionReport, OutputEvent, Usage
from tests.api.fakes import FakeEngine, Script, token
from tests.api.live import Live, assert_idle, named_events, serve, wait_until

RESPONSES = "/v1/responses"
GOLDEN = Path(__file__).parent / "golden" / "responses.sse"
ASK: dict[str, Any] = {
    "model": "atlas+qa",
    "input": "Who was born where?",
    "max_output_tokens": 8,
    "temperature": 0,
}
LOGPROBS = ["message.output_text.logprobs"]
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def ask(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post(RESPONSES, **{**ASK, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(response: dict[str, Any]) -> str:
    return "".join(
        part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]
    )


def refusal(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post(RESPONSES, **{**ASK, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# On tiny models ---------------------------------------------------------------------------------------------------


def test_answer_is_the_one_of_chat(live: Live) -> None:
    answer = ask(live, instructions="Be brief.", seed=3, temperature=1, top_k=20, user="ada")
    chat = live.post(
        "/v1/chat/completions",
        model="atlas+qa",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who was born where?"},
        ],
        max_tokens=8,
        seed=3,
        top_k=20,
        user="ada",
    ).json()
    [item] = answer["output"]
    assert text_of(answer) == chat["choices"][0]["message"]["content"]
    assert (item["role"], item["status"]) == ("assistant", "incomplete")
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["output_tokens"] == 8
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["lane_tokens"].keys() == {"atlas", "qa.tuned", "small"}
    assert answer["fusion"] == chat["fusion"]
    assert (answer["instructions"], answer["user"], answer["store"]) == ("Be brief.", "ada", False)


def test_stop_completes(live: Live) -> None:
    text = text_of(ask(live))
    answer = ask(live, stop=[text[-2:]])
    assert (answer["status"], answer["incomplete_details"]) == ("completed", None)
    assert answer["stop_reason"] == text[-2:]
    assert text_of(answer) == text[: text.index(text[-2:])]
    assert answer["output"][0]["status"] == "completed"
    assert answer["completed_at"] >= answer["created_at"]


def test_stream_builds_the_whole_answer(live: Live) -> None:
    asked = {"include": LOGPROBS, "top_logprobs": 2, "fusion": {"explain": 1}, "metadata": {"a": "b"}}
    whole = ask(live, **asked)
    events = live.events(RESPONSES, **{**ASK, **asked})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = events[-1]["response"]
    part = last["output"][0]["content"][0]
    assert "".join(event["delta"] for event in deltas) == part["text"] == text_of(whole)
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
    assert part["logprobs"] == whole["output"][0]["content"][0]["logprobs"]
    assert len(part["logprobs"]) == len(last["explain"]) == 8
    for same in ("fusion", "explain", "status", "incomplete_details", "metadata", "tools", "text"):
        assert last[same] == whole[same]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    assert events[0]["response"]["usage"] is None
    assert events[-2]["item"] == last["output"][0]


def test_logprobs_are_those_of_chat(live: Live) -> None:
    answer = ask(live, include=LOGPROBS, top_logprobs=3)
    messages = [{"role": "user", "content": ASK["input"]}]
    chat = live.post(
        "/v1/chat/completions",
        model="atlas+qa",
        messages=messages,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    ).json()
    part = answer["output"][0]["content"][0]
    assert part["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    assert answer["top_logprobs"] == 3


def test_conversation_goes_on_with_items(live: Live) -> None:
    """An output sent back is the assistant's turn, and parts and plain text say the same."""
    first = ask(live)
    parts = [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": "then?"}]
    items = [
        {"role": "user", "content": ASK["input"]},
        *first["output"],
        {"type": "message", "role": "user", "content": parts},
    ]
    plain = [
        {"role": "user", "content": ASK["input"]},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "And\nthen?"},
    ]
    assert text_of(ask(live, input=items)) == text_of(ask(live, input=plain))
    chat = live.post(
        "/v1/chat/completions", model="atlas+qa", messages=plain, max_tokens=8, temperature=0
    ).json()
    assert text_of(ask(live, input=items)) == chat["choices"][0]["message"]["content"]


def test_developer_is_system(live: Live) -> None:
    answers = [
        text_of(ask(live, input=[{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
        for role in ("developer", "system", "user")
    ]
    assert answers[0] == answers[1] == text_of(ask(live, instructions="Be brief.", input="Hi"))
    assert answers[0] != answers[2]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_tokens": 3}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10_000}, "max_output_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"include": LOGPROBS, "top_logprobs": 21}, "top_logprobs"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"model": "atlas", "fusion": {"prompts": {"base": "chat"}}}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 500}]},
        "input[0].arguments",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 5}}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_refusals_name_the_field(live: Live, body: dict[str, Any], param: str) -> None:
    assert refusal(live, **body)["param"] == param


def test_nothing_is_stored(live: Live) -> None:
    stored = ask(live, store=False)["id"]
    for method in ("GET", "DELETE"):
        response = live.http.request(method, f"{RESPONSES}/{stored}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "route_not_found"


# The official client ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_official_client(client: openai.OpenAI, live: Live) -> None:
    whole = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text == text_of(ask(live))
    stop = whole.output_text[-2:]
    with client.responses.stream(**ASK, extra_body={"stop": stop}) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text[: whole.output_text.index(stop)]
    assert final.usage is not None
    assert final.usage.input_tokens_details.cached_tokens >= 0
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="atlas+qa", input="x", previous_response_id="resp_1")
    assert bad.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


async def test_official_async_client(live: Live) -> None:
    url = f"{live.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        whole = await client.responses.create(**ASK)
        stream = await client.responses.create(**ASK, stream=True)
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


class Person(pydantic.BaseModel):
    job: Literal["mathematician", "boxer"]
    tall: bool


def test_parse(client: openai.OpenAI) -> None:
    asked = {**ASK, "max_output_tokens": 200, "extra_body": {"seed": 1}}
    response = client.responses.parse(**asked, text_format=Person)
    assert isinstance(response.output_parsed, Person)
    assert response.model_extra is not None
    assert response.model_extra["grammar"]["mean_removed_mass"] > 0
    with client.responses.stream(**asked, text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_leaving_a_stream(client: openai.OpenAI, live: Live) -> None:
    long = {**ASK, "max_output_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = client.responses.create(**long, stream=True)
    next(iter(stream))
    wait_until(lambda: live.engine.snapshot().running > 0)
    stream.close()
    assert_idle(live.engine)


# On scripted engines ----------------------------------------------------------------------------------------------


def says(*texts: str, finish: FinishReason = FinishReason.STOP) -> Script:
    """An answer of a token per text."""

    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        [submission] = submissions
        for text in texts[:-1]:
            yield token(submission, text)
        yield OutputEvent(
            submission.request_id,
            0,
            (66,),
            texts[-1],
            finish_reason=finish,
            usage=Usage(10, len(texts), 4, {"atlas": 9 + len(texts)}),
            fusion=FusionReport("proxy", 1.0, {"qa": 3}, mean_kl=0.5, flips=1),
        )

    return script


#: Tells reasoning and calls apart whatever the template says.
HERMES = ServerConfig(chat=ChatConfig(tool_parser="hermes", reasoning_parser="deepseek"))


async def post(engine: Any, path: str = RESPONSES, **body: Any) -> httpx.Response:
    """One request to an application without a server around it."""
    transport = httpx.ASGITransport(create_app(engine, HERMES), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.post(path, json={**(ASK if path == RESPONSES else {}), **body})


THINKING_AND_CALLING = (
    "<think>",
    "Rain",
    " or shine",
    "</think>",
    "Let me ",
    "look.",
    '\n<tool_call>\n{"name": "weather", "arguments": {"ci',
    'ty": "Zürich"}}',
    "\n</tool_call>",
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>',
)


async def test_reasoning_and_calls(tiny_models: ModelSet) -> None:
    engine = FakeEngine(tiny_models, says(*THINKING_AND_CALLING))
    response = (await post(engine, tools=[WEATHER])).json()
    reasoning, message, first, second = response["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Rain or shine"}]
    assert message["content"][0]["text"] == "Let me look."
    assert [json.loads(call["arguments"]) for call in (first, second)] == [
        {"city": "Zürich"},
        {"city": "Bern"},
    ]
    assert first["name"] == "weather"
    assert first["call_id"] != second["call_id"]
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert response["status"] == "completed"
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}
    assert response["tools"] == [WEATHER]
    assert engine.open_streams == 0


CHOICES: list[tuple[Any, Any]] = [
    ("none", "none"),
    ("auto", "auto"),
    ("required", "required"),
    ({"type": "function", "name": "bern"}, {"type": "function", "function": {"name": "bern"}}),
    (
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "bern"}]},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "bern"}}]},
        },
    ),
]


def test_tools_are_those_of_chat(tiny_models: ModelSet) -> None:
    """The engine is asked for the same as by the same request to the other route."""
    engine = FakeEngine(tiny_models, says("Yes."))
    tools = [WEATHER, {**WEATHER, "name": "bern", "strict": True}]
    of_chat = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in tools]
    with serve(engine, HERMES) as live:
        for choice, choice_of_chat in CHOICES:
            common = {"model": "atlas+qa", "parallel_tool_calls": choice != "auto", "seed": 1}
            for path, body in (
                (RESPONSES, {"input": "Hi", "max_output_tokens": 8, "tools": tools, "tool_choice": choice}),
                (
                    "/v1/chat/completions",
                    {
                        "messages": [{"role": "user", "content": "Hi"}],
                        "max_tokens": 8,
                        "tools": of_chat,
                        "tool_choice": choice_of_chat,
                    },
                ),
            ):
                response = live.post(path, **common, **body)
                assert response.status_code == 200, response.text
            ours, theirs = engine.submitted[-2:]
            assert ours.prompts == theirs.prompts
            assert ours.sampling == theirs.sampling
            assert beginnings(ours) == beginnings(theirs)
    unbound, bound, required, named, _ = [beginnings(each) for each in engine.submitted[::2]]
    assert unbound == []
    assert bound[0] not in (required[0], named[0])


def beginnings(submission: Submission) -> list[Any]:
    """Of each constraint, what may come first."""
    masks = [constraint.start().mask() for constraint in submission.constraints]
    return [None if mask is None else mask.tolist() for mask in masks]


async def test_golden_transcript(tiny_models: ModelSet) -> None:
    engine = FakeEngine(tiny_models, says(*THINKING_AND_CALLING))
    response = await post(engine, tools=[WEATHER], stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert normalised(response.text) == GOLDEN.read_text(encoding="utf-8")
    official = pydantic.TypeAdapter[Any](ResponseStreamEvent)
    for event in named_events(response.text):
        official.validate_python(event)


async def test_stream_of_reasoning_and_calls_is_the_whole(tiny_models: ModelSet) -> None:
    """However the text is cut."""
    whole = (await post(FakeEngine(tiny_models, says(*THINKING_AND_CALLING)), tools=[WEATHER])).json()
    characters = "".join(THINKING_AND_CALLING)
    stream = await post(FakeEngine(tiny_models, says(*characters)), tools=[WEATHER], stream=True)
    events = named_events(stream.text)
    assert normalised(events[-1]["response"]["output"]) == normalised(whole["output"])
    arguments: dict[int, str] = {}
    for event in events:
        if event["type"] == "response.function_call_arguments.delta":
            index = event["output_index"]
            arguments[index] = arguments.get(index, "") + event["delta"]
    assert arguments == {2: whole["output"][2]["arguments"], 3: whole["output"][3]["arguments"]}


async def test_cut_off_in_a_call(tiny_models: ModelSet) -> None:
    engine = FakeEngine(tiny_models, says(*THINKING_AND_CALLING[:7], finish=FinishReason.LENGTH))
    response = (await post(engine, tools=[WEATHER])).json()
    assert response["status"] == "incomplete"
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "incomplete"]


async def test_answer_of_nothing_is_an_empty_message(tiny_models: ModelSet) -> None:
    response = (await post(FakeEngine(tiny_models, says("")))).json()
    assert [item["type"] for item in response["output"]] == ["message"]
    assert text_of(response) == ""


@pytest.mark.parametrize("failure", ["error", "bug"])
async def test_failure_ends_the_stream(tiny_models: ModelSet, failure: str) -> None:
    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        [submission] = submissions
        yield token(submission, "so far")
        if failure == "bug":
            raise RuntimeError("prompt text that nobody may see")
        yield OutputEvent(submission.request_id, 0, finish_reason=FinishReason.ERROR, error="boom")

    engine = FakeEngine(tiny_models, script)
    streamed = await post(engine, stream=True)
    last = named_events(streamed.text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert ("boom" in last["response"]["error"]["message"]) == (failure == "error")
    assert text_of(last["response"]) == "so far"
    assert "nobody may see" not in streamed.text
    assert (await post(engine)).status_code == 500
    assert engine.open_streams == 0


async def test_tool_results_come_back(tiny_models: ModelSet) -> None:
    """What was thought, said and called is one turn, the results follow it."""
    first = await post(FakeEngine(tiny_models, says(*THINKING_AND_CALLING)), tools=[WEATHER])
    output = first.json()["output"]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in output[2:]
    ]
    engine = FakeEngine(tiny_models, says("It rains."))
    again = [{"role": "user", "content": "Weather?"}, *output, *results]
    response = await post(engine, tools=[WEATHER], input=again)
    assert text_of(response.json()) == "It rains."
    [submission] = engine.submitted
    prompt = tiny_models.base.tokenizer.decode(submission.prompts.of("base"))
    turns = re.findall(r"^\[(\w+)\]", prompt, re.MULTILINE)
    assert turns == ["system", "user", "assistant", "user", "assistant"]
    assert prompt.count("rain\n</tool_response>") == 2
    assert "Let me look." in prompt


def test_official_client_calls_tools(tiny_models: ModelSet) -> None:
    answers = iter([THINKING_AND_CALLING, ("It ", "rains.")])
    engine = FakeEngine(tiny_models, lambda submissions: says(*next(answers))(submissions))
    items: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    with (
        serve(engine, HERMES) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": "atlas+qa", "max_output_tokens": 99, "tools": [WEATHER]}
        with client.responses.stream(**asked, input=items) as stream:
            deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
            first = stream.get_final_response()
        calls = [item for item in first.output if item.type == "function_call"]
        assert "".join(call.arguments for call in calls) == "".join(deltas)
        assert first.output_text == "Let me look."
        items += first.output
        items += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls
        ]
        second = client.responses.create(**asked, input=items)
    assert second.output_text == "It rains."


def normalised(value: Any) -> Any:
    """Ids in the order of their appearance, and no times."""
    text = value if isinstance(value, str) else json.dumps(value)
    names: dict[str, str] = {}
    for found in re.findall(r"\b[a-z]+_[0-9a-f]{32}\b", text):
        names.setdefault(found, f"{found.partition('_')[0]}_{len(names)}")
        text = text.replace(found, names[found])
    return re.sub(r'"(created_at|completed_at)":\d+', r'"\1":0', text)
