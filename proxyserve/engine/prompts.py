"""From what a caller wrote to the prompt ids of each lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyserve.engine.submission import LanePrompts
from proxyserve.errors import InvalidRequest, UnknownModel
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.fusion.program import BASE_LANE
from proxyserve.models.remote import AnyModel

Messages = Sequence[Mapping[str, Any]]


def token_prompts(catalog: Catalog, fusion: Fusion, ids: Sequence[int]) -> LanePrompts:
    """The same given ids for every lane that has no prompt of its own. Raises InvalidRequest or UnknownModel."""
    return _Prompts(catalog, fusion, ids=tuple(ids)).render()


def text_prompts(catalog: Catalog, fusion: Fusion, text: str) -> LanePrompts:
    """The same text for every lane that has no prompt of its own, each encoded by its own tokenizer (which may add its
    own special tokens). Raises InvalidRequest or UnknownModel."""
    return _Prompts(catalog, fusion, text=text).render()


def chat_prompts(catalog: Catalog, fusion: Fusion, messages: Messages) -> LanePrompts:
    """Messages rendered per lane.

    A lane uses its own model's chat template. One whose model has none uses the tuned model's of its expert, the base
    the first that any expert of the request has. A lane's own prompt in `fusion` comes before all that; its route
    "plain" is the messages' text alone, joined by blank lines, as the proxy-tuning paper prompts base and untuned
    models.
    Raises InvalidRequest or UnknownModel, also where no template can be found.
    """
    return _Prompts(catalog, fusion, messages=messages).render()


class _Prompts:
    """Renders one request, which has given its prompt in exactly one form."""

    def __init__(
        self,
        catalog: Catalog,
        fusion: Fusion,
        *,
        ids: tuple[int, ...] | None = None,
        text: str | None = None,
        messages: Messages | None = None,
    ) -> None:
        self._catalog = catalog
        self._ids, self._text, self._messages = ids, text, messages
        program = fusion.compile(catalog)
        self._own = _by_canonical_name(catalog, fusion)
        # The base is always rendered: its prompt is what the answer counts and what an explanation may add.
        self._lanes = {name: catalog.model(name) for name in dict.fromkeys((BASE_LANE, *program.lanes))}
        for name in self._own:
            if name not in self._lanes and name not in program.idle_lanes:
                raise InvalidRequest(
                    f"'{name}' is no lane of this request; its lanes are {', '.join(self._lanes)}.",
                    param=f"fusion.prompts.{name}",
                )

    def render(self) -> LanePrompts:
        by_lane = {name: self._render(name) for name in self._lanes}
        return LanePrompts(by_lane[BASE_LANE], by_lane)

    def _render(self, name: str) -> tuple[int, ...]:
        own = self._own.get(name)
        tokenizer = self._lanes[name].tokenizer
        if own is None:
            if "@" in name:
                raise InvalidRequest(
                    f"Lane '{name}' has no prompt; give it one in 'fusion.prompts'.",
                    param=f"fusion.prompts.{name}",
                )
            return self._common(name, "")
        if own.tokens is not None:
            return own.tokens
        if own.text is not None:
            return tuple(tokenizer.encode(own.text))
        if own.messages is not None:
            return self._templated(name, own.messages, "")
        if own.prefix is not None:
            return self._common(name, own.prefix)
        if self._messages is None:
            raise InvalidRequest(
                f"'{own.route}' says how messages are rendered, and this request has none; give lane '{name}' a text.",
                param=f"fusion.prompts.{name}",
            )
        if own.route == "plain":
            return tuple(tokenizer.encode(_plain(self._messages)))
        return self._templated(name, self._messages, "")

    def _common(self, name: str, prefix: str) -> tuple[int, ...]:
        """The request's prompt, after `prefix`."""
        tokenizer = self._lanes[name].tokenizer
        if self._messages is not None:
            return self._templated(name, self._messages, prefix)
        if self._text is not None:
            return tuple(tokenizer.encode(prefix + self._text))
        ids = self._ids or ()
        return (*tokenizer.encode(prefix), *ids) if prefix else ids

    def _templated(self, name: str, messages: Messages, prefix: str) -> tuple[int, ...]:
        text = self._template(name).tokenizer.render_chat(messages)
        return tuple(self._lanes[name].tokenizer.encode(prefix + text, add_special_tokens=False))

    def _template(self, name: str) -> AnyModel:
        """The model whose chat template lane `name` uses."""
        expert, _, role = name.partition("@")[0].partition(".")
        candidates = [self._lanes[name]]
        if role:
            candidates.append(self._catalog.model(f"{expert}.tuned"))
        candidates += self._lanes.values()
        for model in candidates:
            if model.tokenizer.has_chat_template:
                return model
        raise InvalidRequest(
            f"Neither '{self._catalog.models.base.name}' nor the request's experts have a chat template; use "
            "/v1/completions, or name an expert that has one.",
            param="messages",
        )


def _by_canonical_name(catalog: Catalog, fusion: Fusion) -> dict[str, LanePrompt]:
    prompts: dict[str, LanePrompt] = {}
    for name, prompt in fusion.lane_prompts().items():
        try:
            prompts[catalog.lane(name, f"fusion.prompts.{name}")] = prompt
        except UnknownModel as error:  # a lane that is not there is a bad value, not a missing model
            raise InvalidRequest(error.message, param=error.param) from None
    return prompts


def _plain(messages: Messages) -> str:
    return "\n\n".join(str(message.get("content") or "") for message in messages)
