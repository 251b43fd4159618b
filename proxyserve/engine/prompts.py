"""From what a caller wrote to the prompt ids of each lane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proxyserve.engine.submission import LanePrompts
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.spec import Fusion
from proxyserve.fusion.terms import BASE_LANE
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.model_set import ModelSet

ROUTES = ("chat", "plain")


def token_prompts(ids: Sequence[int]) -> LanePrompts:
    """The same given ids for every lane."""
    return LanePrompts(tuple(ids))


def text_prompts(models: ModelSet, fusion: Fusion, text: str) -> LanePrompts:
    """The same text for every lane, each encoded by its own tokenizer (which may add its own special tokens)."""
    by_lane = {name: tuple(model.tokenizer.encode(text)) for name, model in _lanes(models, fusion)}
    return LanePrompts(by_lane[BASE_LANE], by_lane)


def chat_prompts(
    models: ModelSet,
    fusion: Fusion,
    messages: Sequence[Mapping[str, Any]],
    routes: Mapping[str, str] | None = None,
) -> LanePrompts:
    """Messages rendered per lane.

    A lane uses its own model's chat template. One whose model has none uses the tuned model's of its expert, the base
    the first that any expert of the request has. `routes` (lane name -> "chat" or "plain") overrides: "plain" is the
    messages' text alone, joined by blank lines, as the proxy-tuning paper prompts base and untuned models. Raises
    InvalidRequest if no template can be found or a route names no lane of the request.
    """
    routes = routes or {}
    lanes = dict(_lanes(models, fusion))
    for name, route in routes.items():
        if name not in lanes:
            raise InvalidRequest(
                f"'{name}' is no lane of this request; its lanes are {', '.join(lanes)}.",
                param=f"fusion.prompts.{name}",
            )
        if route not in ROUTES:
            raise InvalidRequest(
                f"A prompt route is one of {', '.join(ROUTES)}.", param=f"fusion.prompts.{name}"
            )
    fallback = [model for model in lanes.values() if model.tokenizer.has_chat_template]
    by_lane = {}
    for name, model in lanes.items():
        if routes.get(name) == "plain":
            by_lane[name] = tuple(model.tokenizer.encode(_plain(messages)))
            continue
        own = [model] if model.tokenizer.has_chat_template else []
        sibling = [other for other in _tuned_of(name, lanes) if other.tokenizer.has_chat_template]
        template = next(iter(own + sibling + fallback), None)
        if template is None:
            raise InvalidRequest(
                f"Neither '{models.base.name}' nor the request's experts have a chat template; use /v1/completions, "
                "or name an expert that has one.",
                param="messages",
            )
        text = template.tokenizer.render_chat(messages)
        by_lane[name] = tuple(model.tokenizer.encode(text, add_special_tokens=False))
    return LanePrompts(by_lane[BASE_LANE], by_lane)


def _lanes(models: ModelSet, fusion: Fusion) -> Iterator[tuple[str, LoadedModel]]:
    """Names and models of the lanes that will run, base first."""
    yield BASE_LANE, models.base
    for entry in fusion.active:
        expert = models.expert(entry.expert)
        yield f"{expert.name}.tuned", expert.tuned
        if expert.untuned is not None:
            yield f"{expert.name}.untuned", expert.untuned


def _tuned_of(lane: str, lanes: Mapping[str, LoadedModel]) -> list[LoadedModel]:
    expert, _, role = lane.partition(".")
    return [lanes[f"{expert}.tuned"]] if role else []


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(str(message.get("content") or "") for message in messages)
