"""The client; `async_client` has the same methods for asyncio."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from proxyserve_client import routes
from proxyserve_client.admin import Experts, Presets, drain_server
from proxyserve_client.connection import DEFAULT_URL, Readiness, not_ready, server_root, settings
from proxyserve_client.fusion import Fusion
from proxyserve_client.options import (
    ChatOptions,
    CompletionOptions,
    Message,
    ScoreOptions,
    chat_arguments,
    completion_arguments,
    streaming,
)
from proxyserve_client.reply import Reply
from proxyserve_client.routes import Load, TokenizerInfo, Tokens
from proxyserve_client.score import Scores, TextOrIds, score_call
from proxyserve_client.stream import TextStream

#: Seconds between two questions to a server that is not ready.
_POLL = 0.25


class ProxyServe:
    """Talks to one server. `openai` is the `openai.OpenAI` client underneath, for everything that has no method here;
    `experts` and `presets` are the server's control plane, for administrators' keys.

    `model` is used for requests that name none; without it, the first model that the server lists, its base. `api_key`
    defaults to the environment variable PROXYSERVE_API_KEY. Close the client, or use it with `with`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        max_retries: int = 2,
    ) -> None:
        self._root = server_root(url)
        self._model = model
        self.openai = openai.OpenAI(**settings(self._root, api_key, timeout, max_retries))
        self.experts = Experts(self.openai, self._root)
        self.presets = Presets(self.openai, self._root)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Reply:
        """Answer a chat; a string is one user message."""
        arguments = chat_arguments(model or self._default_model(), messages, fusion, options)
        return Reply.of_chat(self.openai.chat.completions.create(**arguments))

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Reply:
        """Continue a prompt given as text or token ids."""
        arguments = completion_arguments(model or self._default_model(), prompt, fusion, options)
        return Reply.of_completion(self.openai.completions.create(**arguments))

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> TextStream:
        """`chat`, piece by piece."""

        def send() -> openai.Stream[ChatCompletionChunk]:
            arguments = chat_arguments(model or self._default_model(), messages, fusion, options)
            return self.openai.chat.completions.create(**streaming(arguments))

        return TextStream(send)

    def stream_complete(
        self,
        prompt: str | Sequence[int],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[CompletionOptions],
    ) -> TextStream:
        """`complete`, piece by piece."""

        def send() -> openai.Stream[Completion]:
            arguments = completion_arguments(model or self._default_model(), prompt, fusion, options)
            return self.openai.completions.create(**streaming(arguments))

        return TextStream(send)

    def score(
        self,
        prompt: TextOrIds,
        continuations: Sequence[TextOrIds],
        *,
        top_logprobs: int | None = None,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """How likely each of `continuations` is after `prompt`; nothing is generated. `top_logprobs`: give this many
        likeliest tokens of each position as well."""
        call = score_call(
            model or self._default_model(),
            fusion,
            options,
            prompt=prompt,
            continuations=continuations,
            logprobs=top_logprobs,
        )
        return Scores.of(call.send(self.openai))

    def score_labels(
        self,
        prompt: TextOrIds,
        token_ids: Sequence[int],
        *,
        normalize: bool = False,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """How likely each of these tokens is as the next one after `prompt`. `normalize`: give their probabilities
        among themselves as well."""
        call = score_call(
            model or self._default_model(),
            fusion,
            options,
            prompt=prompt,
            label_token_ids=token_ids,
            normalize=normalize or None,
        )
        return Scores.of(call.send(self.openai))

    def score_texts(
        self,
        texts: Sequence[TextOrIds],
        *,
        top_logprobs: int | None = None,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """How likely each whole text is, from its second token on, and its perplexity."""
        call = score_call(model or self._default_model(), fusion, options, texts=texts, logprobs=top_logprobs)
        return Scores.of(call.send(self.openai))

    def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        names: bool = False,
    ) -> Tokens:
        """The base's ids of a text or of a conversation. `names`: give the tokens' names as well."""
        call = routes.tokenize(text, model, add_special_tokens, names)
        return Tokens.of(call.send(self.openai, self._root))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids of the base, special tokens included."""
        text: str = routes.detokenize(ids).send(self.openai, self._root)["prompt"]
        return text

    def tokenizer_info(self) -> TokenizerInfo:
        """The base's tokenizer."""
        return TokenizerInfo.of(routes.tokenizer_info().send(self.openai, self._root))

    def cancel(self, request_id: str) -> int:
        """End what is being answered under this id: a reply's or stream's `id`, or the `request_id` that was sent.
        Whoever waits for it gets an `openai.APIError` with code `request_cancelled`. Gives how many there were."""
        count: int = routes.cancel(request_id).send(self.openai, self._root)["cancelled"]
        return count

    def load(self) -> Load:
        """How busy the server is."""
        return Load.of(routes.load().send(self.openai, self._root))

    def models(self) -> tuple[str, ...]:
        """The names that `model` may have: the base first, then the base with each expert."""
        return tuple(entry.id for entry in self.openai.models.list())

    def ready(self) -> Readiness:
        """Whether the server takes requests now. False, with a reason, also where no server answers."""
        try:
            self.openai.with_options(max_retries=0).get(f"{self._root}/ready", cast_to=object)
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            return not_ready(error)
        return Readiness(True)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return as soon as the server takes requests. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (state := self.ready()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._root} is not ready after {timeout:g} s: {state.reason}")
            time.sleep(_POLL)

    def drain(self) -> None:
        """Have the server refuse new work and finish what runs. Takes an administrator's key."""
        drain_server().send(self.openai, self._root)

    def close(self) -> None:
        self.openai.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _default_model(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model
