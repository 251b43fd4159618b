"""The fields of requests as tables. `docs/http_api.md` is made of what `python -m proxyserve.api.fields` prints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from proxyserve.api.schemas.base import RequestModel
from proxyserve.api.schemas.chat import ChatRequest
from proxyserve.api.schemas.common import EngineRequest, GenerationRequest, SampledRequest
from proxyserve.api.schemas.completions import CompletionRequest
from proxyserve.api.schemas.other import DetokenizeRequest, TokenizeRequest
from proxyserve.api.schemas.responses_api import ResponsesRequest
from proxyserve.api.schemas.score import ScoreRequest
from proxyserve.config import Limits

#: Title -> the class whose own fields follow; those that it inherits are under their own title.
_SECTIONS: Mapping[str, type[RequestModel]] = {
    "Fields of every request that runs models": EngineRequest,
    "Fields of `/v1/completions`, `/v1/chat/completions` and `/v1/responses`": SampledRequest,
    "Fields of `/v1/completions` and `/v1/chat/completions`": GenerationRequest,
    "Fields of `/v1/completions` alone": CompletionRequest,
    "Fields of `/v1/chat/completions` alone": ChatRequest,
    "Fields of `/v1/responses` alone": ResponsesRequest,
    "Fields of `/v1/score`": ScoreRequest,
    "Fields of `/tokenize`": TokenizeRequest,
    "Fields of `/detokenize`": DetokenizeRequest,
}

_LIMITS: Mapping[str, str] = {
    "max_n": "`n`",
    "max_choices": "`n` times the number of prompts; `continuations`; `texts`",
    "max_batched_prompts": "prompts in one request",
    "max_stop": "`stop` strings; `stop_token_ids`",
    "max_stop_length": "characters of a `stop` string, or of one of `bad_words`",
    "max_logit_bias": "entries of `logit_bias`",
    "max_bad_words": "`bad_words`",
    "max_logprobs": "`logprobs`, `top_logprobs`, `prompt_logprobs`",
    "max_logprob_token_ids": "`logprob_token_ids`, `label_token_ids`",
    "max_prompt_logprobs": "log-probs of prompt tokens in one response",
    "max_tools": "`tools`",
    "max_tool_bytes": "bytes of `tools` as JSON",
    "max_tool_depth": "levels of nesting in `tools`",
    "max_template_variables": "`chat_template_kwargs`",
    "max_template_variable_length": "characters of one of them",
    "max_tokenized_characters": "characters of a text for `/tokenize`",
    "max_tokenized_ids": "ids for `/detokenize`, and of a text whose `token_strs` are asked for",
    "max_body_bytes": "bytes of a body (413)",
    "max_waiting_requests": "choices that wait, of all requests together (429)",
    "max_waiting_tokens": "prompt tokens that wait, of all choices together (429)",
}


def tables() -> str:
    """The part of `docs/http_api.md` that lists fields and limits."""
    lines: list[str] = []
    for title, model in _SECTIONS.items():
        lines += [f"## {title}", "", *_table(model), ""]
    limits = Limits()
    lines += ["## Limits", "", "| most | by default |", "| --- | ---: |"]
    lines += [f"| {what} | {getattr(limits, name):,} |" for name, what in _LIMITS.items()]
    return "\n".join(lines) + "\n"


def _table(model: type[RequestModel]) -> Iterable[str]:
    schema = model.model_json_schema(by_alias=True)
    inherited = {name for parent in model.__mro__[1:] for name in getattr(parent, "model_fields", ())}
    own = [name for name in model.model_fields if name not in inherited]
    yield "| field | value | meaning |"
    yield "| --- | --- | --- |"
    off: dict[str, list[Any]] = {}
    for name in own:
        entry = schema["properties"][name]
        if str(entry.get("description", "")).startswith("Not supported"):
            off[name] = [value for value in entry["enum"] if value is not None]
            continue
        mark = " (required)" if name in schema.get("required", ()) else ""
        text = str(entry.get("description") or _parts(entry, "description") or "").replace("|", "\\|")
        yield f"| `{name}`{mark} | {_value(entry, schema)} | {text} |"
    if off:
        names = (
            f"`{name}`"
            + (f" (but {', '.join(f'`{json.dumps(value)}`' for value in values)})" if values else "")
            for name, values in off.items()
        )
        yield ""
        yield f"Not supported, and refused: {', '.join(names)}."


def _parts(entry: Mapping[str, Any], key: str) -> Any:
    """Of an optional field, what its one form says."""
    return next((part[key] for part in entry.get("anyOf", ()) if key in part), None)


def _value(entry: Mapping[str, Any], schema: Mapping[str, Any], *, plural: bool = False) -> str:
    """What may stand there, in short."""
    if "$ref" in entry:
        found = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        return _value({**found, "type": found.get("type", "object")}, schema, plural=plural)
    for key in ("anyOf", "oneOf"):
        if key in entry:
            kinds = [_value(part, schema, plural=plural) for part in entry[key] if part.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in entry:
        return ", ".join(f"`{json.dumps(value)}`" for value in entry["enum"] if value is not None)
    kind, s = entry.get("type"), "s" if plural else ""
    if kind == "array":
        items = entry.get("items", {})
        ids = items.get("type") == "integer"  # no other whole numbers come in lists
        return f"list{s} of " + ("token ids" if ids else _value(items, schema, plural=True))
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + s + _bounds(entry)
    return {"string": f"text{s}", "boolean": "true or false"}.get(str(kind), f"object{s}")


def _bounds(entry: Mapping[str, Any]) -> str:
    low, high = entry.get("minimum"), entry.get("maximum")
    above, below = entry.get("exclusiveMinimum"), entry.get("exclusiveMaximum")
    high = None if high is not None and high >= 2**31 - 1 else high
    below = None if below is not None and below >= 2**31 else below
    parts = []
    if above is not None:
        parts.append(f"above {above:g}")
    if low is not None and low > -(2**31) and high is not None:
        return f", {low:g} to {high:g}"
    if low is not None and low > -(2**31):
        parts.append(f"{low:g} or more")
    if high is not None:
        parts.append(f"at most {high:g}")
    if below is not None:
        parts.append(f"below {below:g}")
    return f", {', '.join(parts)}" if parts else ""


if __name__ == "__main__":
    print(tables(), end="")
