"""From a conversation to its running generation, for the routes that have conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastapi import Request

from proxyserve.api.conversation import (
    AskedChat,
    answer_format,
    chat_constraints,
    chat_grammar,
    chat_options,
)
from proxyserve.api.generate import Generation
from proxyserve.api.prepare import (
    cache_salt,
    check_prompt_logprobs,
    prepared,
    priority_of,
    resolve_fusion,
    room_for_answer,
)
from proxyserve.api.schemas.common import SampledRequest
from proxyserve.api.state import ServerState, server_state
from proxyserve.api.structured import compiled, constraints_of, end_ids
from proxyserve.engine.caller import Caller
from proxyserve.engine.prompts import Messages, chat_prompts
from proxyserve.engine.submission import Submission
from proxyserve.grammar.grammar import Grammar
from proxyserve.text.answer import AnswerFormat
from proxyserve.types import SamplingParams

if TYPE_CHECKING:
    from proxyserve.engine.offer import Lease
    from proxyserve.fusion.catalog import Catalog


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a route has read in a request. `sampling` wants `max_tokens`, which is what there is room for where the
    request does not say. `grammar` is the form that the answer must have by fields that only this route has."""

    request_id: str
    messages: Messages
    asked: AskedChat
    sampling: Callable[..., SamplingParams]
    max_tokens: int | None = None
    grammar: Grammar | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class Conversing:
    """`form` is how the answers are to be read, `prompt` what the base was given."""

    generation: Generation
    form: AnswerFormat
    prompt: tuple[int, ...]


async def converse(
    request: Request, body: SampledRequest, lease: Lease, read: Callable[[Catalog], Conversation]
) -> Conversing:
    """Queue the work. `read` is the route's own part and may run in another thread. Raises InvalidRequest, UnknownModel
    and what `Generation` raises."""
    state = server_state(request)
    salt: str = cache_salt(request.state.salt, body)
    caller: Caller = request.state.caller

    def prepare() -> tuple[Conversation, Submission, AnswerFormat, Grammar | None]:
        conversation = read(lease.catalog)
        submission, form = _submission(state, lease.catalog, body, conversation, salt, caller)
        return conversation, submission, form, _grammar(state, body, conversation, form)

    conversation, submission, form, grammar = await prepared(request, prepare)
    ready = await compiled(state, grammar, body.stop_token_ids)
    constraints = chat_constraints(
        form,
        conversation.asked,
        state.models.base.tokenizer,
        ready,
        ends=end_ids(state, body.stop_token_ids),
    )
    generation = Generation(request, [replace(submission, constraints=constraints)], lease)
    return Conversing(generation, form, submission.prompts.default)


def _submission(
    state: ServerState,
    catalog: Catalog,
    body: SampledRequest,
    conversation: Conversation,
    salt: str,
    caller: Caller,
) -> tuple[Submission, AnswerFormat]:
    """The work, but for what limits its tokens, and how the answer is to be read."""
    limits, chat, asked = state.config.limits, state.config.chat, conversation.asked
    fusion = resolve_fusion(body.model, body.fusion, catalog)
    prompts = chat_prompts(catalog, fusion, conversation.messages, chat_options(asked, chat, limits))
    form = answer_format(prompts, asked.tools, chat, catalog.models.base.tokenizer)
    max_tokens = conversation.max_tokens
    if max_tokens is None:
        max_tokens = room_for_answer(state.engine.engine, fusion, prompts.lanes, catalog)
    sampling = conversation.sampling(max_tokens=max_tokens)
    if form.special_marks and sampling.skip_special_tokens:
        sampling = replace(sampling, skip_special_tokens=False)
    elif form.special_marks:  # the client wants to see them all
        form = replace(form, hidden=frozenset())
    submission = Submission(
        conversation.request_id,
        prompts.lanes,
        sampling,
        fusion,
        n=conversation.n,
        salt=salt,
        caller=caller,
        vetted=body.model in catalog.presets,
        priority=priority_of(body, caller),
    )
    check_prompt_logprobs([submission], limits, "messages")
    return submission, form


def _grammar(
    state: ServerState, body: SampledRequest, conversation: Conversation, form: AnswerFormat
) -> Grammar | None:
    limits = state.config.limits.grammar
    given = constraints_of(body, limits, conversation.grammar)
    return chat_grammar(conversation.asked, form, given, state.models.base.tokenizer, limits)
