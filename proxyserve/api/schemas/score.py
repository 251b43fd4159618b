"""Bodies of `/v1/score`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from proxyserve.api.schemas.base import GIVEN, LEFT_OUT, MAX_ENTRIES, AtMost
from proxyserve.api.schemas.common import EngineRequest, TokenId
from proxyserve.api.schemas.completions import PROMPT_SCHEMA, Prompt, parse_prompt
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.responses import UsageBody

TextOrIds = Annotated[Prompt, PlainValidator(parse_prompt), WithJsonSchema(PROMPT_SCHEMA)]


_OFF = {"enum": [None, False]}

_WHAT_IS_SCORED: dict[str, Any] = {
    "oneOf": [
        {
            "required": ["prompt", "continuations"],
            "properties": {
                "prompt": GIVEN,
                "continuations": GIVEN,
                "label_token_ids": LEFT_OUT,
                "texts": LEFT_OUT,
                "normalize": _OFF,
            },
        },
        {
            "required": ["prompt", "label_token_ids"],
            "properties": {
                "prompt": GIVEN,
                "continuations": LEFT_OUT,
                "label_token_ids": GIVEN,
                "texts": LEFT_OUT,
                "logprobs": LEFT_OUT,
            },
        },
        {
            "required": ["texts"],
            "properties": {
                "prompt": LEFT_OUT,
                "continuations": LEFT_OUT,
                "label_token_ids": LEFT_OUT,
                "texts": GIVEN,
                "normalize": _OFF,
            },
        },
    ]
}


class ScoreRequest(EngineRequest):
    """Give `prompt` with `continuations` or with `label_token_ids`, or `texts` alone. Nothing is generated.

    A continuation given as text is encoded as one text with a prompt given as text, and its tokens are those after the
    prompt's; white space at the end of the prompt counts as the beginning of the continuation (lm-evaluation-harness
    does the same). Where a token would run across the seam, and where one of the two is given as ids, they are encoded
    apart. Special tokens that a tokenizer adds by itself, such as one at the beginning of every text, are before the
    prompt and before each text.
    """

    model_config = ConfigDict(json_schema_extra=_WHAT_IS_SCORED)

    prompt: TextOrIds | None = Field(
        None, description="What comes before, as text or token ids; not scored itself."
    )
    continuations: Annotated[list[TextOrIds], Field(min_length=1), AtMost(MAX_ENTRIES)] | None = Field(
        None, description="Texts or lists of token ids; each is scored as what follows `prompt`."
    )
    label_token_ids: Annotated[list[TokenId], Field(min_length=1), AtMost(MAX_ENTRIES)] | None = Field(
        None, description="Tokens; each is scored as the one that follows `prompt`."
    )
    normalize: bool | None = Field(
        None, description="Give the labels' probabilities among themselves as well. Default false."
    )
    texts: Annotated[list[TextOrIds], Field(min_length=1), AtMost(MAX_ENTRIES)] | None = Field(
        None, description="Texts or lists of token ids; each is scored as a whole, from its second token on."
    )
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="How many of the likeliest tokens to give at each position of continuations and texts.",
    )


class TextScore(BaseModel):
    """Of one continuation, or one text. `logprob` is the sum over its tokens, `mean_logprob` that divided by their
    number `num_tokens`, `perplexity` exp of minus the mean, null where it is infinite. `is_greedy`: no other token was
    likelier anywhere. The lists have an entry per token, null for the first one of a text, which nothing comes before.
    -9999.0 stands for minus infinity."""

    index: int
    logprob: float
    num_tokens: int
    mean_logprob: float
    perplexity: float | None
    is_greedy: bool
    token_ids: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = Field(None, description="With `logprobs`.")


class LabelScore(BaseModel):
    """Of one token as the next one. `probability`, with `normalize`, is that among the labels; null if all of them are
    impossible."""

    index: int
    token_id: int
    token: str
    logprob: float
    probability: float | None = None


class Score(BaseModel):
    """Natural-log probabilities under the fused law. One of `continuations`, `labels` and `texts` is there, in the
    request's order."""

    id: str
    object: Literal["score"]
    created: int
    model: str
    system_fingerprint: str
    continuations: list[TextScore] | None = None
    labels: list[LabelScore] | None = None
    texts: list[TextScore] | None = None
    usage: UsageBody
    fusion: FusionSummary | None = Field(
        None, description="Left out for requests to a plain base of this server."
    )
