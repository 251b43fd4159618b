"""What a lane is prompted with, where it is not what the request says for all lanes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from proxyserve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class LanePrompt:
    """Exactly one of the fields is given.

    `route`: the request's messages, rendered by a chat template or as plain text. `text`, `tokens`, `messages`: a
    prompt of the lane's own. `prefix`: the request's prompt with this text before it (few-shot examples for one lane,
    say).
    """

    route: Literal["chat", "plain"] | None = None
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.route, self.text, self.tokens, self.messages, self.prefix) if value]
        if len(given) != 1:
            raise InvalidRequest(
                "A lane's prompt is \"chat\", \"plain\", or an object with exactly one of 'text', 'tokens', 'messages' "
                "and 'prefix', which must not be empty.",
                param="fusion.prompts",
            )
