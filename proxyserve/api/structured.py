"""From the body's `response_format` or `structured_outputs` to what the engine enforces, and back to what it did."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proxyserve.api.schemas.common import SampledRequest
from proxyserve.api.schemas.response_tools import JsonSchemaText, TextConfig
from proxyserve.api.schemas.structured import (
    GrammarReport,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuralTag,
    StructuredOutputs,
)
from proxyserve.config import GrammarLimits
from proxyserve.errors import InvalidRequest
from proxyserve.grammar import grammar as forms
from proxyserve.grammar.grammar import Grammar, Tag

if TYPE_CHECKING:
    from proxyserve.api.state import ServerState
    from proxyserve.engine.constraint import Constrains


def constraints_of(
    body: SampledRequest, limits: GrammarLimits, grammar: Grammar | None = None
) -> Grammar | None:
    """The form that the body asks for, None for free text. `grammar` is what it asks for in fields that only its route
    has. Raises InvalidRequest."""
    if body.structured_outputs is not None:
        if grammar is not None:
            raise InvalidRequest(
                f"The form of the answer is given both here and in '{grammar.param}'; use one of them.",
                param="structured_outputs",
            )
        grammar = _structured_outputs(body.structured_outputs, limits)
    if grammar is not None and body.ignore_eos:
        raise InvalidRequest(
            "'ignore_eos' asks for text without end, and a text of a given form ends; leave one of them out.",
            param="ignore_eos",
        )
    return grammar


async def compiled(
    state: ServerState, grammar: Grammar | None, stop_token_ids: Sequence[int] | None = None
) -> tuple[Constrains, ...]:
    """For `Submission.constraints`. Raises InvalidRequest, QueueFull and NotReady."""
    if grammar is None:
        return ()
    ready = await asyncio.wrap_future(state.grammars.compile(grammar))
    return (ready.ending_with(end_ids(state, stop_token_ids)),)


def end_ids(state: ServerState, stop_token_ids: Sequence[int] | None) -> frozenset[int]:
    """A text is as whole to a grammar whichever model's token ends it."""
    return frozenset(stop_token_ids or ()).union(*(model.eos_ids for model in state.models.models.values()))


def grammar_report(removed_mass: float | None) -> dict[str, Any]:
    """A choice's field `grammar`; nothing at all for free text."""
    return {} if removed_mass is None else {"grammar": GrammarReport(mean_removed_mass=removed_mass)}


def response_format(given: ResponseFormat | None, limits: GrammarLimits) -> Grammar | None:
    """The form that the field of this name asks for. Raises InvalidRequest."""
    match given:
        case JsonObjectFormat():
            return forms.json_object("response_format")
        case JsonSchemaFormat(json_schema=named):
            return forms.json_schema(named.schema_, limits, "response_format.json_schema.schema")
        case _:
            return None


def text_format(given: TextConfig | None, limits: GrammarLimits) -> Grammar | None:
    """The same for `text.format` of `/v1/responses`. Raises InvalidRequest."""
    match given:
        case TextConfig(format=JsonObjectFormat()):
            return forms.json_object("text.format")
        case TextConfig(format=JsonSchemaText(schema_=schema)):
            return forms.json_schema(schema, limits, "text.format.schema")
        case _:
            return None


def _structured_outputs(given: StructuredOutputs, limits: GrammarLimits) -> Grammar:
    where = "structured_outputs"
    match given:
        case StructuredOutputs(json_=dict(schema)):
            return forms.json_schema(schema, limits, f"{where}.json")
        case StructuredOutputs(regex=str(expression)):
            return forms.regex(expression, limits, f"{where}.regex")
        case StructuredOutputs(choice=list(options)):
            return forms.choice(options, limits, f"{where}.choice")
        case StructuredOutputs(grammar=str(text)):
            return forms.lark(text, limits, f"{where}.grammar")
        case StructuredOutputs(structural_tag=StructuralTag(structures=structures, triggers=triggers)):
            tags = [Tag(tag.begin, tag.schema_, tag.end) for tag in structures]
            return forms.tags(tags, limits, f"{where}.structural_tag", triggers=triggers)
        case _:
            raise AssertionError("the validator lets exactly one through")
