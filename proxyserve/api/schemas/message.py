"""One turn of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import NotYet, RequestModel


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
        if not isinstance(part, dict) or set(part) != {"type", "text"} or not isinstance(part["text"], str):
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
]


class Message(RequestModel):
    """One turn. `developer` is OpenAI's newer name for `system` and is rendered as that."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    # Set on messages that clients send back as they came from an assistant.
    annotations: Annotated[Any, NotYet([])] = None
    audio: Annotated[Any, NotYet()] = None
    function_call: Annotated[Any, NotYet()] = None
    name: Annotated[Any, NotYet()] = None
    refusal: Annotated[Any, NotYet()] = None
    tool_calls: Annotated[Any, NotYet([])] = None

    def rendered(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}
