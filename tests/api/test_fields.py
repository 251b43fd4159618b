"""Every field of the requests that run models is shown to count: it changes the answer, or what is asked of the engine,
or it is refused. A field without an entry in `FIELDS` fails; so does an entry whose field is gone.

    Changes(before, change)   two requests that differ in the field (and what it needs) have different answers
    Shown(where)              a test elsewhere shows it: `file::function`, seen from tests/
    Described(why)            it changes nothing on purpose, and its description says so

Fields that only `NotYet` describes need no entry: anything but what asks for nothing is refused, which is tried here.
Entries are by the class that declares the field. Those of fields that several routes have are tried on each.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from proxyserve.api.fields import tables
from proxyserve.api.schemas.base import NotYet, RequestModel
from proxyserve.api.schemas.chat import ChatRequest
from proxyserve.api.schemas.completions import CompletionRequest
from proxyserve.api.schemas.other import DetokenizeRequest, TokenizeRequest
from proxyserve.api.schemas.responses_api import ResponsesRequest
from proxyserve.api.schemas.score import ScoreRequest
from proxyserve.models.model_set import ModelSet
from tests.api.fakes import FakeEngine, last
from tests.api.live import Live, serve, wait_until

#: The requests whose fields are walked, nested ones too.
BODIES = (CompletionRequest, ChatRequest, ResponsesRequest, ScoreRequest, TokenizeRequest, DetokenizeRequest)
PATHS = {
    CompletionRequest: "/v1/completions",
    ChatRequest: "/v1/chat/completions",
    ResponsesRequest: "/v1/responses",
}
PROMPTS: dict[type[RequestModel], dict[str, Any]] = {
    CompletionRequest: {"prompt": "The quick"},
    ChatRequest: {"messages": [{"role": "user", "content": "The quick"}]},
    ResponsesRequest: {"input": "The quick"},
}


@dataclass(frozen=True)
class Changes:
    change: Mapping[str, Any]
    before: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    where: str


@dataclass(frozen=True)
class Described:
    why: str


Evidence = Changes | Shown | Described

GREEDY = {"temperature": 0, "max_tokens": 8}
LONG = GREEDY | {"max_tokens": 48, "ignore_eos": True}
WARM = {"temperature": 1.5, "seed": 11, "max_tokens": 12}
ENDS = GREEDY | {"logit_bias": {"0": 100}}  # with the end-of-text token at once
SAYS_M = GREEDY | {"logit_bias": {"77": 100}}
LAW = GREEDY | {"logprobs": 1}
SCORES = "api/test_score.py"
TOKENS = "api/test_small_routes.py"
TOOLS = "api/test_tools.py"
ITEMS = "api/test_responses.py"
TURNS, RESULTS = "test_conversation_goes_on_with_items", "test_tool_results_come_back"
LOGPROBS = ["message.output_text.logprobs"]
#: Of a response, what does not merely repeat the request.
ANSWERED = ("output", "status", "stop_reason", "fusion", "explain", "grammar")


def fused(**fusion: Any) -> dict[str, Any]:
    return {"model": "atlas", "fusion": fusion}


def form(kind: str, schema: Any = None) -> dict[str, Any]:
    more = {} if schema is None else {"json_schema": {"name": "x", "schema": schema}}
    return {"response_format": {"type": kind, **more}}


def rule(name: str, before: Mapping[str, Any], **parameters: Any) -> dict[str, Evidence]:
    """Parameters of a rule, each with another value."""
    first = LAW | fused(rule=name, **before)
    entries: dict[str, Evidence] = {"rule": Changes(first, LAW | {"model": "atlas"})}
    for parameter, value in parameters.items():
        entries[parameter] = Changes(fused(rule=name, **{**before, parameter: value}), first)
    return entries


QA, RECORD = {"experts": {"qa": 1}}, {"record": 1}

FIELDS: dict[str, dict[str, Evidence]] = {
    "EngineRequest": {
        "model": Changes({"model": "atlas+record"}, GREEDY),
        "fusion": Changes(fused(experts=RECORD), GREEDY | fused(**QA)),
        "priority": Shown("api/test_fields.py::test_priority_is_asked_of_the_engine"),
        "timeout": Shown("api/test_limits.py::test_every_route_has_deadlines"),
        "user": Shown("api/test_fields.py::test_prefix_cache_is_apart"),
        "safety_identifier": Shown("api/test_fields.py::test_prefix_cache_is_apart"),
        "prompt_cache_key": Shown("api/test_fields.py::test_prefix_cache_is_apart"),
        "cache_salt": Shown("api/test_fields.py::test_prefix_cache_is_apart"),
        "metadata": Shown("api/test_fields.py::test_metadata_are_logged"),
    },
    "SampledRequest": {
        "temperature": Changes({"temperature": 0.5}, WARM),
        "top_p": Changes({"top_p": 0.2}, WARM),
        "top_k": Changes({"top_k": 2}, WARM),
        "min_p": Changes({"min_p": 0.5}, WARM),
        "seed": Changes({"seed": 12}, WARM),
        "presence_penalty": Changes({"presence_penalty": 2.0}, LONG),
        "frequency_penalty": Changes({"frequency_penalty": 2.0}, LONG),
        "repetition_penalty": Changes({"repetition_penalty": 3.0}, LONG),
        "logit_bias": Changes({"logit_bias": {"77": 100}}, GREEDY),
        "allowed_token_ids": Changes({"allowed_token_ids": [70, 71]}, GREEDY),
        "bad_words": Changes({"bad_words": ["m"]}, SAYS_M),
        "min_tokens": Changes({"min_tokens": 4}, ENDS),
        "stop": Changes({"stop": "mm"}, SAYS_M),
        "stop_token_ids": Changes({"stop_token_ids": [77]}, SAYS_M),
        "ignore_eos": Changes({"ignore_eos": True}, ENDS),
        "skip_special_tokens": Changes({"skip_special_tokens": False}, ENDS | {"ignore_eos": True}),
        "structured_outputs": Changes({"structured_outputs": {"choice": ["ma", "mb"]}}, GREEDY),
        "stream": Shown("api/test_completions.py::test_stream_joins_to_the_whole_answer"),
    },
    "GenerationRequest": {
        "max_tokens": Changes({"max_tokens": 5}, SAYS_M),
        "prompt_logprobs": Changes({"prompt_logprobs": 1}, GREEDY),
        "logprob_token_ids": Changes({"logprob_token_ids": [5, 77]}, GREEDY),
        "return_token_ids": Changes({"return_token_ids": True}, GREEDY),
        "n": Changes({"n": 2}, WARM),
        "stream_options": Shown("api/test_completions.py::test_stream_joins_to_the_whole_answer"),
    },
    "StreamOptions": {
        "include_usage": Shown("api/test_chat.py::test_stream_usage_comes_last_and_alone"),
    },
    "CompletionRequest": {
        "prompt": Changes({"prompt": "name: Ada"}, GREEDY),
        "echo": Changes({"echo": True}, GREEDY),
        "logprobs": Changes({"logprobs": 1}, GREEDY),
        "return_tokens_as_token_ids": Changes({"return_tokens_as_token_ids": True}, LAW),
        "best_of": Shown("api/test_echo.py::test_refusals"),
    },
    "ChatRequest": {
        "messages": Changes({"messages": [{"role": "user", "content": "Bye"}]}, GREEDY),
        "max_completion_tokens": Changes(
            {"max_completion_tokens": 5}, {"temperature": 0, "max_completion_tokens": 8}
        ),
        "logprobs": Changes({"logprobs": True}, GREEDY),
        "top_logprobs": Changes({"top_logprobs": 2}, GREEDY | {"logprobs": True}),
        "response_format": Changes(form("json_object"), GREEDY),
        "tools": Shown(f"{TOOLS}::test_calls_whole"),
        "tool_choice": Shown(f"{TOOLS}::test_refusal_names_the_field"),
        "parallel_tool_calls": Shown(f"{TOOLS}::test_one_call_ends_the_answer_without_parallel_calls"),
        "reasoning_effort": Shown(f"{TOOLS}::test_template_variables"),
        "thinking_budget": Shown(f"{TOOLS}::test_thinking_budget_becomes_a_constraint"),
        "chat_template_kwargs": Shown(f"{TOOLS}::test_template_variables"),
        "add_generation_prompt": Changes({"add_generation_prompt": False}, GREEDY),
        "continue_final_message": Shown(f"{TOOLS}::test_last_message_is_continued"),
    },
    "Message": {
        "role": Changes({"messages": [{"role": "assistant", "content": "The quick"}]}, GREEDY),
        "content": Changes({"messages": [{"role": "user", "content": "Bye"}]}, GREEDY),
        "name": Shown(f"{TOOLS}::test_conversation_with_calls_comes_back"),
        "tool_calls": Shown(f"{TOOLS}::test_conversation_with_calls_comes_back"),
        "tool_call_id": Shown(f"{TOOLS}::test_conversation_with_calls_comes_back"),
        "reasoning_content": Shown(f"{TOOLS}::test_reasoning_comes_back_in_the_prompt"),
        "reasoning": Shown(f"{TOOLS}::test_reasoning_comes_back_in_the_prompt"),
        "parsed": Described("OpenAI's client sends back what it has read; `content` is rendered"),
    },
    "ToolCall": dict.fromkeys(
        ("id", "type", "function"), Shown(f"{TOOLS}::test_conversation_with_calls_comes_back")
    ),
    "CalledFunction": {
        **dict.fromkeys(("name", "arguments"), Shown(f"{TOOLS}::test_conversation_with_calls_comes_back")),
        "parsed_arguments": Described(
            "OpenAI's client sends back what it has read; `arguments` are rendered"
        ),
    },
    "ToolBody": dict.fromkeys(("type", "function"), Shown(f"{TOOLS}::test_calls_whole")),
    "FunctionBody": dict.fromkeys(
        ("name", "description", "parameters", "strict"), Shown(f"{TOOLS}::test_calls_whole")
    ),
    "ToolChoiceBody": dict.fromkeys(
        ("type", "function", "allowed_tools"), Shown(f"{TOOLS}::test_refusal_names_the_field")
    ),
    "FunctionReference": {"name": Shown(f"{TOOLS}::test_refusal_names_the_field")},
    "NamedTool": dict.fromkeys(("type", "function"), Shown(f"{TOOLS}::test_refusal_names_the_field")),
    "AllowedTools": dict.fromkeys(("mode", "tools"), Shown(f"{TOOLS}::test_refusal_names_the_field")),
    "StructuredOutputs": {
        "json_": Changes({"structured_outputs": {"json": {"type": "boolean"}}}, GREEDY),
        "regex": Changes({"structured_outputs": {"regex": "[ab]{3}"}}, GREEDY),
        "choice": Changes({"structured_outputs": {"choice": ["ma", "mb"]}}, GREEDY),
        "grammar": Changes({"structured_outputs": {"grammar": 'start: "ab"'}}, GREEDY),
        "structural_tag": Shown("grammar/test_constraint.py::test_tags"),
    },
    "StructuralTag": dict.fromkeys(
        ("structures", "triggers"), Shown("grammar/test_constraint.py::test_tags")
    ),
    "TaggedJson": dict.fromkeys(("begin", "schema_", "end"), Shown("grammar/test_constraint.py::test_tags")),
    "TextFormat": {"type": Described("text is what there is without any form")},
    "JsonObjectFormat": {"type": Changes(form("json_object"), GREEDY)},
    "JsonSchemaFormat": {
        "type": Changes(form("json_schema", {"type": "boolean"}), GREEDY | form("json_object")),
        "json_schema": Changes(form("json_schema", {"type": "boolean"}), GREEDY),
    },
    "NamedSchema": {
        "schema_": Changes(
            form("json_schema", {"type": "boolean"}), GREEDY | form("json_schema", {"type": "null"})
        ),
        "name": Described("it is for people"),
        "description": Described("it is for people"),
        "strict": Described("the schema is enforced whatever it says"),
    },
    "ResponsesRequest": {
        "input": Changes({"input": [{"role": "user", "content": "Bye"}]}, GREEDY),
        "instructions": Changes({"instructions": "Be brief."}, GREEDY),
        "max_output_tokens": Changes({"max_tokens": 5}, GREEDY),
        "include": Changes({"include": LOGPROBS}, GREEDY),
        "top_logprobs": Changes({"top_logprobs": 2}, GREEDY | {"include": LOGPROBS}),
        "tools": Shown(f"{ITEMS}::test_reasoning_and_calls"),
        "tool_choice": Shown(f"{ITEMS}::test_refusals_name_the_field"),
        "parallel_tool_calls": Shown(f"{ITEMS}::test_tools_are_those_of_chat"),
        "text": Changes({"text": {"format": {"type": "json_object"}}}, GREEDY),
        "reasoning": Shown(f"{ITEMS}::test_refusals_name_the_field"),
        "stream_options": Shown(f"{ITEMS}::test_refusals_name_the_field"),
    },
    "MessageItem": dict.fromkeys(("type", "role", "content"), Shown(f"{ITEMS}::{TURNS}")),
    "TextPart": {
        "type": Shown(f"{ITEMS}::{TURNS}"),
        "text": Shown(f"{ITEMS}::{TURNS}"),
        "logprobs": Described("it comes with earlier outputs"),
    },
    "_Item": dict.fromkeys(("id", "status"), Described("it comes with earlier outputs")),
    "ReasoningInput": dict.fromkeys(("type", "content"), Shown(f"{ITEMS}::{RESULTS}")),
    "ReasoningPart": dict.fromkeys(("type", "text"), Shown(f"{ITEMS}::{RESULTS}")),
    "FunctionCallInput": dict.fromkeys(
        ("type", "call_id", "name", "arguments"), Shown(f"{ITEMS}::{RESULTS}")
    ),
    "FunctionCallOutput": dict.fromkeys(("type", "call_id", "output"), Shown(f"{ITEMS}::{RESULTS}")),
    "FunctionTool": dict.fromkeys(
        ("type", "name", "description", "parameters", "strict"),
        Shown(f"{ITEMS}::test_tools_are_those_of_chat"),
    ),
    "NamedFunction": dict.fromkeys(("type", "name"), Shown(f"{ITEMS}::test_tools_are_those_of_chat")),
    "AllowedFunctions": dict.fromkeys(
        ("type", "mode", "tools"), Shown(f"{ITEMS}::test_tools_are_those_of_chat")
    ),
    "TextConfig": {"format": Changes({"text": {"format": {"type": "json_object"}}}, GREEDY)},
    "JsonSchemaText": {"type": Shown(f"{ITEMS}::test_parse")},
    "ReasoningConfig": {"effort": Shown(f"{ITEMS}::test_refusals_name_the_field")},
    "FusionObject": {
        "support": Changes(fused(**QA, support={"of": ["base"], "top_k": 2}), LAW | fused(**QA)),
        "target_entropy": Shown("api/test_fusion.py::test_target_entropy_is_seen_in_the_answer"),
        "gate": Changes(fused(**QA, gate={"confidence": 0.0}), LAW | fused(**QA)),
        "prompts": Changes(fused(**QA, prompts={"qa.tuned": {"prefix": "Bye. "}}), LAW | fused(**QA)),
        "explain": Changes(fused(**QA, explain=1), LAW | fused(**QA)),
    },
    "SupportObject": {
        "of": Changes(
            fused(**QA, support={"of": ["tuned"], "top_k": 2}),
            LAW | fused(**QA, support={"of": ["base"], "top_k": 2}),
        ),
        "top_p": Changes(fused(**QA, support={"of": ["base"], "top_p": 0.1}), LAW | fused(**QA)),
        "top_k": Changes(fused(**QA, support={"of": ["base"], "top_k": 2}), LAW | fused(**QA)),
        "min_p": Changes(fused(**QA, support={"of": ["base"], "min_p": 0.9}), LAW | fused(**QA)),
        "outside": Changes(
            fused(**QA, support={"of": ["base"], "top_k": 2, "outside": "base"}),
            LAW | fused(**QA, support={"of": ["base"], "top_k": 2}),
        ),
    },
    "GateObject": {
        "confidence": Changes(
            fused(**QA, gate={"confidence": 0.0}), LAW | fused(**QA, gate={"confidence": 1.0})
        ),
    },
    "LanePromptObject": {
        "route": Shown("api/test_chat.py::test_routes_give_lanes_different_prompts"),
        "text": Changes(fused(**QA, prompts={"qa.tuned": {"text": "Bye."}}), LAW | fused(**QA)),
        "tokens": Changes(fused(**QA, prompts={"qa.tuned": {"tokens": [70, 71]}}), LAW | fused(**QA)),
        "messages": Shown("api/test_fusion.py::test_prompts_per_lane"),
        "prefix": Changes(fused(**QA, prompts={"qa.tuned": {"prefix": "Bye. "}}), LAW | fused(**QA)),
    },
    "ProxyFusion": rule("proxy", QA, experts=RECORD),
    "ArmFusion": rule("arm", QA, experts=RECORD),
    "UpscaleFusion": rule("upscale", QA, experts=RECORD, beta=3.0, top_p=0.2),
    "DynamicFusion": {
        **rule("dynamic", QA, experts=RECORD, mode="paper", match="forward", max_weight=0.01),
        "kl": Changes(
            fused(rule="dynamic", mode="budget", kl=0.5, **QA),
            LAW | fused(rule="dynamic", mode="budget", kl=0.01, **QA),
        ),
    },
    "ContrastFusion": rule("contrast", QA, experts=RECORD, gamma=0.3, alpha=0.9),
    "UnlearnFusion": rule("unlearn", QA, experts=RECORD, alpha=1.0),
    "GuidanceFusion": {
        **rule("guidance", {"negative_prompt": "Bye"}, scale=3.0, negative_prompt="name"),
        "negative_messages": Shown("api/test_fusion.py::test_context_aware_decoding_is_guidance"),
    },
    "MixtureFusion": rule(
        "mixture", {"models": {"base": 0.5, "qa.tuned": 0.5}}, models={"base": 0.9, "qa.tuned": 0.1}, r=0
    ),
    "EditFusion": dict.fromkeys(
        ("rule", "experts", "budget"), Shown("api/test_fusion.py::test_edit_takes_the_calibrated_weight")
    ),
    "FormulaFusion": rule("formula", {"formula": "base + qa"}, formula="base + 0.5*qa"),
    "ScoreRequest": {
        "prompt": Shown(f"{SCORES}::test_continuations"),
        "continuations": Shown(f"{SCORES}::test_continuations"),
        "label_token_ids": Shown(f"{SCORES}::test_labels"),
        "normalize": Shown(f"{SCORES}::test_labels"),
        "texts": Shown(f"{SCORES}::test_whole_texts"),
        "logprobs": Shown(f"{SCORES}::test_top_of_each_position"),
    },
    "TokenizeRequest": {
        "model": Shown(f"{TOKENS}::test_tokenizing_refusals"),
        "prompt": Shown(f"{TOKENS}::test_tokens_round_trip"),
        "messages": Shown(f"{TOKENS}::test_messages_are_rendered_as_for_chat"),
        "add_special_tokens": Shown(f"{TOKENS}::test_special_tokens_can_be_left_out"),
        "return_token_strs": Shown(f"{TOKENS}::test_names_of_tokens"),
    },
    "DetokenizeRequest": {
        "model": Shown(f"{TOKENS}::test_tokenizing_refusals"),
        "tokens": Shown(f"{TOKENS}::test_tokens_round_trip"),
    },
}


# What fields there are --------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> Iterator[type[RequestModel]]:
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def reachable() -> list[type[RequestModel]]:
    """The bodies, and every object that can stand in them."""
    found: dict[type[RequestModel], None] = dict.fromkeys(BODIES)
    queue = list(BODIES)
    while queue:
        for info in queue.pop().model_fields.values():
            for model in models_in(info.annotation):
                if model not in found:
                    found[model] = None
                    queue.append(model)
    return list(found)


def declared() -> dict[tuple[str, str], FieldInfo]:
    """By the class that declares them, and their names."""
    found = {}
    for model in reachable():
        for name, info in model.model_fields.items():
            found[owner_of(model, name), name] = info
    return found


def owner_of(model: type[RequestModel], name: str) -> str:
    """The class that declares the field."""
    return next(cls for cls in reversed(model.__mro__) if name in inspect.get_annotations(cls)).__name__


def is_refused(info: FieldInfo) -> bool:
    return any(isinstance(entry, NotYet) for entry in info.metadata)


def test_the_documentation_is_made_of_the_fields(repository: Path) -> None:
    page = (repository / "docs" / "http_api.md").read_text()
    assert page.endswith(tables()), (
        "run: python -m proxyserve.api.fields, and put it at the end of docs/http_api.md"
    )
    undescribed = re.findall(r"^\| `(\w+)`.*\|  \|$", tables(), re.MULTILINE)
    assert not undescribed, "these fields need a description"
    documented = set(re.findall(r"^\| `(\w+)`", tables(), re.MULTILINE))
    supported = {name for body in BODIES for name, info in body.model_fields.items() if not is_refused(info)}
    assert supported <= documented


def test_every_field_has_an_entry() -> None:
    known = {key for key, info in declared().items() if not is_refused(info)}
    listed = {(owner, name) for owner, fields in FIELDS.items() for name in fields}
    assert known - listed == set(), "say here what shows that these fields count"
    assert listed - known == set(), "there are no such fields"


@pytest.mark.parametrize(
    "where", sorted({e.where for f in FIELDS.values() for e in f.values() if isinstance(e, Shown)})
)
def test_tests_named_here_exist(repository: Path, where: str) -> None:
    file, _, function = where.partition("::")
    tree = ast.parse((repository / "tests" / file).read_text())
    assert function in {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


# What they do -----------------------------------------------------------------------------------------------------


def tried() -> Iterator[Any]:
    for owner, fields in FIELDS.items():
        for name, evidence in fields.items():
            if isinstance(evidence, Changes):
                for body in routes_of(owner):
                    yield pytest.param(body, evidence, id=f"{owner}.{name}-{PATHS[body]}")


def routes_of(owner: str) -> list[type[RequestModel]]:
    if owner in ("EngineRequest", "SampledRequest"):
        return list(PATHS)
    if owner in ("ResponsesRequest", "TextConfig"):
        return [ResponsesRequest]
    if owner == "GenerationRequest":
        return [CompletionRequest, ChatRequest]
    of_chat = ("ChatRequest", "Message", "JsonObjectFormat", "JsonSchemaFormat", "NamedSchema")
    return [ChatRequest] if owner in of_chat else [CompletionRequest]


def named_for(path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """`/v1/responses` has another name for `max_tokens`."""
    name = "max_output_tokens" if path == PATHS[ResponsesRequest] else "max_tokens"
    return {name if field == "max_tokens" else field: value for field, value in request.items()}


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """By request: many entries have the same one before the change."""
    return {}


def answer(live: Live, answers: dict[str, Any], body: type[RequestModel], request: Mapping[str, Any]) -> Any:
    """What a client sees of the answer but for its name, its time and what it cost."""
    key = json.dumps([PATHS[body], request], sort_keys=True)
    if key not in answers:
        seen = [whole(live, PATHS[body], request) for _ in range(2)]
        assert plain(seen[0]) == plain(seen[1]), "not reproducible, so it shows nothing"
        answers[key] = plain(seen[0])
    return answers[key]


def whole(live: Live, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    response = live.post(path, **named_for(path, request))
    assert response.status_code == 200, response.text
    seen: dict[str, Any] = response.json()
    if path == PATHS[ResponsesRequest]:
        items = [{key: value for key, value in item.items() if key != "id"} for item in seen["output"]]
        return {key: value for key, value in seen.items() if key in ANSWERED} | {"output": items}
    return {key: value for key, value in seen.items() if key not in ("id", "created", "usage")}


def plain(value: Any) -> Any:
    """Rounded, since a prompt that is in the prefix cache is computed in other pieces."""
    if isinstance(value, float):
        return round(value, 2) + 0.0
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if key != "model"}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("body", "evidence"), [*tried()])
def test_field_changes_the_answer(
    live: Live, answers: dict[str, Any], body: type[RequestModel], evidence: Changes
) -> None:
    before = {"model": "atlas+qa", **PROMPTS[body], **evidence.before}
    after = {**before, **evidence.change}
    assert answer(live, answers, body, before) != answer(live, answers, body, after)


@pytest.mark.parametrize(
    ("owner", "name"), [key for key, info in declared().items() if is_refused(info)], ids=lambda name: name
)
def test_field_without_support_is_refused(owner: str, name: str) -> None:
    model = next(
        model for model in reachable() if name in model.model_fields and owner_of(model, name) == owner
    )
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(model).validate_python({name: {"anything": 1}})
    kinds = {error["loc"]: error["type"] for error in refusal.value.errors()}
    assert kinds[name,] == "not_supported_yet"


APART = ("user", "safety_identifier", "prompt_cache_key", "cache_salt")


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("path", PATHS.values())
def test_prefix_cache_is_apart(live: Live, path: str, name: str) -> None:
    # Different from the first block on, or they would share that.
    text = (
        f"{name[0]}{len(path)} The quick brown fox jumps over the lazy dog, twice, and says: nobody knows. "
        * 2
    )
    prompts: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/responses": {"input": text},
    }

    def cached(**body: Any) -> int:
        request = {"model": "atlas+qa", "max_tokens": 1, **prompts[path], **body}
        usage = live.post(path, **named_for(path, request)).json()["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        return details["cached_tokens"]

    assert cached() == 0
    assert cached() > 0
    assert cached(**{name: "ann"}) == 0
    assert cached(**{name: "ann"}) > 0
    assert cached(**{name: "bob"}) == 0
    others = [other for other in APART if other != name]
    assert all(cached(**{other: "ann"}) == 0 for other in others), (
        "the same word in another field is another one"
    )


@pytest.mark.parametrize("body", PATHS)
def test_priority_is_asked_of_the_engine(tiny_models: ModelSet, body: type[RequestModel]) -> None:
    async def script(submissions: Any) -> Any:
        for submission in submissions:
            yield last(submission)

    engine = FakeEngine(tiny_models, script)
    with serve(engine) as live:
        for given in ({}, {"priority": -5}, {"priority": 7}):
            request = {"model": "atlas+qa", "max_tokens": 1, **PROMPTS[body], **given}
            assert live.post(PATHS[body], **named_for(PATHS[body], request)).status_code == 200
    assert [submission.priority for submission in engine.submitted] == [0, -5, 7]


@pytest.mark.parametrize("body", PATHS)
def test_metadata_are_logged(live: Live, body: type[RequestModel], caplog: pytest.LogCaptureFixture) -> None:
    tags = {"team": "search", "run": "7"}
    with caplog.at_level(logging.INFO, logger="proxyserve.requests"):
        request = {"model": "atlas+qa", "max_tokens": 1, "metadata": tags, **PROMPTS[body]}
        live.post(PATHS[body], **named_for(PATHS[body], request))
        wait_until(lambda: any(record.name == "proxyserve.requests" for record in caplog.records))
    (record,) = [record for record in caplog.records if record.name == "proxyserve.requests"]
    assert record.fields["metadata"] == tags
