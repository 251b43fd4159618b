"""What the bodies of both generating routes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import NotYet, RequestModel
from proxyserve.api.schemas.rule_models import AnyFusion
from proxyserve.types import MAX_SEED

#: Longest name of a model and longest `user`, in characters.
MAX_NAME = 512

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
]


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(None, description="Send one more chunk, with `usage` and no choices.")
    include_obfuscation: Annotated[Any, NotYet(False)] = None


class GenerationRequest(RequestModel):
    """Fields of `/v1/chat/completions` and `/v1/completions` alike. `proxyserve.types.SamplingParams` says what the
    sampling fields do and in which order."""

    model: ModelName
    fusion: AnyFusion | None = None

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(MAX_SEED // 2), lt=MAX_SEED)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    logit_bias: LogitBias | None = None

    max_tokens: Count | None = None
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None

    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        None,
        description="Tag of the end user. Prompts of different users do not share entries of the prefix cache.",
    )

    timeout: Annotated[float, Field(gt=0.0, le=MAX_COUNT)] | None = Field(
        None, description="Seconds from the request's arrival until it is given up, wherever it is then."
    )
    metadata: Annotated[Any, NotYet({})] = None
    moderation: Annotated[Any, NotYet()] = None
    prompt_cache_key: Annotated[Any, NotYet()] = None
    prompt_cache_options: Annotated[Any, NotYet()] = None
    prompt_cache_retention: Annotated[Any, NotYet()] = None
    safety_identifier: Annotated[Any, NotYet()] = None
    service_tier: Annotated[Any, NotYet("auto", "default")] = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)
