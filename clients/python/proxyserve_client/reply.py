"""Answers, with typed access to what proxyserve adds to OpenAI's responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion
from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What fusion did to an answer, over all of its choices.

    `mean_kl` is the mean over generated positions of KL(fused || base) in nats, `flips` the number of positions where
    the fused argmax differs from the base's (both None where the base takes no part), `generations` the version of each
    expert that wrote the answer. `more` holds what the server reports beside these, such as `mean_weights`.
    """

    rule: str
    sum_of_weights: float
    generations: Mapping[str, int]
    mean_kl: float | None
    flips: int | None
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, response: BaseModel) -> FusionReport | None:
        """The report on a response (or the last chunk of a stream) of the `openai` package, if it has one. A request
        to the plain base has none."""
        body = _extension(response, "fusion")
        if body is None:
            return None
        known = ("rule", "sum_of_weights", "generations", "mean_kl", "flips")
        more = {name: value for name, value in body.items() if name not in known}
        return cls(**{name: body[name] for name in known}, more=more)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of an answer. `lane_tokens` counts, per model, the tokens that ran through it; prompt tokens that
    came from its prefix cache did not run. `cached_tokens` counts those of the base."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    lane_tokens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, usage: CompletionUsage) -> Usage:
        details = usage.prompt_tokens_details
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            (details.cached_tokens if details else None) or 0,
            _extension(usage, "lane_tokens") or {},
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` texts of an answer. `finish_reason` is `stop` or `length`."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. `raw` is the object of the `openai` package, for log-probs and all else; it is None for an
    answer that was put together from a stream."""

    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    fusion: FusionReport | None
    raw: ChatCompletion | Completion | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @classmethod
    def of_chat(cls, response: ChatCompletion) -> Reply:
        choices = (Choice(choice.message.content or "", choice.finish_reason) for choice in response.choices)
        return cls._of(response, tuple(choices))

    @classmethod
    def of_completion(cls, response: Completion) -> Reply:
        choices = (Choice(choice.text, choice.finish_reason) for choice in response.choices)
        return cls._of(response, tuple(choices))

    @classmethod
    def _of(cls, response: ChatCompletion | Completion, choices: tuple[Choice, ...]) -> Reply:
        usage = Usage.of(response.usage) if response.usage else None
        return cls(response.model, choices, usage, FusionReport.of(response), response)


def _extension(response: BaseModel, name: str) -> Any:
    """A field that the types of the `openai` package do not declare. They keep such fields."""
    return (response.model_extra or {}).get(name)
