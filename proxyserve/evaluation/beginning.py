"""What a text begins after when nothing is given before it."""

from __future__ import annotations

from proxyserve.errors import InvalidRequest
from proxyserve.text.tokenizer import Tokenizer


def beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids: what the tokenizer itself puts before every text (a beginning-of-text token), else its end-of-text
    token, after which the next text began in training. Raises InvalidRequest if it has neither."""
    ids = tokenizer.encode("") or sorted(tokenizer.eos_ids)[:1]
    if not ids:
        raise InvalidRequest(
            "The tokenizer has no token to begin a text with; give a prompt.", param="prompt"
        )
    return tuple(ids)
