"""How servers like this one were broken into or brought down, and the tests that show that this one is not. Each entry
of `THREATS` is a rule with its tests, which are here or, seen from tests/, elsewhere. A test that is gone fails here.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxyserve.config import ChatConfig, Limits, ServerConfig
from proxyserve.engine.loop import AsyncEngine
from tests.api.live import Live, assert_idle, serve

HERE = "api/test_security.py"

THREATS: Mapping[str, tuple[str, ...]] = {
    "no code, import path or template from clients; rules are names with numbers": (
        f"{HERE}::test_requests_bring_no_code",
        f"{HERE}::test_nothing_is_evaluated",
        "fusion/test_formula_text.py::test_garbage_is_refused_in_order",
        "text/test_templates.py::test_messages_cannot_bring_templates",
    ),
    "no pickle on any socket, in any file or dump": (f"{HERE}::test_no_serialiser_that_runs_code",),
    "internals listen nowhere": (
        f"{HERE}::test_only_the_server_listens",
        "api/test_auth.py::test_without_keys_only_loopback",
    ),
    "no tensors in requests": (f"{HERE}::test_requests_bring_no_tensors",),
    "safetensors only": (
        "models/test_formats.py::test_what_is_no_expert_is_refused",
        "models/test_formats.py::test_what_is_no_regular_file_is_not_opened",
        "models/test_lora.py::test_damaged_folders",
    ),
    "code of a model folder is never run": (
        "experts/test_roots.py::test_code_in_a_folder_is_never_run",
        f"{HERE}::test_remote_code_is_switched_off_wherever_it_could_be_on",
    ),
    "administrators load from allowed roots alone, links resolved; no URLs": (
        "experts/test_roots.py::test_what_lies_outside_is_refused_whether_it_exists_or_not",
        "experts/test_roots.py::test_no_way_of_names_leads_out",
        "experts/test_roots.py::test_a_file_that_is_a_link_out_is_refused",
        "experts/test_recipe.py::test_what_is_no_hub_id_is_not_sent_there",
    ),
    "every route needs a key unless it is on a short list": (
        "api/test_auth.py::test_every_route_needs_the_right_key",
        "api/test_auth.py::test_refusal_comes_before_the_body",
    ),
    "keys of users, of monitors and of administrators, kept as hashes; the control plane on its own port": (
        "api/test_keys.py::test_roles",
        "api/test_auth.py::test_a_monitor_may_watch_and_nothing_else",
        "api/test_auth.py::test_ring_keeps_no_keys",
        "api/test_ports.py::test_each_port_answers_its_own",
    ),
    "n and the like are capped before any loop": (
        f"{HERE}::test_huge_counts_cost_nothing",
        "api/test_refusals.py::test_bad_values",
        "api/test_hostile_bodies.py::test_every_list_and_map_ends_with_its_first_error",
    ),
    "schemas of tools are compiled in a process of their own, within limits": (
        f"{HERE}::test_odd_schemas_of_tools_harm_nobody",
        "grammar/test_compiler.py::test_too_slow_a_grammar_is_given_up",
        "grammar/test_compiler.py::test_too_large_a_grammar_is_given_up",
        "api/test_structured.py::test_a_killed_helper_is_no_outage",
    ),
    "expressions and grammars have caps and a linear-time engine": (
        "grammar/test_compiler.py::test_refused_at_a_glance",
        "grammar/test_compiler.py::test_hostile_grammars_end_soon",
        "grammar/test_compiler.py::test_steps_go_on_while_a_hostile_grammar_compiles",
    ),
    "chat templates run in a sandbox, with caps": (
        "text/test_templates.py::test_attack_ends_in_a_refusal",
        "api/test_tools.py::test_runaway_template_is_a_refusal",
    ),
    "no URL of a request is fetched, and text alone is taken": (
        f"{HERE}::test_requests_bring_no_media",
        f"{HERE}::test_few_modules_can_reach_a_network",
    ),
    "an empty prompt is refused at the door": (f"{HERE}::test_empty_prompts",),
    "log-probs of prompts are found in chunks that the plan sets aside, and capped": (
        "engine/test_memory.py::test_what_scoring_takes_is_set_aside",
        f"{HERE}::test_log_probs_of_prompts_are_capped",
        "api/test_keys.py::test_explanations_and_log_probabilities",
    ),
    "the prefix cache tells nothing of other keys' prompts": (
        "api/test_auth.py::test_keys_do_not_share_the_prefix_cache",
        "api/test_fields.py::test_prefix_cache_is_apart",
    ),
    "explanations and long lists of log-probs take a permission": (
        "api/test_keys.py::test_explanations_and_log_probabilities",
        "api/test_fusion.py::test_what_takes_an_administrator",
    ),
    "weights are finite and in range; a NaN ends its own request": (
        "api/test_refusals.py::test_fusion_refusals",
        "engine/test_behaviour.py::test_weights_are_finite",
        "engine/test_behaviour.py::test_nan_fails_alone_and_leaves_nothing_behind",
    ),
    "a new generation is verified before it serves, and the old one stays for a rollback": (
        "experts/test_swap_failures.py::test_files_that_cannot_be_served",
        "experts/test_swap_failures.py::test_a_failure_leaves_the_old_generation_and_nothing_of_the_new",
        "models/test_vocabulary.py::test_another_tokenizer_is_refused_at_load",
        "experts/test_manager.py::test_rollback_takes_what_is_in_memory",
    ),
    "a slow reader is bounded and then cut off": (
        "api/test_limits.py::test_a_reader_that_stalls_is_given_up",
        "engine/test_unread.py::test_too_much_is_given_up",
    ),
    "size of bodies, depth of JSON and floods of headers": (
        "api/test_limits.py::test_header_floods",
        "api/test_limits.py::test_clients_that_do_not_finish",
        "api/test_limits.py::test_too_many_connections",
        "api/test_fuzz.py::test_odd_bytes",
        "api/test_fuzz.py::test_random_bytes",
        "api/test_fuzz.py::test_documents_that_are_none",
    ),
    "nothing forges a line of the log, and no prompts are in it": (
        "api/test_logs.py::test_clients_cannot_forge_a_line",
        "api/test_logs.py::test_nothing_of_what_clients_say_is_logged",
    ),
    "no page of another origin reads answers unless it is named": (
        "api/test_limits.py::test_without_origins_there_is_no_cors",
        "api/test_limits.py::test_what_is_no_origin",
    ),
    "metrics, which name models, need a key": (
        "api/test_auth.py::test_every_route_needs_the_right_key",
        "api/test_metrics.py::test_clients_make_no_series",
    ),
}


@pytest.mark.parametrize("where", sorted({where for tests in THREATS.values() for where in tests}))
def test_tests_named_here_exist(repository: Path, where: str) -> None:
    file, _, function = where.partition("::")
    tree = ast.parse((repository / "tests" / file).read_text())
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert function in found


def test_every_test_here_is_named() -> None:
    named = {
        where.partition("::")[2] for tests in THREATS.values() for where in tests if where.startswith(HERE)
    }
    here = {name for name in globals() if name.startswith("test_")}
    assert here - named == {"test_tests_named_here_exist", "test_every_test_here_is_named"}


# What is in the code ------------------------------------------------------------------------------------------------


def sources(repository: Path) -> Iterator[tuple[str, ast.Module]]:
    for folder in ("proxyserve", "kernels", "clients/python/proxyserve_client"):
        for path in sorted((repository / folder).rglob("*.py")):
            yield path.relative_to(repository).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Calls by what they are written as, such as `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def importers(repository: Path, *names: str) -> set[str]:
    return {
        file
        for file, tree in sources(repository)
        if any(name == wanted or name.startswith(f"{wanted}.") for name in imported(tree) for wanted in names)
    }


def test_no_serialiser_that_runs_code(repository: Path) -> None:
    # multiprocessing pickles whatever it sends.
    refused = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing")
    assert importers(repository, *refused) == set()
    loaders = ("torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load")
    assert [
        (file, name) for file, tree in sources(repository) for name, _ in called(tree) if name in loaders
    ] == []


def test_nothing_is_evaluated(repository: Path) -> None:
    found = [
        (file, name)
        for file, tree in sources(repository)
        for name, _ in called(tree)
        if name in ("eval", "exec", "compile", "__import__", "os.system")
    ]
    assert found == []


def test_remote_code_is_switched_off_wherever_it_could_be_on(repository: Path) -> None:
    switches = {
        (file, ast.unparse(keyword.value))
        for file, tree in sources(repository)
        for _, call in called(tree)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    }
    assert {value for _, value in switches} == {"False"}
    # Where folders that experts come from are read, it is written out, whatever the default becomes.
    assert {file for file, _ in switches} >= {"proxyserve/models/loading.py", "proxyserve/text/tokenizer.py"}


def test_only_the_server_listens(repository: Path) -> None:
    """A divided base's processes meet on loopback, over sockets that they inherit and by a file that is theirs alone;
    `doctor` tries whether a port is free."""
    assert importers(repository, "socket", "socketserver", "http.server", "zmq", "torch.distributed") == {
        "proxyserve/api/server.py",
        "proxyserve/cli/checkup.py",
        "proxyserve/engine/sharded/collectives.py",
        "proxyserve/engine/sharded/follower.py",
        "proxyserve/engine/sharded/ranks.py",
        "proxyserve/models/sharding.py",
    }


def test_few_modules_can_reach_a_network(repository: Path) -> None:
    """None of them gets an address from a request: it is the operator's remote base, collector or hub, or the server
    that a command line names."""
    clients = ("httpx", "requests", "urllib.request", "http.client", "aiohttp", "huggingface_hub", "urllib3")
    found = {file for file in importers(repository, *clients) if file.startswith(("proxyserve/", "kernels/"))}
    assert {file for file in found if not file.startswith("proxyserve/cli/")} == {
        "proxyserve/experts/hub.py",
        "proxyserve/models/remote.py",
        "proxyserve/models/upstream.py",
    }


# What requests may bring ---------------------------------------------------------------------------------------------

TEXT = ("/v1/completions", {"model": "atlas", "prompt": "a", "max_tokens": 1})
CHAT = (
    "/v1/chat/completions",
    {"model": "atlas+qa", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
)


def refusal(live: Live, asked: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    path, body = asked
    response = live.post(path, **{**body, **more})
    assert response.status_code == 400, response.text
    return dict(response.json()["error"])


CODE = (
    {"chat_template": "{{ messages }}"},
    {"logits_processors": ["os.system"]},
    {"custom_logit_processor": "gASV"},
    {"vllm_xargs": {"module": "os"}},
    {"fusion": {"rule": "os.system"}},
    {"fusion": {"rule": "formula", "formula": "__import__('os').system('true')"}, "model": "atlas"},
)


@pytest.mark.parametrize("more", CODE, ids=str)
@pytest.mark.parametrize("asked", [TEXT, CHAT], ids=["text", "chat"])
def test_requests_bring_no_code(live: Live, asked: tuple[str, dict[str, Any]], more: dict[str, Any]) -> None:
    assert refusal(live, asked, **more)["param"].startswith(next(iter(more)))


@pytest.mark.parametrize("name", ["prompt_embeds", "input_embeds", "embeddings", "kv_transfer_params"])
def test_requests_bring_no_tensors(live: Live, name: str) -> None:
    for asked in (TEXT, CHAT):
        assert refusal(live, asked, **{name: "AAAA"})["code"] == "unknown_parameter"


MEDIA = (
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "video_url", "video_url": {"url": "http://127.0.0.1/"}},
    {"type": "file", "file": {"file_data": "data:;base64,AAAA"}},
)


@pytest.mark.parametrize("part", MEDIA, ids=lambda part: part["type"])
def test_requests_bring_no_media(live: Live, part: dict[str, Any]) -> None:
    error = refusal(live, CHAT, messages=[{"role": "user", "content": [part]}])
    assert error["param"] == "messages[0].content"
    assert "169.254" not in error["message"]


@pytest.mark.parametrize(
    ("asked", "param", "more"),
    [
        (TEXT, "n", {"n": 2**31 - 1}),
        (CHAT, "n", {"n": 2**31 - 1}),
        (TEXT, "n", {"n": 2**31 - 1, "best_of": 2**31 - 1, "stream": True}),
        (TEXT, "n", {"n": 16, "prompt": ["a"] * 256}),
        (TEXT, "logprobs", {"logprobs": 2**31 - 1}),
        (TEXT, "prompt_logprobs", {"prompt_logprobs": 2**31 - 1}),
        (TEXT, "max_tokens", {"max_tokens": 2**31 - 1}),
        (TEXT, "fusion.explain", {"fusion": {"explain": 2**31 - 1, "experts": {"qa": 1}}}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_huge_counts_cost_nothing(live: Live, asked: Any, param: str, more: dict[str, Any]) -> None:
    begun = time.process_time()
    assert refusal(live, asked, **more)["param"] == param
    assert time.process_time() - begun < 1.0  # of this process, which the server is a part of


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""]], ids=str)
def test_empty_prompts(live: Live, prompt: Any) -> None:
    assert refusal(live, TEXT, prompt=prompt)["param"] == "prompt"
    assert refusal(live, ("/v1/score", {"model": "atlas"}), texts=prompt or [""])["param"].startswith("texts")


def test_log_probs_of_prompts_are_capped(live: Live) -> None:
    wanted = {"echo": True, "logprobs": 20, "logprob_token_ids": list(range(128)), "n": 1}
    most = Limits().max_prompt_logprobs
    tokens = most // (1 + 20 + 128) // 250 + 1
    error = refusal(live, TEXT, prompt=[[5] * 251] * tokens, **wanted)
    assert error["param"] == "prompt" and str(most) in error["message"]


SCHEMAS: tuple[Any, ...] = (
    {"type": "nothing"},
    {"type": ["object", 5]},
    {"type": "object", "properties": []},
    {"type": "object", "properties": {"a": 5}},
    {"type": "object", "required": "a"},
    {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
    {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/schema.json"}}},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "((((a*)*)*)*)*("}}},
    {"type": "object", "properties": {"a": {"enum": []}}},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "object", "properties": {"a": {"minimum": 1e308, "maximum": -1e308, "type": "number"}}},
)


#: Reads the tools and shows none of them, so that they fit a tiny context.
TEMPLATE = "{% if tools %}.{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_odd_schemas_of_tools_harm_nobody(tiny_engine: AsyncEngine, choice: str) -> None:
    """They are refused, or they are no obstacle; the next request is answered in any case."""
    path, body = CHAT
    config = ServerConfig(chat=ChatConfig(template=TEMPLATE, tool_parser="hermes"))
    with serve(tiny_engine, config) as live:
        for schema in SCHEMAS:
            function = {"name": "f", "parameters": schema, "strict": True}
            tools = [{"type": "function", "function": function}]
            response = live.post(path, **{**body, "model": "atlas"}, tools=tools, tool_choice=choice)
            if response.status_code == 400:
                assert response.json()["error"]["param"].startswith("tools"), (schema, response.text)
            else:
                assert response.status_code == 200, (schema, response.text)
            assert live.post(TEXT[0], **TEXT[1]).status_code == 200
    assert_idle(tiny_engine)
