"""Chat templates: from a conversation to the text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

from proxyserve.errors import InvalidRequest
from proxyserve.text.sandbox import OutOfBounds, SandboxedTemplate

#: What the server itself passes to templates.
OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

#: Names of a message's reasoning. Templates read one of the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")

#: Stands behind the content that an answer continues. Not characters, so that no message has it by chance. The space
#: shows whether the template trims contents.
_CONTINUED = "\ufdd0continued\ufdd1 "

_REFUSALS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class ChatTemplate:
    """One template, by its source. Thread-safe; compiled when it is first used."""

    def __init__(self, source: str) -> None:
        self.source = source

    @property
    def knows_tools(self) -> bool:
        return self.reads("tools")

    def reads(self, variable: str) -> bool:
        """Whether the template reads a variable that is passed to it. Raises InvalidRequest if it is no template."""
        return variable in _compiled(self.source).variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template` has it; the arguments of calls are objects.
        With `continue_final_message` the text ends where the last message's content does. Raises InvalidRequest if the
        template refuses the messages, is no template, or is stopped."""
        chat = [_normal(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] = f"{chat[-1].get('content', '')}{_CONTINUED}"
        given = {
            **(variables or {}),
            "messages": chat,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _render(_compiled(self.source), given)
        return _up_to_mark(text) if continue_final_message else text


@lru_cache(maxsize=64)
def _compiled(source: str) -> SandboxedTemplate:
    try:
        return SandboxedTemplate(source)
    except (TemplateError, RecursionError, OutOfBounds) as error:
        raise InvalidRequest(f"The chat template cannot be used: {error}", param="messages") from error


def _render(template: SandboxedTemplate, variables: Mapping[str, Any]) -> str:
    try:
        return template.render(variables)
    except OutOfBounds as error:
        raise InvalidRequest(f"The chat template was stopped: {error}.", param="messages") from error
    except (MemoryError, RecursionError) as error:
        raise InvalidRequest("The chat template was stopped: it does too much.", param="messages") from error
    except SecurityError as error:
        raise InvalidRequest(
            f"The chat template was stopped, since it does what no template may do: {error}", param="messages"
        ) from error
    except _REFUSALS as error:
        raise InvalidRequest(
            f"The chat template refuses these messages: {error}", param="messages"
        ) from error


def _normal(message: Mapping[str, Any]) -> dict[str, Any]:
    """What is null is left out, which templates understand better; reasoning has the names that they know."""
    normal = {key: value for key, value in message.items() if value is not None}
    reasoning = next((normal[name] for name in _REASONING if name in normal), None)
    if reasoning is not None:
        normal = {"thinking": reasoning, **normal, "reasoning_content": reasoning}
    return normal


def _up_to_mark(text: str) -> str:
    """The text before the mark."""
    before, mark, _ = text.rpartition(_CONTINUED)
    if mark:
        return before
    before, mark, _ = text.rpartition(_CONTINUED.strip())
    if mark:
        return before.rstrip()
    raise InvalidRequest(
        "The chat template does not write the last message as it is, so that it cannot be continued.",
        param="continue_final_message",
    )
