"""What choices of both generating routes say beyond OpenAI's fields, where a request asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proxyserve.api.generate import Answer
from proxyserve.api.logprobs import listed_logprobs, prompt_logprobs
from proxyserve.api.schemas.common import GenerationRequest
from proxyserve.types import OutputEvent

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer


def token_extras(
    body: GenerationRequest, part: OutputEvent | Answer, *, echoed: bool = False
) -> dict[str, Any]:
    """What is said of each token of a choice, or of the next piece of it. `echoed`: the piece begins with the prompt's
    tokens."""
    fields: dict[str, Any] = {}
    if body.return_token_ids:
        fields["token_ids"] = list(part.token_ids)
    if body.logprob_token_ids:
        of_prompt = (part.prompt_logprobs or ()) if echoed else ()
        fields["listed_logprobs"] = listed_logprobs([*of_prompt, *(part.logprobs or ())])
    return fields


def prompt_extras(
    body: GenerationRequest, prompt: Sequence[int], part: OutputEvent | Answer, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What is said once of the base's `prompt`; `part` is a choice or its first piece. vLLM has these fields on each
    choice of a completion, and on the whole response of a chat."""
    fields: dict[str, Any] = {}
    if body.return_token_ids:
        fields["prompt_token_ids"] = list(prompt)
    if body.prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_logprobs(
            part.prompt_logprobs or (), tokenizer, body.prompt_logprobs
        )
    return fields
