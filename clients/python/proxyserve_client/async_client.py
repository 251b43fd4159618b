"""The client for asyncio: the methods of `client`, to be awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from proxyserve_client import routes
from proxyserve_client.admin import AsyncExperts, AsyncPresets, drain_server
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
from proxyserve_client.stream import AsyncTextStream

#: Seconds between two questions to a server that is not ready.
_POLL = 0.25


class AsyncProxyServe:
    """`ProxyServe` for asyncio. `stream_chat` and `stream_complete` are not awaited: what they return is used with
    `async for`, inside `async with` where it may be left early."""

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
        self.openai = openai.AsyncOpenAI(**settings(self._root, api_key, timeout, max_retries))
        self.experts = AsyncExperts(self.openai, self._root)
        self.presets = AsyncPresets(self.openai, self._root)

    async def chat(
        self,
        messages: str | Sequence[Message],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> Reply:
        """Answer a chat; a string is one user message."""
        arguments = chat_arguments(model or await self._default_model(), messages, fusion, options)
        return Reply.of_chat(await self.openai.chat.completions.create(**arguments))

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Reply:
        """Continue a prompt given as text or token ids."""
        arguments = completion_arguments(model or await self._default_model(), prompt, fusion, options)
        return Reply.of_completion(await self.openai.completions.create(**arguments))

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncTextStream:
        """`chat`, piece by piece."""

        async def send() -> openai.AsyncStream[ChatCompletionChunk]:
            arguments = chat_arguments(model or await self._default_model(), messages, fusion, options)
            return await self.openai.chat.completions.create(**streaming(arguments))

        return AsyncTextStream(send)

    def stream_complete(
        self,
        prompt: str | Sequence[int],
        *,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[CompletionOptions],
    ) -> AsyncTextStream:
        """`complete`, piece by piece."""

        async def send() -> openai.AsyncStream[Completion]:
            arguments = completion_arguments(model or await self._default_model(), prompt, fusion, options)
            return await self.openai.completions.create(**streaming(arguments))

        return AsyncTextStream(send)

    async def score(
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
            model or await self._default_model(),
            fusion,
            options,
            prompt=prompt,
            continuations=continuations,
            logprobs=top_logprobs,
        )
        return Scores.of(await call.send(self.openai))

    async def score_labels(
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
            model or await self._default_model(),
            fusion,
            options,
            prompt=prompt,
            label_token_ids=token_ids,
            normalize=normalize or None,
        )
        return Scores.of(await call.send(self.openai))

    async def score_texts(
        self,
        texts: Sequence[TextOrIds],
        *,
        top_logprobs: int | None = None,
        fusion: Fusion | None = None,
        model: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """How likely each whole text is, from its second token on, and its perplexity."""
        call = score_call(
            model or await self._default_model(), fusion, options, texts=texts, logprobs=top_logprobs
        )
        return Scores.of(await call.send(self.openai))

    async def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        names: bool = False,
    ) -> Tokens:
        """The base's ids of a text or of a conversation. `names`: give the tokens' names as well."""
        call = routes.tokenize(text, model, add_special_tokens, names)
        return Tokens.of(await call.send(self.openai, self._root))

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids of the base, special tokens included."""
        answer = await routes.detokenize(ids).send(self.openai, self._root)
        text: str = answer["prompt"]
        return text

    async def tokenizer_info(self) -> TokenizerInfo:
        """The base's tokenizer."""
        return TokenizerInfo.of(await routes.tokenizer_info().send(self.openai, self._root))

    async def cancel(self, request_id: str) -> int:
        """End what is being answered under this id: a reply's or stream's `id`, or the `request_id` that was sent.
        Whoever waits for it gets an `openai.APIError` with code `request_cancelled`. Gives how many there were."""
        answer = await routes.cancel(request_id).send(self.openai, self._root)
        count: int = answer["cancelled"]
        return count

    async def load(self) -> Load:
        """How busy the server is."""
        return Load.of(await routes.load().send(self.openai, self._root))

    async def models(self) -> tuple[str, ...]:
        """The names that `model` may have: the base first, then the base with each expert."""
        return tuple([entry.id async for entry in self.openai.models.list()])

    async def ready(self) -> Readiness:
        """Whether the server takes requests now. False, with a reason, also where no server answers."""
        try:
            await self.openai.with_options(max_retries=0).get(f"{self._root}/ready", cast_to=object)
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            return not_ready(error)
        return Readiness(True)

    async def wait_until_ready(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109  the same as in ProxyServe
        """Return as soon as the server takes requests. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (state := await self.ready()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._root} is not ready after {timeout:g} s: {state.reason}")
            await asyncio.sleep(_POLL)

    async def drain(self) -> None:
        """Have the server refuse new work and finish what runs. Takes an administrator's key."""
        await drain_server().send(self.openai, self._root)

    async def close(self) -> None:
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _default_model(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model
