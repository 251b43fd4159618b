"""From what the engine found to the answer of `/v1/score`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from proxyserve.api.generate import Answer, Generation, total_usage
from proxyserve.api.logprobs import TokenNames, finite
from proxyserve.api.schemas.score import LabelScore, ScoreRequest, TextScore
from proxyserve.engine.submission import Submission
from proxyserve.types import TokenLogprob

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer


class Scored:
    """The engine's answers to all submissions, and what they cost."""

    def __init__(self) -> None:
        self._submissions: list[Submission] = []
        self._answers: list[Answer] = []
        self._generations: list[Generation] = []

    def add(
        self, submissions: Sequence[Submission], answers: Sequence[Answer], generation: Generation
    ) -> None:
        """Of the next submissions."""
        self._submissions += submissions
        self._answers += answers
        self._generations.append(generation)

    def fields(self, body: ScoreRequest, tokenizer: Tokenizer) -> dict[str, Any]:
        """The scores, by the name of the response's field."""
        names = TokenNames(tokenizer)
        if body.label_token_ids is not None:
            (answer,) = self._answers
            return {"labels": _labels(answer.logprobs[0].listed, names, normalize=bool(body.normalize))}
        scores = [
            _text_score(
                number,
                submission.prompts.default[submission.sampling.prompt_logprobs_from :],
                (answer.prompt_logprobs or ())[submission.sampling.prompt_logprobs_from :],
                names,
                body.logprobs,
            )
            for number, (submission, answer) in enumerate(zip(self._submissions, self._answers, strict=True))
        ]
        return {"texts" if body.texts is not None else "continuations": scores}

    def totals(self) -> dict[str, Any]:
        fusion = self._generations[-1].fusion()
        usage = total_usage(self._generations)
        return {"usage": usage} if fusion is None else {"usage": usage, "fusion": fusion}


def _text_score(
    index: int,
    ids: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    names: TokenNames,
    top: int | None,
) -> TextScore:
    known = [entry for entry in entries if entry is not None]
    total = math.fsum(entry.logprob for entry in known)
    mean = total / len(known)
    lists = {}
    if top is not None:
        lists["top_logprobs"] = [None if entry is None else names.top(entry, top) for entry in entries]
    return TextScore(
        index=index,
        logprob=finite(total),
        num_tokens=len(known),
        mean_logprob=finite(mean),
        perplexity=_perplexity(mean),
        # Both are the same float where the token is the likeliest.
        is_greedy=all(entry.logprob == entry.top[0][1] for entry in known),
        token_ids=list(ids),
        tokens=[names.name(token) for token in ids],
        token_logprobs=[None if entry is None else finite(entry.logprob) for entry in entries],
        **lists,
    )


def _perplexity(mean: float) -> float | None:
    try:
        perplexity = math.exp(-mean)
    except OverflowError:
        return None
    return perplexity if math.isfinite(perplexity) else None


def _labels(listed: Iterable[tuple[int, float]], names: TokenNames, *, normalize: bool) -> list[LabelScore]:
    pairs = list(listed)
    best = max(value for _, value in pairs)
    masses = [math.exp(value - best) if math.isfinite(best) else math.nan for _, value in pairs]
    total = math.fsum(masses)
    scores = []
    for index, ((token, value), mass) in enumerate(zip(pairs, masses, strict=True)):
        score = LabelScore(index=index, token_id=token, token=names.name(token), logprob=finite(value))
        if normalize:
            score.probability = None if math.isnan(total) else mass / total
        scores.append(score)
    return scores
