"""What the routes for conversations have in common: how messages become prompts, how answers are read, and what tokens
may come in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxyserve.api.tools import ToolUse
from proxyserve.config import ChatConfig, GrammarLimits, Limits
from proxyserve.engine.constraint import Constrains
from proxyserve.engine.one_call import OneCall
from proxyserve.engine.prompts import ChatOptions, ChatPrompts
from proxyserve.engine.thinking import AfterThinking, Thinking, ThinkingBudget
from proxyserve.errors import InvalidRequest
from proxyserve.grammar.checks import schema_text
from proxyserve.grammar.grammar import Grammar, GrammarKind, lark
from proxyserve.text.answer import AnswerFormat
from proxyserve.text.reasoning import ReasoningMarks
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.text.tools.formats import FORMATS
from proxyserve.text.tools.grammar import forced_calls, free_calls


@dataclass(frozen=True, slots=True)
class AskedChat:
    """What a request says about templates and answers, under the names of `/v1/chat/completions`."""

    tools: ToolUse
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    thinking_budget: int | None = None


def chat_options(asked: AskedChat, chat: ChatConfig, limits: Limits) -> ChatOptions:
    """Raises InvalidRequest where fields do not go together, or are above `limits`."""
    _check_variables(asked.template_variables, limits)
    variables = dict(asked.template_variables)
    fields = {name: f"chat_template_kwargs.{name}" for name in variables}
    if asked.reasoning_effort is not None:
        if "reasoning_effort" in variables:
            raise InvalidRequest(
                "It is given in 'chat_template_kwargs' as well; use one of them.", param="reasoning_effort"
            )
        variables["reasoning_effort"] = asked.reasoning_effort
        fields["reasoning_effort"] = "reasoning_effort"
    if asked.add_generation_prompt and asked.continue_final_message:
        raise InvalidRequest(
            "An answer that continues the last message does not begin a turn; leave 'add_generation_prompt' out.",
            param="add_generation_prompt",
        )
    return ChatOptions(
        tools=asked.tools.shown,
        add_generation_prompt=not asked.continue_final_message and asked.add_generation_prompt is not False,
        continue_final_message=asked.continue_final_message,
        variables=variables,
        variable_fields=fields,
        fallback=chat.template,
        tool_format=None if chat.tool_parser == "auto" else FORMATS[chat.tool_parser],
    )


def answer_format(
    prompts: ChatPrompts, tools: ToolUse, chat: ChatConfig, tokenizer: Tokenizer
) -> AnswerFormat:
    """How the answer to `prompts` is to be read. `tokenizer` is the base's."""
    marks = ReasoningMarks()
    splits = chat.reasoning_parser == "deepseek" or (
        chat.reasoning_parser == "auto" and marks.found_in(prompts.template)
    )
    form = AnswerFormat(
        reasoning=marks if splits else None,
        thinking=splits and marks.opened_by(prompts.text),
        tool_format=prompts.tool_format if tools.callable else None,
        tools=tools.callable,
    )
    return form.with_special_tokens(tokenizer.special_tokens)


def chat_grammar(
    asked: AskedChat, form: AnswerFormat, given: Grammar | None, tokenizer: Tokenizer, limits: GrammarLimits
) -> Grammar | None:
    """The form of the answer, None for free text. `given` is the form that the request asks for beside its tools: where
    the model may call, it may also answer so. Raises InvalidRequest."""
    tools = asked.tools
    if form.tool_format is None:
        return given
    if given is not None and given.kind is not GrammarKind.JSON_SCHEMA:
        raise InvalidRequest(
            "Beside tools the answer can have the form of a JSON schema, and no other; leave one of them out.",
            param=given.param,
        )
    if given is not None and tools.forced:
        raise InvalidRequest(
            "With this 'tool_choice' the answer is a call, and has no other form; leave one of them out.",
            param=given.param,
        )
    if not (tools.forced or tools.bound or given):
        return None
    for number, tool in enumerate(tools.callable):
        parameters = tool["function"].get("parameters", {})
        schema_text(parameters, limits, f"tools[{number}].function.parameters")
    special = tokenizer.special_tokens
    if tools.forced or given is not None:
        text = forced_calls(
            form.tool_format,
            tools.callable,
            several=tools.several,
            special=special,
            otherwise=None if given is None else json.loads(given.text),
        )
    else:
        text = free_calls(form.tool_format, tools.callable, special=special)
    return lark(text, limits, "tools")


def chat_constraints(
    form: AnswerFormat,
    asked: AskedChat,
    tokenizer: Tokenizer,
    compiled: Sequence[Constrains] = (),
    *,
    ends: frozenset[int] = frozenset(),
) -> tuple[Constrains, ...]:
    """What limits the tokens of the answer; `compiled` are forms of what comes after the reasoning, `ends` the tokens
    that end a text. Raises InvalidRequest."""
    constraints: list[Constrains] = list(compiled)
    if form.reasoning is not None:
        thinking = Thinking(form.reasoning, tokenizer, begun=form.thinking)
        constraints = [AfterThinking(thinking, each, ends) for each in compiled]
        if asked.thinking_budget is not None:
            constraints.append(ThinkingBudget(thinking, asked.thinking_budget))
    elif asked.thinking_budget is not None:
        raise InvalidRequest(
            "This model's reasoning is not told apart from its answer, so that there is nothing to bound; leave it "
            "out, or start the server with --reasoning-parser.",
            param="thinking_budget",
        )
    if form.tool_format is not None and not (asked.tools.several or asked.tools.forced):
        constraints.append(OneCall(form, tokenizer))
    return tuple(constraints)


def _check_variables(variables: Mapping[str, Any], limits: Limits) -> None:
    param = "chat_template_kwargs"
    if len(variables) > limits.max_template_variables:
        raise InvalidRequest(
            f"{len(variables)} variables are given; this server allows {limits.max_template_variables}.",
            param=param,
        )
    for name, value in variables.items():
        if not name.isidentifier() or len(name) > _LONGEST_NAME:
            raise InvalidRequest("Its keys must be names of variables.", param=param)
        if isinstance(value, str) and len(value) > limits.max_template_variable_length:
            raise InvalidRequest(
                f"It has {len(value)} characters; this server allows {limits.max_template_variable_length}.",
                param=f"{param}.{name}",
            )


_LONGEST_NAME = 64
