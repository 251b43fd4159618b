"""Log-probabilities of given texts and tokens: what is asked of `/v1/score`, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
from openai.types import CompletionUsage

from proxyserve_client.fusion import Fusion
from proxyserve_client.options import ScoreOptions, request_headers
from proxyserve_client.reply import FusionReport, Usage

#: A text, or its token ids.
TextOrIds = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class TextScore:
    """Of one continuation, or one whole text. `logprob` is the sum over its `num_tokens` tokens, in nats, `perplexity`
    exp of minus their mean, None where that is infinite. `is_greedy`: no other token was likelier anywhere. The tuples
    have an entry per token; the first token of a whole text has no log-prob. `top_logprobs`, by the names of tokens, is
    there where it was asked for."""

    logprob: float
    num_tokens: int
    mean_logprob: float
    perplexity: float | None
    is_greedy: bool
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[Mapping[str, float] | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class LabelScore:
    """Of one token as the next one. `probability` is that among the labels, where it was asked for."""

    token_id: int
    token: str
    logprob: float
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """An answer: `texts` for continuations or whole texts, `labels` for labels, in the order of the request."""

    texts: tuple[TextScore, ...]
    labels: tuple[LabelScore, ...]
    usage: Usage
    fusion: FusionReport | None

    @classmethod
    def of(cls, body: Any) -> Scores:
        """From the answer's JSON."""
        texts = body.get("continuations") or body.get("texts") or ()
        return cls(
            tuple(_text_score(entry) for entry in texts),
            tuple(
                LabelScore(entry["token_id"], entry["token"], entry["logprob"], entry.get("probability"))
                for entry in body.get("labels") or ()
            ),
            Usage.of(CompletionUsage.model_validate(body["usage"])),
            FusionReport.of_json(body.get("fusion")),
        )


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """A request to `/v1/score`."""

    body: Mapping[str, Any]
    timeout: float | None = None
    request_id: str | None = None

    def send(self, client: openai.OpenAI | openai.AsyncOpenAI) -> Any:
        """The JSON of the answer, or for an async client what gives it when awaited."""
        options: dict[str, Any] = {} if self.timeout is None else {"timeout": self.timeout}
        if self.request_id is not None:
            options["headers"] = request_headers(self.request_id)
        post: Any = client.post
        return post("/score", cast_to=object, body=dict(self.body), options=options)


def score_call(
    model: str,
    fusion: Fusion | None,
    options: ScoreOptions,
    **what: TextOrIds | Sequence[TextOrIds] | int | None,
) -> ScoreCall:
    """`what` are the fields that say what is to be scored; those that are None are left out."""
    for name in options.keys() - ScoreOptions.__annotations__.keys():
        raise TypeError(f"there is no option '{name}' of scores")
    body: dict[str, Any] = {"model": model, **options}
    timeout = body.pop("timeout", None)
    request_id = body.pop("request_id", None)
    if "deadline" in body:
        body["timeout"] = body.pop("deadline")
    body |= {name: _json(value) for name, value in what.items() if value is not None}
    if fusion is not None:
        body |= fusion.extra_body()
    return ScoreCall(body, timeout, request_id)


def _json(value: Any) -> Any:
    """Sequences of any kind as lists."""
    if isinstance(value, str | int):
        return value
    return [_json(entry) for entry in value]


def _text_score(entry: Mapping[str, Any]) -> TextScore:
    top = entry.get("top_logprobs")
    return TextScore(
        entry["logprob"],
        entry["num_tokens"],
        entry["mean_logprob"],
        entry["perplexity"],
        entry["is_greedy"],
        tuple(entry["token_ids"]),
        tuple(entry["tokens"]),
        tuple(entry["token_logprobs"]),
        None if top is None else tuple(top),
    )
