"""One turn of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json

from proxyserve.api.schemas.base import GIVEN, LEFT_OUT, MAX_ENTRIES, AtMost, NotYet, RequestModel
from proxyserve.api.schemas.tools import FunctionName
from proxyserve.errors import InvalidRequest

#: Most calls in one turn, and longest id of a call and name of a speaker in characters.
MAX_CALLS = 128
MAX_CALL_ID = 256
MAX_NAME_OF_SPEAKER = 64


def _join_parts(value: Any) -> Any:
    """A list of text parts as one text, a line each."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise PydanticCustomError(
                "content_part", f"Part {index} is not text; other parts are not supported yet"
            )
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "content_part", f'Part {index} must be {{"type": "text", "text": string}}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[
    str,
    BeforeValidator(_join_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "description": "Text parts; they are joined with line breaks.",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
    AtMost(MAX_ENTRIES),
]


class CalledFunction(RequestModel):
    name: FunctionName
    arguments: Annotated[str, Field(description="JSON text of an object.")]

    parsed_arguments: Any = Field(
        None, description="OpenAI's client adds `arguments` as it read them. They change nothing."
    )


class ToolCall(RequestModel):
    """A call that the assistant made in an earlier turn. Some clients send `index` back from streams."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID)]
    type: Literal["function"] = "function"
    function: CalledFunction

    index: Annotated[Any, NotYet(*range(MAX_CALLS))] = None


_NO_CALLS = {"tool_calls": {"maxItems": 0}}
_NO_THOUGHTS = {"reasoning": {"maxLength": 0}, "reasoning_content": {"maxLength": 0}}
_ANSWERS_NO_CALL = {"tool_call_id": LEFT_OUT}

#: What `_check_role` asks of each role.
_BY_ROLE: dict[str, Any] = {
    "anyOf": [
        {
            "properties": {
                "role": {"enum": ["system", "developer", "user"]},
                "content": GIVEN,
                **_NO_CALLS,
                **_NO_THOUGHTS,
                **_ANSWERS_NO_CALL,
            },
            "required": ["content"],
        },
        {
            "properties": {"role": {"const": "assistant"}, "content": GIVEN, **_ANSWERS_NO_CALL},
            "required": ["content"],
        },
        {
            "properties": {
                "role": {"const": "assistant"},
                "tool_calls": {"type": "array", "minItems": 1},
                **_ANSWERS_NO_CALL,
            },
            "required": ["tool_calls"],
        },
        {
            "properties": {
                "role": {"const": "tool"},
                "content": GIVEN,
                "tool_call_id": GIVEN,
                **_NO_CALLS,
                **_NO_THOUGHTS,
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}


class Message(RequestModel):
    """One turn. `developer` is OpenAI's newer name for `system` and is rendered as that. `content` may be left out of
    an assistant's turn with `tool_calls`. A `tool` turn answers the call with its `tool_call_id`."""

    model_config = ConfigDict(json_schema_extra=_BY_ROLE)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_OF_SPEAKER)] | None = Field(
        None, description="Who speaks, for chat templates that show it."
    )
    tool_calls: Annotated[list[ToolCall], AtMost(MAX_CALLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID)] | None = None
    reasoning_content: str | None = Field(
        None,
        description="What the assistant thought before an earlier answer, for chat templates that show it.",
    )
    reasoning: str | None = Field(None, description="Another name of `reasoning_content`.")

    # Set on messages that clients send back as they came from an assistant.
    annotations: Annotated[Any, NotYet([])] = None
    audio: Annotated[Any, NotYet()] = None
    function_call: Annotated[Any, NotYet()] = None
    parsed: Any = Field(None, description="OpenAI's client adds `content` as it read it. It changes nothing.")
    refusal: Annotated[Any, NotYet()] = None


Messages = Annotated[list[Message], Field(min_length=1), AtMost(MAX_ENTRIES)]


def rendered(messages: Sequence[Message], param: str = "messages") -> list[dict[str, Any]]:
    """A conversation as chat templates want it: the arguments of calls are objects, nothing is null. Raises
    InvalidRequest, naming the field under `param`, where a turn has what its role does not have, lacks what it needs,
    or answers a call that was not made."""
    calls: set[str] = set()
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        where = f"{param}[{number}]"
        _check_role(message, where)
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        given = {
            "content": message.content,
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content or message.reasoning,
        }
        turn |= {name: value for name, value in given.items() if value is not None}
        if message.tool_calls:
            turn["tool_calls"] = [
                rendered_call(
                    call.id,
                    call.function.name,
                    call.function.arguments,
                    f"{where}.tool_calls[{index}].function.arguments",
                )
                for index, call in enumerate(message.tool_calls)
            ]
            calls.update(call.id for call in message.tool_calls)
        if message.tool_call_id is not None and message.tool_call_id not in calls:
            raise InvalidRequest(
                "No assistant's turn before this one has a call with this id.", param=f"{where}.tool_call_id"
            )
        turns.append(turn)
    return turns


def _check_role(message: Message, where: str) -> None:
    """Raise InvalidRequest for what does not go with the role."""
    role = message.role
    for name, owner in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("reasoning", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if getattr(message, name) and role != owner:
            raise InvalidRequest(
                f"Only turns of role '{owner}' have '{name}'; leave it out.", param=f"{where}.{name}"
            )
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(
            "This turn needs a content; only an assistant's turn with tool_calls may lack it.",
            param=f"{where}.content",
        )
    if role == "tool" and message.tool_call_id is None:
        raise InvalidRequest("A tool's turn must say which call it answers.", param=f"{where}.tool_call_id")
    both = (message.reasoning_content, message.reasoning)
    if None not in both and both[0] != both[1]:
        raise InvalidRequest(
            "It is another name of 'reasoning_content' and differs from it; give one of them.",
            param=f"{where}.reasoning",
        )


def rendered_call(call_id: str, name: str, arguments: str, param: str) -> dict[str, Any]:
    """A call of an earlier turn as chat templates want it. `param` is the field that `arguments`, JSON text, come from.
    Raises InvalidRequest if they are no object."""
    try:
        given = from_json(arguments, allow_inf_nan=False)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise InvalidRequest("It must be the JSON text of an object, such as {}.", param=param)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}
