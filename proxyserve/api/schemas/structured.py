"""How a request says which form the answer's text must have, and what that did."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, RequestModel, exactly_one

JsonSchema = Annotated[
    dict[str, Any], Field(description="A JSON schema (2020-12 unless `$schema` says otherwise).")
]


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """`name` and `description` are for people. The schema is enforced whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat,
    Field(discriminator="type", description="OpenAI's way of asking for JSON."),
]


class TaggedJson(RequestModel):
    """`begin`, JSON of `schema`, `end`; white space may come between them."""

    begin: Annotated[str, Field(min_length=1)]
    schema_: JsonSchema = Field(alias="schema")
    end: Annotated[str, Field(min_length=1)]


class StructuralTag(RequestModel):
    """Free text, in which each trigger begins one of the structures. A `begin` starts with exactly one trigger."""

    structures: Annotated[list[TaggedJson], Field(min_length=1), AtMost(MAX_ENTRIES)]
    triggers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), AtMost(MAX_ENTRIES)]


class StructuredOutputs(RequestModel):
    """Exactly one of these. The whole text matches; `regex` has the syntax of Rust's `regex`, `grammar` that of
    llguidance's Lark."""

    model_config = ConfigDict(
        json_schema_extra=exactly_one("json", "regex", "choice", "grammar", "structural_tag")
    )

    json_: JsonSchema | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), AtMost(MAX_ENTRIES)] | None
    ) = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    structural_tag: StructuralTag | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for _, value in self) != 1:
            raise PydanticCustomError(
                "one_of", "It must have exactly one of json, regex, choice, grammar and structural_tag"
            )
        return self


class GrammarReport(BaseModel):
    """What the required form changed. `mean_removed_mass` is the mean, over generated positions, of the probability
    that the fused law gave to tokens that could not come."""

    mean_removed_mass: float
