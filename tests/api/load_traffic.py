"""What the clients of the load test ask: a seeded mix of all that the generating routes can be asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

#: At most so many tokens has an answer.
MOST_TOKENS = 24

#: Some begin alike, so that prompts find each other in the prefix cache.
QUESTIONS = (
    "Where was {} born?",
    "What is the job of {}?",
    "What pet does {} keep? And which instrument does {} play, if there is one?",
    "Page: {}\n",
)
NAMES = ("Kustin", "Mira", "Norland", "Ada", "Zwölf 🙂")

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
    },
}

#: Which laws are asked for, as fields of a request. The base has no chat template, but experts have.
TEMPLATED: list[dict[str, Any]] = [
    {"model": "atlas+qa"},
    {"model": "atlas+qa:0.8+bio:0.3+record:0.2"},
    {"model": "atlas", "fusion": {"rule": "dynamic", "experts": {"qa": 1.0}}},
    {
        "model": "atlas",
        "fusion": {"rule": "dynamic", "experts": {"qa": 1.0, "guard": 0.5}, "max_weight": 1.5},
    },
    {"model": "atlas", "fusion": {"rule": "upscale", "experts": {"qa": 1.0}, "beta": 0.5, "top_p": 0.95}},
    {"model": "atlas", "fusion": {"rule": "contrast", "experts": {"bio": 1.0}}},
    {"model": "atlas", "fusion": {"rule": "unlearn", "experts": {"guard": 1.0}}},
    {"model": "atlas", "fusion": {"experts": {"record": 1.0}, "gate": {"confidence": 0.6}}},
    {"model": "atlas", "fusion": {"experts": {"bio": 0.7}, "support": {"of": ["base"], "top_k": 50}}},
]
LAWS = [
    *TEMPLATED,
    {"model": "atlas"},
    {"model": "atlas", "fusion": {"rule": "mixture", "models": {"base": 0.5, "qa.tuned": 0.5}}},
]
#: The prompt is scored by no lane that has another one, so that this does not go with `echo` and `/v1/score`.
GUIDANCE = {"model": "atlas", "fusion": {"rule": "guidance", "scale": 1.5, "negative_prompt": "No."}}


@dataclass(frozen=True)
class Ask:
    """One request. `choices` are those that a complete answer has."""

    path: str
    body: dict[str, Any]
    choices: int = 1

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def may_time_out(self) -> bool:
        return "timeout" in self.body

    @property
    def may_be_cornered(self) -> bool:
        """Whether its rule or its support may rule out all that the required form allows."""
        form = self.body.keys() & {"structured_outputs", "response_format", "tools"}
        fusion = self.body.get("fusion", {})
        return bool(form) and (fusion.get("rule") == "contrast" or "support" in fusion)


def next_ask(rng: random.Random) -> Ask:
    make = rng.choices((_completion, _chat, _response, _score), (5, 4, 2, 1))[0]
    return make(rng)


def _common(rng: random.Random, laws: list[dict[str, Any]]) -> dict[str, Any]:
    body = {**rng.choice(laws)}
    if rng.random() < 0.5:
        body.update(temperature=1.2, seed=rng.randrange(1000))
    if rng.random() < 0.06:
        body["timeout"] = rng.choice((0.001, 0.05, 0.5))
    elif rng.random() < 0.06:
        # Whoever steps back may wait for as long as others do not, so that somebody must say when it is enough.
        body.update(priority=rng.randint(1, 3), timeout=5.0)
    return body


def _generated(rng: random.Random, laws: list[dict[str, Any]]) -> dict[str, Any]:
    body = {**_common(rng, laws), "stream": rng.random() < 0.75}
    if body["stream"] and rng.random() < 0.3:
        body["stream_options"] = {"include_usage": True}
    return body


def _question(rng: random.Random) -> str:
    name = rng.choice(NAMES)
    return rng.choice(QUESTIONS).format(name, name)


def _completion(rng: random.Random) -> Ask:
    prompts = 2 if rng.random() < 0.1 else 1
    n = rng.choices((1, 2, 3), (8, 1, 1))[0]
    body = {**_generated(rng, LAWS), "n": n, "max_tokens": rng.randint(1, MOST_TOKENS)}
    body["prompt"] = [_question(rng) for _ in range(prompts)] if prompts > 1 else _question(rng)
    match rng.randrange(8):
        case 0:
            body.update(echo=True, logprobs=3)
        case 1:
            body["logprobs"] = 5
        case 2:
            body.update(ignore_eos=True, stop=[" a", "\n"])
        case 3:
            body["structured_outputs"] = {"regex": "(yes|no)[.!]"}
        case 4:
            body.update(ignore_eos=True, repetition_penalty=1.2, top_p=0.9)
        case 5:
            body.update(GUIDANCE)
    return Ask("/v1/completions", body, choices=n * prompts)


def _chat(rng: random.Random) -> Ask:
    n = 2 if rng.random() < 0.1 else 1
    body = {**_generated(rng, TEMPLATED), "n": n, "max_tokens": rng.randint(1, MOST_TOKENS)}
    body["messages"] = [{"role": "user", "content": _question(rng)}]
    match rng.randrange(6):
        case 0:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        case 1:
            body.update(tools=[{"type": "function", "function": TOOL}], tool_choice="required")
        case 2:
            body.update(logprobs=True, top_logprobs=2)
        case 3:
            body["stop"] = "."
    return Ask("/v1/chat/completions", body, choices=n)


def _response(rng: random.Random) -> Ask:
    body = {
        **_generated(rng, TEMPLATED),
        "input": _question(rng),
        "max_output_tokens": rng.randint(1, MOST_TOKENS),
    }
    body.pop("stream_options", None)
    return Ask("/v1/responses", body)


def _score(rng: random.Random) -> Ask:
    body = {**_common(rng, LAWS), "prompt": _question(rng), "continuations": [" yes", " no", " perhaps"]}
    for name in ("temperature", "seed"):
        body.pop(name, None)
    return Ask("/v1/score", body, choices=3)
