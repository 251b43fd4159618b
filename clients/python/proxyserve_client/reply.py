"""Answers, with typed access to what proxyserve adds to OpenAI's responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from proxyserve_client.explain import ExplainedToken


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What fusion did to an answer, over all of its choices.

    `mean_kl` is the mean over generated positions of KL(fused || base) in nats, `flips` the number of positions where
    the fused argmax differs from the base's (both None where the base takes no part), `generations` the version of each
    expert that wrote the answer. `more` holds what the server reports beside these: `mean_weights`, `drafted`, ...
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
        return cls.of_json(_extension(response, "fusion"))

    @classmethod
    def of_json(cls, body: Any) -> FusionReport | None:
        """The report as it is in an answer; None if there is none."""
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
class PromptToken:
    """A token at one place of a prompt. `rank` is 1 for the likeliest there; None if it was not among those asked
    for."""

    token_id: int
    text: str
    logprob: float
    rank: int | None


#: The token that stands there, then the likeliest ones; None where nothing comes before.
PromptPlace = tuple[PromptToken, ...] | None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the request's tools. `arguments` are JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` texts of an answer. `finish_reason` is `stop`, `length` or `tool_calls`, `stop_reason` the stop
    string or token id that was met. The ids are there with `return_token_ids`; `prompt_logprobs`, for each token of the
    prompt, and `listed_logprobs`, for each of `logprob_token_ids` at each token, where they were asked for; `explain`,
    for each token, with `explain` in the fusion, and `prompt_explain` where the prompt's log-probs are found as well.
    `reasoning` is what a chat's model thought before its answer, for models whose reasoning is told apart."""

    text: str
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[PromptPlace, ...] | None = None
    listed_logprobs: tuple[Mapping[int, float] | None, ...] | None = None
    explain: tuple[ExplainedToken, ...] | None = None
    prompt_explain: tuple[ExplainedToken | None, ...] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, text: str, choice: BaseModel, prompt: BaseModel) -> Choice:
        """From a choice of the `openai` package. `prompt` is what has the fields about the prompt: the choice itself,
        or in a chat the response."""
        found = choice.model_extra or {}
        told = prompt.model_extra or {}
        return cls(
            text,
            getattr(choice, "finish_reason", None),
            found.get("stop_reason"),
            _tuple(found.get("token_ids")),
            _tuple(told.get("prompt_token_ids")),
            _prompt_places(told.get("prompt_logprobs")),
            _listed(found.get("listed_logprobs")),
            explained(choice),
            _explained_prompt(found.get("prompt_explain")),
            *_said_beside(choice),
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. `raw` is the object of the `openai` package, for log-probs and all else; it is None for an
    answer that was put together from a stream. `id` names the request, for `client.cancel` and the server's log."""

    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    fusion: FusionReport | None
    id: str = ""
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
        choices = (
            Choice.of(choice.message.content or "", choice, prompt=response) for choice in response.choices
        )
        return cls._of(response, tuple(choices))

    @classmethod
    def of_completion(cls, response: Completion) -> Reply:
        choices = (Choice.of(choice.text, choice, prompt=choice) for choice in response.choices)
        return cls._of(response, tuple(choices))

    @classmethod
    def _of(cls, response: ChatCompletion | Completion, choices: tuple[Choice, ...]) -> Reply:
        usage = Usage.of(response.usage) if response.usage else None
        return cls(response.model, choices, usage, FusionReport.of(response), response.id, response)


def _extension(response: BaseModel, name: str) -> Any:
    """A field that the types of the `openai` package do not declare. They keep such fields."""
    return (response.model_extra or {}).get(name)


def explained(choice: BaseModel) -> tuple[ExplainedToken, ...] | None:
    """The explanations of a choice, or of a piece of one."""
    tokens = _extension(choice, "explain")
    return None if tokens is None else tuple(map(ExplainedToken.of, tokens))


def _explained_prompt(tokens: list[dict[str, Any] | None] | None) -> tuple[ExplainedToken | None, ...] | None:
    if tokens is None:
        return None
    return tuple(None if token is None else ExplainedToken.of(token) for token in tokens)


def _said_beside(choice: BaseModel) -> tuple[str | None, tuple[ToolCall, ...]]:
    """Reasoning and calls of a chat's choice."""
    message = getattr(choice, "message", None)
    if message is None:
        return None, ()
    calls = (
        ToolCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
    )
    return _extension(message, "reasoning_content"), tuple(calls)


def _tuple(ids: list[int] | None) -> tuple[int, ...] | None:
    return None if ids is None else tuple(ids)


def _prompt_places(places: list[dict[str, Any] | None] | None) -> tuple[PromptPlace, ...] | None:
    """From vLLM's shape, whose keys are ids."""
    if places is None:
        return None
    return tuple(
        None
        if place is None
        else tuple(
            PromptToken(int(token), entry["decoded_token"], entry["logprob"], entry["rank"])
            for token, entry in place.items()
        )
        for place in places
    )


def _listed(places: list[dict[str, float] | None] | None) -> tuple[Mapping[int, float] | None, ...] | None:
    if places is None:
        return None
    return tuple(
        None if place is None else {int(token): value for token, value in place.items()} for place in places
    )
