"""What the bodies of the routes that use the engine have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, NotYet, RequestModel
from proxyserve.api.schemas.rule_models import AnyFusion
from proxyserve.api.schemas.structured import StructuredOutputs
from proxyserve.types import MAX_SEED

#: Longest name of a model and longest tag of an end user, in characters.
MAX_NAME = 512
#: Longest secret that keeps prefix-cache entries apart, in characters.
MAX_SALT = 1024
#: OpenAI's bounds of `metadata`.
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

#: Counts above this are refused as typing errors; tensors of ids could not hold them either.
MAX_COUNT = 2**31 - 1


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _keys_to_ids(value: Any) -> Any:
    """JSON has string keys only: `{"50256": -100}`."""
    if not isinstance(value, Mapping):
        return value
    biases: dict[int, Any] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise PydanticCustomError("token_id", 'Its keys must be token ids, such as "50256"')
        biases[int(key)] = bias
    if len(biases) < len(value):
        raise PydanticCustomError("token_id", "It names a token twice")
    return biases


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_NAME,
        description="`BASE`, or `BASE+EXPERT[:WEIGHT]...` for rule `proxy` with those experts; weights default to 1.",
        examples=["atlas", "atlas+qa:0.8"],
    ),
]
Stop = Annotated[
    list[str],
    BeforeValidator(_one_or_many),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    AtMost(MAX_ENTRIES),
]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]],
    BeforeValidator(_keys_to_ids),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
    AtMost(MAX_ENTRIES),
]
Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=MAX_METADATA_KEY)],
        Annotated[str, Field(max_length=MAX_METADATA_VALUE)],
    ],
    AtMost(MAX_METADATA),
]


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(None, description="Send one more chunk, with `usage` and no choices.")
    include_obfuscation: Annotated[Any, NotYet(False)] = None


class EngineRequest(RequestModel):
    """Fields of every request that puts the engine to work: which law, and on whose behalf."""

    model: ModelName
    fusion: AnyFusion | None = Field(
        None,
        description="Rule, experts, weights and what goes with them (docs/rules.md), beside or instead of `model`.",
    )

    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = Field(
        None,
        description="Of the waiting requests those with the lowest number go first. Default, and lowest for all but "
        "administrators: the key's, which is 0 unless its record says otherwise.",
    )
    user: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        None,
        description="Tag of the end user. Prompts of different users do not share entries of the prefix cache.",
    )
    safety_identifier: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        None,
        description="OpenAI's newer name for a tag of the end user; separates the prefix cache like `user`.",
    )
    prompt_cache_key: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        None, description="Prompts share entries of the prefix cache only with prompts of an equal key."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = Field(
        None,
        description="A secret that does the same: nobody who does not know it can learn what is in the cache.",
    )
    metadata: Metadata | None = Field(
        None,
        description="Tags of your own for the server's log and traces: up to 16, keys of 64 characters, values of 512.",
    )
    timeout: Annotated[float, Field(gt=0.0, le=MAX_COUNT)] | None = Field(
        None, description="Seconds from the request's arrival until it is given up, wherever it is then."
    )

    moderation: Annotated[Any, NotYet()] = None
    prompt_cache_options: Annotated[Any, NotYet()] = None
    prompt_cache_retention: Annotated[Any, NotYet()] = None
    service_tier: Annotated[Any, NotYet("auto", "default")] = None


class SampledRequest(EngineRequest):
    """Fields of every request for generated text: how its tokens are drawn, and where it ends.
    `proxyserve.types.SamplingParams` says what they do and in which order."""

    structured_outputs: StructuredOutputs | None = Field(
        None, description="A form that the whole text must have; vLLM's way of asking."
    )

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = Field(
        None, description="Divides the log-probabilities before the draw; 0 is greedy. Default 1."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None,
        description="Draw from the fewest likeliest tokens that have this much probability together. Default 1, off.",
    )
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        None, description="Draw from this many likeliest tokens. Default 0, off."
    )
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None,
        description="Draw from tokens with at least this share of the likeliest one's probability. Default 0, off.",
    )
    seed: Annotated[int, Field(ge=-(MAX_SEED // 2), lt=MAX_SEED)] | None = Field(
        None, description="The same seed draws the same answer; without one each answer is drawn anew."
    )
    presence_penalty: Penalty | None = Field(
        None, description="Subtracted from the score of each token that the answer already has. Default 0."
    )
    frequency_penalty: Penalty | None = Field(
        None, description="Subtracted once per time that the answer already has the token. Default 0."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10.0)] | None = Field(
        None,
        description="Divides positive and multiplies negative scores of tokens that prompt or answer already have. "
        "Default 1, off.",
    )
    logit_bias: LogitBias | None = Field(
        None, description='Added to the scores of tokens, by id: `{"50256": -100}`.'
    )
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1), AtMost(MAX_ENTRIES)] | None = Field(
        None, description="No other token comes."
    )
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]], AtMost(MAX_ENTRIES)] | None = Field(
        None,
        description="Texts that never come, as the tokenizer writes them with and without a leading space. Other "
        "spellings of the same text in tokens are not ruled out.",
    )

    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        None, description="Before this many tokens no token comes that would end the answer. Default 0."
    )
    stop: Stop | None = Field(None, description="Strings that end the answer; they are not part of it.")
    stop_token_ids: Annotated[list[TokenId], AtMost(MAX_ENTRIES)] | None = Field(
        None, description="Tokens that end the answer, beside the models' own; they are not part of its text."
    )
    ignore_eos: bool | None = Field(
        None, description="Go on after the models' own end-of-text tokens. Default false."
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the answer's text. Default true."
    )

    stream: bool | None = Field(
        None, description="Send the answer in pieces, as server-sent events. Default false."
    )


class GenerationRequest(SampledRequest):
    """Fields of `/v1/chat/completions` and `/v1/completions` alike."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        None,
        description="Most tokens of the answer. 0, to score the prompt alone, needs `prompt_logprobs` or `echo`.",
    )
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Give the log-probability of each token of the base's prompt, and this many likeliest tokens.",
    )
    logprob_token_ids: Annotated[list[TokenId], Field(min_length=1), AtMost(MAX_ENTRIES)] | None = Field(
        None, description="Give the log-probabilities of these tokens at each position, in `listed_logprobs`."
    )
    return_token_ids: bool | None = Field(
        None, description="Give the ids of the base's prompt and of the answer. Default false."
    )

    n: Count | None = Field(None, description="Answers per prompt. Default 1.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)
