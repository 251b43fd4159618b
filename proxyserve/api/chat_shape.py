"""How answers of `/v1/chat/completions` are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proxyserve.api.choice_extras import prompt_extras, token_extras
from proxyserve.api.explanations import explained, wants_explanations
from proxyserve.api.generate import Answer
from proxyserve.api.logprobs import chat_logprobs
from proxyserve.api.respond import Fields, response_head, unique_id
from proxyserve.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    FunctionCallBody,
    FunctionDelta,
    ToolCallBody,
    ToolCallDelta,
)
from proxyserve.api.schemas.responses import CompletionTokensDetails, UsageBody, finish_name
from proxyserve.api.structured import grammar_report
from proxyserve.text.answer import AnswerFormat, AnswerReader
from proxyserve.text.pieces import CallArguments, CallBegun, Content, Piece, Reasoning, joined
from proxyserve.types import FinishReason, OutputEvent, TokenLogprob

if TYPE_CHECKING:
    from proxyserve.text.tokenizer import Tokenizer


class ChatShape:
    """Chat's `ResponseShape`. The first chunk of a choice has its role and nothing else, the last its finish reason and
    nothing else. `form` says how the answer is to be read, `prompt` has the base's ids; they are set before anything is
    written."""

    form: AnswerFormat
    prompt: Sequence[int]

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self._head = response_head("chatcmpl", body.model)
        self._body = body
        self.id: str = self._head["id"]
        if body.service_tier is not None:
            self._head["service_tier"] = "default"
        self._names_tool = body.tool_choice is not None and body.tool_choice.type == "function"
        self._wants_logprobs = bool(body.logprobs)
        self._wants_explanations = wants_explanations(body.fusion)
        self._tokenizer = tokenizer
        self._streams: dict[int, _Reading] = {}
        self._reasoning_tokens = 0

    def chunks(self, number: int, event: OutputEvent, *, each: Fields, last: Fields) -> list[ChatChunk]:
        choices: list[ChatChunkChoice] = []
        of_prompt = {} if self._streams else self._of_prompt(event)
        reading = self._streams.get(number)
        if reading is None:
            reading = self._streams[number] = _Reading(self.form)
            # What will come is content, unless it may be something else.
            plain = self.form.reasoning is None and self.form.tool_format is None
            choices.append(self._choice(number, ChatDelta(role="assistant", content="" if plain else None)))
        pieces = [*reading.read(event.text, len(event.token_ids))]
        if event.finish_reason is not None:
            pieces = joined([*pieces, *reading.finish()])
        deltas = [reading.delta(piece) for piece in pieces]
        if event.logprobs or event.explanations or (self._body.return_token_ids and event.token_ids):
            first, *deltas = deltas or [ChatDelta()]
            logprobs = self._logprobs(event.logprobs or ())
            beside = self._beside(event)
            choices.append(self._choice(number, first, logprobs=logprobs, **beside))
        choices += [self._choice(number, delta) for delta in deltas]
        if event.finish_reason is not None:
            self._reasoning_tokens += reading.reasoning_tokens
            reason = self._finish(event.finish_reason, reading)
            ended = {"finish_reason": reason, "stop_reason": event.stop_reason}
            report = grammar_report(event.removed_mass)
            choices.append(self._choice(number, ChatDelta(), **ended, **report))
        return [
            self._chunk(
                [choice],
                **each,
                **(of_prompt if position == 1 else {}),
                **(last if position == len(choices) else {}),
            )
            for position, choice in enumerate(choices, start=1)
        ]

    def closing(self, **more: Any) -> ChatChunk:
        return self._chunk([], **self._counted(more))

    def whole(self, answers: Sequence[Answer], **more: Any) -> ChatCompletion:
        choices: list[ChatChoice] = []
        for number, answer in enumerate(answers):
            reading = _Reading(self.form)
            pieces: list[Piece] = []
            for text, length in zip(answer.pieces, answer.lengths, strict=True):
                pieces += reading.read(text, length)
            pieces += reading.finish()
            self._reasoning_tokens += reading.reasoning_tokens
            choices.append(
                ChatChoice(
                    index=number,
                    message=reading.message(pieces),
                    logprobs=self._logprobs(answer.logprobs),
                    finish_reason=self._finish(answer.finish_reason, reading),
                    stop_reason=answer.stop_reason,
                    **self._beside(answer),
                    **grammar_report(answer.removed_mass),
                )
            )
        more = self._counted(more) | self._of_prompt(answers[0])
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, **more)

    def _chunk(self, choices: list[ChatChunkChoice], **more: Any) -> ChatChunk:
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=choices, **more)

    def _choice(self, number: int, delta: ChatDelta, **more: Any) -> ChatChunkChoice:
        empty = {
            "logprobs": self._logprobs(()),
            "finish_reason": None,
            **self._beside(OutputEvent("", number)),
        }
        return ChatChunkChoice(index=number, delta=delta, **{**empty, **more})

    def _finish(self, reason: FinishReason | None, reading: _Reading) -> Any:
        """`tool_calls` where the model has called and no call was cut off; OpenAI says `stop` where the client itself
        has named the tool."""
        calls = reading.has_called and reason is FinishReason.STOP and not self._names_tool
        return "tool_calls" if calls else finish_name(reason)

    def _counted(self, more: dict[str, Any]) -> dict[str, Any]:
        usage = more.get("usage")
        if isinstance(usage, UsageBody) and self.form.reasoning is not None:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=self._reasoning_tokens)
        return more

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self._tokenizer) if self._wants_logprobs else None

    def _beside(self, part: OutputEvent | Answer) -> dict[str, Any]:
        """What a choice has for each token beside log-probabilities; nothing at all for a request that did not ask."""
        fields = token_extras(self._body, part)
        if self._wants_explanations:
            fields["explain"] = explained(part.explanations or (), self._tokenizer)
        return fields

    def _of_prompt(self, part: OutputEvent | Answer) -> dict[str, Any]:
        return prompt_extras(self._body, self.prompt, part, self._tokenizer)


class _Reading:
    """One choice as it is read."""

    def __init__(self, form: AnswerFormat) -> None:
        self._reader: AnswerReader = form.reader()

    @property
    def reasoning_tokens(self) -> int:
        return self._reader.reasoning_tokens

    @property
    def has_called(self) -> bool:
        """Whether there are calls, all of them whole: a stop string may come in the middle of one."""
        return 0 < self._reader.calls == self._reader.ended_calls

    def read(self, text: str, tokens: int) -> Sequence[Piece]:
        return self._reader.push(text, tokens)

    def finish(self) -> Sequence[Piece]:
        return self._reader.finish()

    def delta(self, piece: Piece) -> ChatDelta:
        match piece:
            case Content():
                return ChatDelta(content=piece.text)
            case Reasoning():
                return ChatDelta(reasoning=piece.text, reasoning_content=piece.text)
            case CallBegun():
                call = ToolCallDelta(
                    index=piece.index,
                    id=unique_id("call"),
                    type="function",
                    function=FunctionDelta(name=piece.name, arguments=""),
                )
            case CallArguments():
                call = ToolCallDelta(index=piece.index, function=FunctionDelta(arguments=piece.text))
        return ChatDelta(tool_calls=[call])

    def message(self, pieces: Sequence[Piece]) -> AssistantMessage:
        """The pieces of a whole answer."""
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        calls: list[ToolCallBody] = []
        for piece in pieces:
            if isinstance(piece, CallBegun):
                function = FunctionCallBody(name=piece.name, arguments="")
                calls.append(ToolCallBody(id=unique_id("call"), type="function", function=function))
            elif isinstance(piece, CallArguments):
                calls[piece.index].function.arguments += piece.text
        more: dict[str, Any] = {}
        if reasoning:
            more |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls:
            more["tool_calls"] = calls
        shown = content if content or not more else None
        return AssistantMessage(role="assistant", content=shown, refusal=None, **more)
