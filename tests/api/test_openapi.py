"""schemathesis tries what the OpenAPI document says: everything that it allows is accepted, everything else is refused,
and every answer is as documented. All of its checks are on.

What a document cannot say is whether a request fits this very server. `fitting` makes generated requests fit where that
is a matter of names and sizes, and `UNSAID` lists the fields that may be refused all the same, with the reason.

    PROXYSERVE_OPENAPI_EXAMPLES=500 pytest tests/api/test_openapi.py

tries more than the few examples per operation that a test run can afford.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from proxyserve.config import ServerConfig
from tests.api.live import Live, assert_idle, serve
from tests.experts.shelf import open_state, save_tiny

ADMIN = "sk-of-the-admin"
EXAMPLES = int(os.environ.get("PROXYSERVE_OPENAPI_EXAMPLES", "12"))

#: Of these, schemathesis would take half a minute to think of the thousands of edges of all their fields together.
MANY_FIELDS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/score",
    "/v1/responses",
    "/admin/v1/presets/{name}",
)

STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

#: Ends the server for good, so that nothing could be tried after it; tests/api/test_drain.py does that.
LEFT_ALONE = ("/admin/v1/drain",)

#: Fields of requests that the document allows and a server may refuse with a 400, by what `param` begins with.
UNSAID: Mapping[str, str] = {
    r"model$": "the name must be of a model that this server has, and go with `fusion`",
    r"name$": "the path's name may be taken by another thing",
    r"fusion\.": "experts, lanes, formulas and weights are this server's and its policy's; rules bind fields together",
    r"messages(\[|$)": "calls and their answers go in pairs, arguments are JSON in a string; a template is needed",
    r"(prompt|texts|continuations|tokens)(\[|$)": "ids must be in the vocabulary; a text to score has two tokens; the "
    "context is limited",
    r"(stop|bad_words|stop_token_ids|allowed_token_ids|logprob_token_ids|label_token_ids|logit_bias)(\[|\.|$)": "ids "
    "must be in the vocabulary, each once; their number and length are limited by configuration",
    r"(n|best_of|logprobs|top_logprobs|prompt_logprobs)$": "the most is configured; they go with one another",
    r"(input|instructions)(\[|$)": "as messages",
    r"(text|reasoning|include)(\[|\.|$)": "as response_format and reasoning_effort; they go with one another",
    r"(max_tokens|max_completion_tokens|max_output_tokens|min_tokens)$": "they depend on each other and on "
    "the context",
    r"(tools|tool_choice|parallel_tool_calls|reasoning_effort|thinking_budget|chat_template_kwargs|"
    r"continue_final_message|add_generation_prompt)(\[|\.|$)": "what the chat template and the other fields have",
    r"(response_format|structured_outputs)(\.|$)": "grammars, expressions and schemas have rules of their own",
    r"(stream_options|return_tokens_as_token_ids|add_special_tokens)$": "they go with another field",
    r"(tuned|untuned)\.": "files must be there and go together",
    r"timeout$": "the most is configured",
}

#: Errors that name no field, by their code.
UNSAID_CODES: Mapping[str, str] = {
    "no_token_left": "a grammar, allowed ids and bad words may leave nothing to say",
    "load_failed": "files must be there and go together",
}

#: What a field of ids is called, and how many tokens the tiny models know.
IDS = {
    "allowed_token_ids",
    "continuations",
    "label_token_ids",
    "logprob_token_ids",
    "negative_prompt",
    "prompt",
    "stop_token_ids",
    "texts",
    "tokens",
}
KNOWN = 320


def fitting(body: Any, key: str = "") -> Any:
    """`body` with names, ids and sizes that fit a tiny server. JSON Schema counts 1.0 among the integers; requests here
    must write them as such."""
    if isinstance(body, dict):
        fitted = {name: fitting(value, name) for name, value in body.items()}
        if "max_tokens" in fitted or "messages" in fitted or "prompt" in fitted:
            fitted.pop("timeout", None)  # else the answer is mostly that the time is over
        if fitted.get("logit_bias"):
            fitted["logit_bias"] = {
                str(int(name) % KNOWN): bias for name, bias in fitted["logit_bias"].items()
            }
        return fitted
    if isinstance(body, list):
        return [fitting(entry, key) for entry in body]
    if isinstance(body, float) and body.is_integer() and abs(body) < 2**53:
        body = int(body)
    if type(body) is int and key == "seed":
        return body % 2**63  # its bounds are rounded where JSON is read with floats
    if type(body) is int and key in IDS:
        return body % KNOWN
    if type(body) is int and key in ("logprobs", "top_logprobs", "prompt_logprobs", "explain", "min_tokens"):
        return body % 4
    if type(body) is int and key in ("n", "max_tokens", "max_completion_tokens", "max_output_tokens"):
        return min(body, 3)
    if isinstance(body, str) and key == "model":
        return "atlas+qa" if len(body) % 2 else "atlas"
    return body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With keys and a control plane, over a base with a chat template and one expert."""
    root = tmp_path_factory.mktemp("openapi")
    base = save_tiny(root / "atlas", "llama", seed=1, hidden=64, layers=3, padding=24, chat=True)
    small, tuned = (save_tiny(root / name, "llama", seed=seed) for seed, name in ((2, "small"), (3, "qa")))
    (root / "keys").write_text(ADMIN)
    config = ServerConfig(admin_key_file=root / "keys")
    with open_state(base, root / "state", f"qa={tuned},{small}", roots=[root], max_batch=4) as opened:
        opened.engine.start()
        try:
            with serve(opened.engine, config, opened.experts) as live:
                live.http.headers["authorization"] = f"Bearer {ADMIN}"
                yield live
        finally:
            opened.engine.close()


