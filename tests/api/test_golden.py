"""Streams, byte for byte as they were recorded under golden/. What differs from run to run (ids, times, the version)
is replaced by its kind. If a difference is meant,

    RECORD_GOLDEN=1 pytest tests/api/test_golden.py

writes the files anew; look at what changed in them.

The numbers are written here, by a scripted engine, so that the files hold on every machine. Where the engine decides
how text is cut into events, it is a real one that can say nothing else, and no numbers are asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from proxyserve.config import ChatConfig, ServerConfig
from proxyserve.engine.submission import Submission
from proxyserve.models.model_set import ModelSet
from proxyserve.types import (
    FinishReason,
    FusionReport,
    LaneView,
    OutputEvent,
    TokenExplanation,
    TokenLogprob,
    Usage,
)
from tests.api.fakes import FakeEngine
from tests.api.live import Live, serve
from tests.text import chat_templates

GOLDEN = Path(__file__).parent / "golden"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Who wrote the first program?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

#: What is not the same in two runs, and what stands for it.
VARYING = (
    (r'"id":"(chatcmpl|cmpl|call)[-_][0-9a-zA-Z]+"', r'"id":"\1-ID"'),
    (r'"created":\d+', '"created":0'),
    (r'"system_fingerprint":"proxyserve-[^"]+"', '"system_fingerprint":"proxyserve-VERSION"'),
    (r'"mean_removed_mass":[0-9.e-]+', '"mean_removed_mass":0.0'),  # of a real engine
)

PIECES = ((70, "Ada "), (77, "Love"), (78, "lace"))
REPORT = FusionReport("proxy", 0.8, {"qa": 3}, mean_kl=0.125, flips=1)


def event(index: int = 0, ids: Sequence[int] = (), text: str = "", **more: Any) -> OutputEvent:
    return OutputEvent("", index, tuple(ids), text, **more)


def end(index: int = 0, tokens: int = 4, **more: Any) -> OutputEvent:
    """The end-of-text token, which is no text."""
    usage = Usage(12, tokens, 4, {"atlas": 8 + tokens, "qa": 8 + tokens})
    given: dict[str, Any] = {"finish_reason": FinishReason.STOP, "usage": usage, **more}
    return event(index, (0,), **given)


def told(token: int, logprob: float) -> TokenLogprob:
    """With the tokens of two bytes that make up no character, and one that cannot come."""
    return TokenLogprob(token, logprob, top=((token, logprob), (0, -2.5), (130, float("-inf"))))


def explanation(token: int) -> TokenExplanation:
    views = {
        name: LaneView(value, ((token, value), (0, -3.0)))
        for name, value in (("base", -1.5), ("qa.tuned", -0.25), ("qa.untuned", -1.0))
    }
    fused = LaneView(-0.5, ((token, -0.5), (0, -4.0)))
    return TokenExplanation(
        token, fused, views, {"qa": 0.8}, {"qa": 0.6}, kl=0.0625, flip=token == 77, gated=token == 78
    )


PLAIN = [event(ids=(token,), text=text) for token, text in PIECES]
SCORED = [told(token, -0.125 * number) for number, (token, _) in enumerate(PIECES, start=1)]


@dataclass(frozen=True)
class Transcript:
    """The `script` of a fake engine, or what a real one is made to say."""

    path: str
    body: Mapping[str, Any]
    script: Sequence[OutputEvent] | None = None
    chat: ChatConfig = field(default_factory=ChatConfig)


def chat(script: Sequence[OutputEvent], template: str | None = None, **body: Any) -> Transcript:
    return Transcript(
        CHAT, {"model": "atlas+qa", "messages": USER, "max_tokens": 99, **body}, script, ChatConfig(template)
    )


def text(script: Sequence[OutputEvent] | None = None, **body: Any) -> Transcript:
    return Transcript(TEXT, {"model": "atlas+qa", "prompt": "name: ", "temperature": 0, **body}, script)


CALLS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'

TRANSCRIPTS: dict[str, Transcript] = {
    "chat": chat([*PLAIN, end()], chat_templates.HERMES, model="atlas"),
    "chat_fused_usage": chat([*PLAIN, end(fusion=REPORT)], stream_options={"include_usage": True}),
    "chat_logprobs": chat(
        [
            *(replace(one, logprobs=(score,)) for one, score in zip(PLAIN, SCORED, strict=True)),
            end(logprobs=(told(0, -0.75),), fusion=REPORT),
        ],
        logprobs=True,
        top_logprobs=3,
        return_token_ids=True,
    ),
    "chat_two_answers": chat(
        [
            event(0, (70,), "Ada"),
            event(1, (71,), "Bob"),
            event(1, (72,), " Ross", finish_reason=FinishReason.LENGTH, usage=Usage(12, 2, 12, {"atlas": 1})),
            end(0, fusion=REPORT),
        ],
        n=2,
    ),
    "chat_tool_call": chat(
        [*(event(ids=(9,), text=CALLS[at : at + 16]) for at in range(0, len(CALLS), 16)), end(fusion=REPORT)],
        chat_templates.HERMES,
        tools=[WEATHER],
    ),
    "chat_reasoning": chat(
        [
            event(ids=(5,), text="A programmer"),
            event(ids=(6,), text=" was asked for.\n</th"),
            event(ids=(7,), text="ink>\n\nAda"),
            end(fusion=REPORT),
        ],
        chat_templates.THINKING,
        model="atlas",
    ),
    "chat_error_midway": chat([PLAIN[0], event(finish_reason=FinishReason.ERROR, error="The step failed.")]),
    "chat_explain": chat(
        [
            *(replace(one, explanations=(explanation(one.token_ids[0]),)) for one in PLAIN),
            end(explanations=(explanation(0),), fusion=REPORT),
        ],
        fusion={"explain": 2},
    ),
    "completions_echo_logprobs": text(
        [
            event(prompt_logprobs=(None, *(told(token, -1.0 - token / 256) for token in (81, 82)))),
            *(replace(one, logprobs=(score,)) for one, score in zip(PLAIN[:2], SCORED[:2], strict=True)),
            end(tokens=3, logprobs=(told(0, -0.75),), fusion=REPORT),
        ],
        prompt=[80, 81, 82],
        echo=True,
        logprobs=3,
        stream_options={"include_usage": True},
    ),
    "completions_stop": text(
        model="atlas",
        structured_outputs={"choice": ["Ada Lovelace STOP and more"]},
        stop=[" STOP", "never"],
        max_tokens=40,
    ),
    "completions_multibyte": text(
        model="atlas",
        structured_outputs={"choice": ["Zwölf 日本語 🙂!"]},
        max_tokens=60,
        stream_options={"include_usage": True},
    ),
}


def normalised(stream: str) -> str:
    for pattern, kind in VARYING:
        stream = re.sub(pattern, kind, stream)
    return stream


def played(models: ModelSet, transcript: Transcript) -> str:
    """The stream of a fake engine."""

    async def play(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        for one in transcript.script or ():
            yield replace(one, request_id=submissions[0].request_id)

    with serve(FakeEngine(models, play), ServerConfig(chat=transcript.chat)) as live:
        return streamed(live, transcript)


def streamed(live: Live, transcript: Transcript) -> str:
    response = live.post(transcript.path, **transcript.body, stream=True)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return response.text


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_stream_is_as_recorded(live: Live, tiny_models: ModelSet, name: str) -> None:
    transcript = TRANSCRIPTS[name]
    stream = streamed(live, transcript) if transcript.script is None else played(tiny_models, transcript)
    path = GOLDEN / f"{name}.sse"
    if os.environ.get("RECORD_GOLDEN"):
        path.write_text(normalised(stream))
    assert normalised(stream) == path.read_text()
