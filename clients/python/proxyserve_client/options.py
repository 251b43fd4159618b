"""The options of a request and how they become arguments of the `openai` package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from openai.types.chat import (
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageParam,
    ChatCompletionToolChoiceOptionParam,
    completion_create_params,
)

from proxyserve_client.fusion import Fusion

#: One turn of a chat: `{"role": "user", "content": "..."}`, and OpenAI's others.
Message: TypeAlias = ChatCompletionMessageParam


class SharedOptions(TypedDict, total=False):
    """What chats and completions have in common. An option that is left out has the server's default.

    `timeout` is how many seconds this side waits for the answer, or for the next piece of a stream; `deadline` after
    how many seconds from its arrival the server gives the request up. `request_id` is a name for it that
    `client.cancel` takes, and that the server's log has.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int]
    skip_special_tokens: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    prompt_logprobs: int
    logprob_token_ids: Sequence[int]
    return_token_ids: bool
    n: int
    priority: int
    user: str
    safety_identifier: str
    prompt_cache_key: str
    cache_salt: str
    metadata: Mapping[str, str]
    structured_outputs: Mapping[str, Any]
    deadline: float
    request_id: str
    timeout: float


class ChatOptions(SharedOptions, total=False):
    """`logprobs` switches log-probabilities on, `top_logprobs` says of how many tokens beside the chosen one."""

    logprobs: bool
    top_logprobs: int
    max_completion_tokens: int
    tools: Sequence[ChatCompletionFunctionToolParam]
    tool_choice: ChatCompletionToolChoiceOptionParam
    parallel_tool_calls: bool
    response_format: completion_create_params.ResponseFormat
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
    thinking_budget: int
    chat_template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool


class CompletionOptions(SharedOptions, total=False):
    """`logprobs` is the number of most likely tokens to report, beside the chosen one. With `echo` text and log-probs
    of the prompt come before those of the answer, and `max_tokens` may be 0."""

    logprobs: int
    echo: bool
    return_tokens_as_token_ids: bool


class ScoreOptions(TypedDict, total=False):
    """What scores may be asked for beside texts."""

    priority: int
    user: str
    safety_identifier: str
    prompt_cache_key: str
    cache_salt: str
    metadata: Mapping[str, str]
    deadline: float
    request_id: str
    timeout: float


#: Fields of proxyserve that a method of the `openai` package has no parameter for.
_EXTENSIONS = (
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words"),
    *("allowed_token_ids", "skip_special_tokens", "prompt_logprobs", "logprob_token_ids", "return_token_ids"),
    *("return_tokens_as_token_ids", "structured_outputs", "thinking_budget", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
    *("priority", "safety_identifier", "prompt_cache_key", "cache_salt", "metadata"),
)


def chat_arguments(
    model: str, messages: str | Sequence[Message], fusion: Fusion | None, options: ChatOptions
) -> dict[str, Any]:
    """Arguments of `openai`'s `chat.completions.create`. A string is one user message."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"model": model, "messages": turns, **_arguments(fusion, options)}


def completion_arguments(
    model: str, prompt: str | Sequence[int], fusion: Fusion | None, options: CompletionOptions
) -> dict[str, Any]:
    """Arguments of `openai`'s `completions.create`. A prompt is text or token ids."""
    return {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        **_arguments(fusion, options),
    }


def streaming(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same request as a stream that ends with its usage."""
    return {**arguments, "stream": True, "stream_options": {"include_usage": True}}


def request_headers(request_id: str | None) -> dict[str, str]:
    """The header that names a request."""
    return {} if request_id is None else {"x-request-id": request_id}


def _arguments(fusion: Fusion | None, options: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(options)
    headers = request_headers(arguments.pop("request_id", None))
    extra_body = {name: arguments.pop(name) for name in _EXTENSIONS if name in arguments}
    if "deadline" in arguments:
        extra_body["timeout"] = arguments.pop("deadline")
    if fusion is not None:
        extra_body |= fusion.extra_body()
    if extra_body:
        arguments["extra_body"] = extra_body
    if headers:
        arguments["extra_headers"] = headers
    return arguments