def document_of(live: Live, **settings: Any) -> Any:
    """schemathesis's view of the server, with hooks that make its requests fit."""
    authorization = {"Authorization": f"Bearer {ADMIN}"}
    config = SchemathesisConfig.from_dict(
        {
            "seed": 7,
            "headers": authorization,
            "continue-on-failure": True,
            # Nothing but a text can be the id in a path: of that, no wrong one can be made.
            "suppress-health-check": ["filter_too_much"],
            "request-timeout": 20.0,
            "generation": {
                "deterministic": True,
                "database": "none",
                "max-examples": EXAMPLES,
                "no-shrink": True,
            },
            # A 504 is what was asked for where the request's own `timeout` is over at once.
            "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]}},
            "operations": [
                {"include-path": path, "phases": {"coverage": {"enabled": EXAMPLES > 100}}}
                for path in MANY_FIELDS
            ],
            **settings,
        }
    )
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json", config=config, headers=authorization)
    schema = schema.exclude(path=list(LEFT_ALONE))

    @schema.hook
    def map_case(context: Any, case: Any) -> Any:
        if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
            case.body = fitting(case.body)
            tokens = {"/v1/responses": "max_output_tokens"}.get(case.operation.path, "max_tokens")
            if case.operation.path in STREAMED:
                case.body.setdefault(tokens, 3)
                case.body.setdefault("stream", len(case.body) % 2 == 0)
        return case

    @schema.hook
    def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
        if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 400:
            return True
        error = response.json()["error"]
        param = error["param"]
        if param is None:
            return error["code"] not in UNSAID_CODES
        return not any(re.match(start, param) for start in UNSAID)

    return schema


def failures_of(schema: Any) -> tuple[list[str], int]:
    """What schemathesis finds, and how many answers it looked at."""
    found: list[str] = []
    answers = 0
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.append(str(event))
        if not isinstance(event, events.ScenarioFinished):
            continue
        answers += len(event.recorder.interactions)
        for case, checks in event.recorder.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    response = event.recorder.interactions[case].response
                    request = event.recorder.cases[case].value
                    found.append(
                        f"{event.label} {check.name}: {check.failure_info.failure}\n"
                        f"{request.path_parameters} {request.query} {request.body!r:.2000}\n"
                        f"{response and response.status_code} {response and response.text:.500}"
                    )
    return found, answers


@pytest.mark.slow
def test_everything_is_as_the_document_says(server: Live) -> None:
    found, answers = failures_of(document_of(server, phases={"stateful": {"enabled": False}}))
    assert found == [], "\n\n".join(found[:10])
    assert answers > 300
    assert_idle(server.engine)
