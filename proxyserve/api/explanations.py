"""Explanations in the shape of responses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from proxyserve.api.logprobs import finite
from proxyserve.api.schemas.explain import ExplainedToken, LawOfToken, ListedToken
from proxyserve.api.schemas.fusion import FusionObject
from proxyserve.types import LaneView, TokenExplanation

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer


def wants_explanations(fusion: FusionObject | None) -> bool:
    return fusion is not None and bool(fusion.explain)


def explained(entries: Iterable[TokenExplanation], tokenizer: Tokenizer) -> list[ExplainedToken]:
    """An entry per generated token, also for those that did not become text (a stop token)."""
    return [_token(entry, tokenizer) for entry in entries]


def explained_prompt(
    entries: Iterable[TokenExplanation | None], tokenizer: Tokenizer
) -> list[ExplainedToken | None]:
    """An entry per prompt token of the base, None where nothing comes before."""
    return [None if entry is None else _token(entry, tokenizer) for entry in entries]


def _token(entry: TokenExplanation, tokenizer: Tokenizer) -> ExplainedToken:
    return ExplainedToken(
        token=_text(entry.token_id, tokenizer),
        token_id=entry.token_id,
        fused=_law(entry.fused, tokenizer),
        lanes={name: _law(view, tokenizer) for name, view in entry.lanes.items()},
        weights=dict(entry.weights),
        push={expert: finite(push) for expert, push in entry.push.items()},
        kl=entry.kl,
        flip=entry.flip,
        gated=entry.gated,
    )


def _law(view: LaneView, tokenizer: Tokenizer) -> LawOfToken:
    top = [
        ListedToken(token=_text(token, tokenizer), token_id=token, logprob=finite(value))
        for token, value in view.top
    ]
    return LawOfToken(logprob=finite(view.logprob), top=top)


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")
