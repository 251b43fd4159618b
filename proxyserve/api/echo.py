"""What a completion repeats of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxyserve.api.logprobs import text_offsets
from proxyserve.engine.submission import Submission

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """The base's prompt: its text, its ids, and where each of them begins in the text (characters)."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, submission: Submission, given: str | tuple[int, ...], tokenizer: Tokenizer) -> Echo:
        """`given` is the prompt as the request has it: a text is repeated as it is, ids as their text, and so is a
        prompt that `fusion.prompts` gives the base in its place."""
        ids = submission.prompts.default
        if isinstance(given, str) and tuple(tokenizer.encode(given)) == ids:
            text = given
        else:
            text = tokenizer.decode(ids, skip_special_tokens=submission.sampling.skip_special_tokens)
        return cls(text, ids, tuple(text_offsets(tokenizer, ids, text)))
