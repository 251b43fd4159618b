"""From the items of `/v1/responses` to the messages that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxyserve.api.schemas.message import rendered_call
from proxyserve.api.schemas.response_input import (
    FunctionCallInput,
    FunctionCallOutput,
    InputItem,
    MessageItem,
    ReasoningInput,
    joined,
)
from proxyserve.errors import InvalidRequest

ChatMessage = dict[str, Any]


def messages_of(instructions: str | None, items: Sequence[InputItem]) -> list[ChatMessage]:
    """Instructions come first, as a system message. What the assistant thought, said and called in a row is one
    message, as chat templates have it. Raises InvalidRequest for items that do not fit together."""
    conversation = _Conversation()
    if instructions:
        conversation.messages.append({"role": "system", "content": instructions})
    for number, item in enumerate(items):
        match item:
            case MessageItem(role="assistant"):
                conversation.say(joined(item.content))
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                conversation.messages.append({"role": role, "content": joined(item.content)})
            case ReasoningInput():
                conversation.think("\n".join(part.text for part in item.content or ()))
            case FunctionCallInput():
                conversation.call(item, f"input[{number}]")
            case FunctionCallOutput():
                conversation.answer(item, f"input[{number}]")
    if not conversation.messages:
        raise InvalidRequest("There is no message in it.", param="input")
    return conversation.messages


class _Conversation:
    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._names: dict[str, str] = {}  # of the functions called, by call id

    def say(self, text: str) -> None:
        turn = self._turn()
        if turn["content"] or "tool_calls" in turn:
            turn = self._new_turn()
        turn["content"] = text

    def think(self, text: str) -> None:
        if not text:
            return
        turn = self._turn()
        if turn["content"] or "tool_calls" in turn:
            turn = self._new_turn()
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = f"{before}\n{text}" if before else text

    def call(self, item: FunctionCallInput, param: str) -> None:
        self._names[item.call_id] = item.name
        call = rendered_call(item.call_id, item.name, item.arguments, f"{param}.arguments")
        self._turn().setdefault("tool_calls", []).append(call)

    def answer(self, item: FunctionCallOutput, param: str) -> None:
        name = self._names.get(item.call_id)
        if name is None:
            raise InvalidRequest(
                "No function_call before it has this id. Nothing is kept of earlier responses; send their items.",
                param=f"{param}.call_id",
            )
        result = {"role": "tool", "tool_call_id": item.call_id, "name": name, "content": joined(item.output)}
        self.messages.append(result)

    def _turn(self) -> ChatMessage:
        """The assistant's message that is being put together."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return self._new_turn()

    def _new_turn(self) -> ChatMessage:
        self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]
