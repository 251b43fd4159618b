"""The options of a request and how they become arguments of the `openai` package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from proxyserve_client.fusion import Fusion


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class SharedOptions(TypedDict, total=False):
    """What chats and completions have in common. An option that is left out has the server's default."""

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
    timeout: float


class ChatOptions(SharedOptions, total=False):
    """`logprobs` switches log-probabilities on, `top_logprobs` says of how many tokens beside the chosen one."""

    logprobs: bool
    top_logprobs: int


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
    timeout: float


#: Fields of proxyserve that a method of the `openai` package has no parameter for.
_EXTENSIONS = (
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words"),
    *("allowed_token_ids", "skip_special_tokens", "prompt_logprobs", "logprob_token_ids", "return_token_ids"),
    *(
        "return_tokens_as_token_ids",
        "priority",
        "safety_identifier",
        "prompt_cache_key",
        "cache_salt",
        "metadata",
    ),
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


def _arguments(fusion: Fusion | None, options: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(options)
    extra_body = {name: arguments.pop(name) for name in _EXTENSIONS if name in arguments}
    if fusion is not None:
        extra_body |= fusion.extra_body()
    if extra_body:
        arguments["extra_body"] = extra_body
    return arguments
