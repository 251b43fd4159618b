"""From what a caller wrote to the prompt ids of each lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxyserve.engine.submission import LanePrompts
from proxyserve.errors import InvalidRequest, UnknownModel
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.fusion.program import BASE_LANE
from proxyserve.text.templates import OWN_VARIABLES, ChatTemplate
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.text.tools.formats import (
    HERMES,
    Tool,
    ToolFormat,
    format_of_template,
    without_tools,
)

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered, beside its messages. `variables` are for the templates, by the fields of the
    request that they came from: every one must be read by a template of the request. `fallback` is the source of the
    operator's template for models that have none, `tool_format` the operator's choice; without one each template's own
    is found."""

    tools: tuple[Tool, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    variable_fields: Mapping[str, str] = field(default_factory=dict)
    fallback: str | None = None
    tool_format: ToolFormat | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompts:
    """The prompts of a conversation. How the answer is to be read follows from the first lane, the base before others,
    whose prompt a template made: the template's source, its text, and the form of tool calls that it was told."""

    lanes: LanePrompts
    template: str = ""
    text: str = ""
    tool_format: ToolFormat = HERMES


def token_prompts(catalog: Catalog, fusion: Fusion, ids: Sequence[int]) -> LanePrompts:
    """The same given ids for every lane that has no prompt of its own. Raises InvalidRequest or UnknownModel."""
    return _Prompts(catalog, fusion, ids=tuple(ids)).render()


def text_prompts(catalog: Catalog, fusion: Fusion, text: str) -> LanePrompts:
    """The same text for every lane that has no prompt of its own, each encoded by its own tokenizer (which may add its
    own special tokens). Raises InvalidRequest or UnknownModel."""
    return _Prompts(catalog, fusion, text=text).render()


def chat_prompts(
    catalog: Catalog, fusion: Fusion, messages: Messages, options: ChatOptions | None = None
) -> ChatPrompts:
    """Messages rendered per lane.

    A lane uses its own model's chat template. One whose model has none uses, in this order, the tuned model's of its
    expert, the operator's, and the first that any model of the request has. A lane's own prompt in `fusion` comes
    before all that; its route "plain" is the messages' text alone, joined by blank lines, as the proxy-tuning paper
    prompts base and untuned models.
    Where a template knows no tools, they are announced in the system message, and calls and results of earlier turns
    are text.
    Raises InvalidRequest or UnknownModel, also where no template can be found.
    """
    return _Prompts(catalog, fusion, messages=messages, options=options or ChatOptions()).chat()


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
        options: ChatOptions | None = None,
    ) -> None:
        self._catalog = catalog
        self._options = options or ChatOptions()
        self._rendered: list[_Rendered] = []
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

    def chat(self) -> ChatPrompts:
        _check_names(self._options)
        lanes = self.render()
        if not self._rendered:
            self._check_variables([])
            return ChatPrompts(lanes)
        self._check_variables([rendered.template for rendered in self._rendered])
        first = self._rendered[0]
        return ChatPrompts(lanes, first.template.source, first.text, first.tool_format)

    def _check_variables(self, templates: Sequence[ChatTemplate]) -> None:
        for name in self._options.variables:
            if not any(template.reads(name) for template in templates):
                raise InvalidRequest(
                    f"No chat template of this request reads '{name}', so that it would change nothing; leave it out.",
                    param=self._options.variable_fields.get(name, name),
                )

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
        rendered = self._with_template(name, messages)
        self._rendered.append(rendered)
        return tuple(self._lanes[name].tokenizer.encode(prefix + rendered.text, add_special_tokens=False))

    def _with_template(self, name: str, messages: Messages) -> _Rendered:
        options = self._options
        if options.continue_final_message and messages[-1]["role"] != "assistant":
            raise InvalidRequest(
                "The last message is not the assistant's, so that there is nothing to continue.",
                param="continue_final_message",
            )
        template, tokenizer = self._template(name)
        form = options.tool_format or format_of_template(template.source)
        tools: tuple[Tool, ...] = options.tools
        if template.knows_tools:
            if tools and form is None:
                raise InvalidRequest(
                    "The chat template teaches a form of tool calls that this server does not know; start it with "
                    "--tool-parser if it is one of those after all.",
                    param="tools",
                )
        else:
            messages, tools = without_tools(messages, tools, form or HERMES), ()
        text = template.render(
            messages,
            tools=tools,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            variables={**options.variables, **tokenizer.template_variables},
        )
        return _Rendered(template, text, form or HERMES)

    def _template(self, name: str) -> tuple[ChatTemplate, Tokenizer]:
        """The chat template that lane `name` uses, and whose special tokens it writes."""
        expert, _, role = name.partition("@")[0].partition(".")
        tools = bool(self._options.tools)
        own = [self._lanes[name].tokenizer]
        if role:
            own.append(self._catalog.model(f"{expert}.tuned").tokenizer)
        for tokenizer in own:
            if (template := tokenizer.chat_template(tools=tools)) is not None:
                return template, tokenizer
        if self._options.fallback is not None:
            return ChatTemplate(self._options.fallback), own[0]
        for model in self._lanes.values():
            if (template := model.tokenizer.chat_template(tools=tools)) is not None:
                return template, model.tokenizer
        raise InvalidRequest(
            f"Neither '{self._catalog.models.base.name}' nor the request's experts have a chat template; use "
            "/v1/completions, name an expert that has one, or start the server with --chat-template.",
            param="messages",
        )


@dataclass(frozen=True, slots=True)
class _Rendered:
    """One lane's prompt, and where it came from."""

    template: ChatTemplate
    text: str
    tool_format: ToolFormat


def _check_names(options: ChatOptions) -> None:
    for name in options.variables:
        if name in OWN_VARIABLES or name.endswith("_token"):
            raise InvalidRequest(
                f"'{name}' is for the server to give to chat templates; leave it out.",
                param=options.variable_fields.get(name, name),
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
