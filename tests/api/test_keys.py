"""Key files with records: what they may say, how they change under a running server, and what each key allows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from typer.testing import CliRunner

from proxyserve.api.errors import StartupError
from proxyserve.api.key_ring import Keys
from proxyserve.api.keys import digest_of
from proxyserve.cli.main import app as command
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.fusion.fusion import proxy
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve, wait_until

PROMPT = {"prompt": "The quick", "max_tokens": 2}


def record(name: str, **more: Any) -> dict[str, Any]:
    """Of a key that is `sk-NAME`."""
    return {"name": name, "sha256": digest_of(f"sk-{name}").hex(), **more}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"keys": list(records)}))
    return path


def as_key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}"}


# Files -----------------------------------------------------------------------------------------------------------


def test_the_three_forms_say_the_same(tmp_path: Path) -> None:
    ann = record("ann", experts=["qa"], max_running=2)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{**ann, "expires": "2099-01-02T00:00:00Z"}]}))
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": [ann]}) + "  expires: 2099-01-02\n")
    (tmp_path / "keys.toml").write_text(
        f'[[keys]]\nname = "ann"\nsha256 = "sha256:{ann["sha256"].upper()}"\nexperts = ["qa"]\nmax_running = 2\n'
        "expires = 2099-01-02\n"
    )
    found = [Keys([(path, "user")]).ring.match("sk-ann") for path in sorted(tmp_path.iterdir())]
    assert found[0] is not None and found[0].caller.experts == {"qa"} and found[0].caller.limits.running == 2
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1", "is no YAML"),
        ("ann: sk-ann", "must hold 'keys'"),
        ("keys: []", "no keys"),
        ("keys: [sk-ann]", r"keys\[0\]"),
        ("keys: [{name: ann}]", r"keys\[0\]\.sha256"),
        ("keys: [{name: ann, sha256: sk-ann}]", r"keys\[0\]\.sha256"),
        (yaml.safe_dump({"keys": [record("a b")]}), r"keys\[0\]\.name"),
        (yaml.safe_dump({"keys": [record("ann", rpm=3)]}), r"keys\[0\]\.rpm"),
        (yaml.safe_dump({"keys": [record("ann", max_running=0)]}), r"keys\[0\]\.max_running"),
        (yaml.safe_dump({"keys": [record("ann", role="root")]}), r"keys\[0\]\.role"),
        (yaml.safe_dump({"keys": [record("ann", expires="soon")]}), r"keys\[0\]\.expires"),
        (yaml.safe_dump({"keys": [record("ann"), {**record("ann"), "name": "bob"}]}), "the same key"),
        (
            yaml.safe_dump({"keys": [record("ann"), {**record("bob"), "name": "ann"}]}),
            "two keys with the name",
        ),
    ],
)
def test_unusable_records(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(StartupError, match=words) as refused:
        Keys([(path, "user")])
    assert "sk-ann" not in str(refused.value), "it could be a key"


def test_roles(tmp_path: Path) -> None:
    users = write(tmp_path / "keys.yaml", record("ann"), record("eve", role="admin"))
    admins = write(tmp_path / "admins.yaml", record("bob"), record("carl", role="user"))
    keys = Keys([(users, "user"), (admins, "admin")])
    roles = {name: keys.ring.match(f"sk-{name}") for name in ("ann", "eve", "bob", "carl")}
    assert {name: key.caller.admin for name, key in roles.items() if key} == {
        "ann": False,
        "eve": True,
        "bob": True,
        "carl": False,
    }
    assert (len(keys.ring), keys.ring.admins) == (4, 2)
    assert not keys.warnings
    (tmp_path / "lines").write_text("# ann\nsk-ann\nsha256:" + digest_of("sk-b").hex())
    [warning] = Keys([(tmp_path / "lines", "user")]).warnings
    assert "2" in warning and "keys hash" in warning and "sk-ann" not in warning


def test_commands_make_what_servers_read(tmp_path: Path) -> None:
    made = CliRunner().invoke(
        command,
        ["keys", "new", "ann", "--expert", "qa", "--days", "2", "--no-explain", "--requests-per-minute", "9"],
    )
    assert made.exit_code == 0
    key = made.stderr.split()[-1]
    (tmp_path / "keys.yaml").write_text("keys:\n" + made.stdout)
    found = Keys([(tmp_path / "keys.yaml", "user")]).ring.match(key)
    assert found is not None and not found.expired and found.caller.explain is False
    assert (found.caller.name, found.caller.admin, found.caller.experts) == ("ann", False, {"qa"})
    assert found.caller.limits.requests_per_minute == 9
    assert key not in made.stdout
    hashed = CliRunner().invoke(command, ["keys", "hash"], input=f"{key}\n\n")
    (tmp_path / "lines").write_text(hashed.stdout)
    lines = Keys([(tmp_path / "lines", "user")])
    assert lines.ring.match(key) is not None and not lines.warnings
    assert CliRunner().invoke(command, ["keys", "new", "a b"]).exit_code == 2


def test_changed_files_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "keys.yaml", record("ann"))
    keys = Keys([(path, "user")])
    assert not keys.refresh()
    write(path, record("ann"), record("bob"))
    assert keys.refresh() and keys.ring.match("sk-bob")
    for broken in ("keys: [", "keys: []"):
        path.write_text(broken)
        assert not keys.refresh() and keys.ring.match("sk-ann"), "unusable files leave the keys as they are"
        assert "the keys from before stay" in caplog.text
        caplog.clear()
        assert not keys.refresh() and not caplog.text, "it is said once"
    path.unlink()
    assert not keys.refresh() and keys.ring.match("sk-ann")
    other = write(tmp_path / "other.yaml", record("carl"))
    other.rename(path)  # as tools do that replace a file at once
    assert keys.refresh() and keys.ring.match("sk-carl") and not keys.ring.match("sk-ann")


# A running server ------------------------------------------------------------------------------------------------

RECORDS = [
    record("root", role="admin"),
    record("ann"),
    record("bob", experts=["qa"], max_logprobs=2),
    record("carl", explain=True, priority=3),
    record("cleo", explain=True, max_logprobs=0),
    record("dora", explain=False, requests_per_minute=2, tokens_per_minute=1000),
    record("emil", requests_per_minute=1),
    record("old", expires="2020-01-01"),
]


@pytest.fixture(scope="module")
def keyed(tiny_models: ModelSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = write(tmp_path_factory.mktemp("keys") / "keys.yaml", *RECORDS)
    presets = {"house": proxy({"qa": 0.5}), "mixed": proxy({"qa": 0.5, "record": 0.5})}
    engine = AsyncEngine(Engine(tiny_models, EngineConfig(max_batch=8, kv_memory=4 * 2**20), presets=presets))
    engine.start()
    with serve(engine, ServerConfig(api_key_file=path)) as live:
        yield live
    assert_idle(engine)
    engine.close()


def complete(live: Live, name: str, **body: Any) -> httpx.Response:
    return live.http.post("/v1/completions", json={"model": "atlas", **PROMPT, **body}, headers=as_key(name))


def refused(answer: httpx.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_experts_of_a_key(keyed: Live) -> None:
    for body in ({}, {"model": "atlas+qa"}, {"model": "house"}, {"fusion": {"experts": {"qa": 1}}}):
        assert complete(keyed, "bob", **body).status_code == 200
    for body, param in (
        ({"model": "atlas+record"}, "fusion.experts.record"),
        ({"fusion": {"experts": {"qa": 1, "record": 0}}}, "fusion.experts.record"),
        ({"fusion": {"rule": "formula", "formula": "base + 0.1*record.tuned"}}, "fusion.formula"),
        ({"fusion": {"experts": {"qa": 1}, "support": {"of": ["record.tuned"], "min_p": 0.1}}}, "fusion"),
        ({"model": "mixed"}, "model"),
    ):
        assert refused(complete(keyed, "bob", **body)) == (403, param, "forbidden")
        assert complete(keyed, "ann", **body).status_code == 200
    chat = {"model": "atlas+record", "messages": [{"role": "user", "content": "Hi"}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        assert keyed.http.post(path, json=chat, headers=as_key("bob")).status_code == 403
        assert keyed.http.post(path, json=chat, headers=as_key("ann")).status_code == 200
    ids = {"model": "atlas+record", "tokens": [70]}
    assert keyed.http.post("/detokenize", json=ids, headers=as_key("bob")).status_code == 403
    score = {"model": "atlas+record", "texts": ["The quick"]}
    assert keyed.http.post("/v1/score", json=score, headers=as_key("bob")).status_code == 403


def test_models_are_listed_by_key(keyed: Live) -> None:
    def listed(name: str) -> set[str]:
        models = keyed.http.get("/v1/models", headers=as_key(name)).json()["data"]
        return {model["id"] for model in models}

    assert listed("ann") == {"atlas", "atlas+qa", "atlas+record", "house", "mixed"}
    assert listed("bob") == {"atlas", "atlas+qa", "house"}
    for model, status in (("atlas+qa:0.3", 200), ("atlas+record", 403), ("mixed", 403), ("atlas+x", 404)):
        assert keyed.http.get(f"/v1/models/{model}", headers=as_key("bob")).status_code == status


def test_errors_list_no_experts(keyed: Live) -> None:
    """They would tell a key the names of those that it may not use."""
    for body in (
        {"model": "nope"},
        {"model": "atlas+nope"},
        {"fusion": {"experts": {"nope": 1}}},
        {"fusion": {"rule": "formula", "formula": "base + nope"}},
    ):
        answer = complete(keyed, "bob", **body)
        assert answer.status_code == 404
        assert "record" not in answer.text and "mixed" not in answer.text


def test_explanations_and_log_probabilities(keyed: Live) -> None:
    explain = {"model": "atlas+qa", "fusion": {"explain": 1}}
    explained = {
        name: complete(keyed, name, **explain).status_code for name in ("root", "ann", "carl", "dora")
    }
    assert explained == {"root": 200, "ann": 403, "carl": 200, "dora": 403}
    assert refused(complete(keyed, "cleo", **explain)) == (403, "fusion.explain", "forbidden")
    score = {"model": "atlas", "texts": ["The quick"]}
    answer = keyed.http.post("/v1/score", json=score, headers=as_key("cleo"))
    assert refused(answer) == (403, "logprobs", "forbidden")
    assert "max_logprobs" in answer.json()["error"]["message"]
    assert complete(keyed, "bob", logprobs=2).status_code == 200
    assert refused(complete(keyed, "bob", logprobs=3)) == (403, "logprobs", "forbidden")
    chat = {"model": "atlas+qa", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    answer = keyed.http.post(
        "/v1/chat/completions", json={**chat, "logprobs": True, "top_logprobs": 3}, headers=as_key("bob")
    )
    assert refused(answer) == (403, "top_logprobs", "forbidden")


def test_priorities(keyed: Live) -> None:
    taken: list[int] = []
    add = keyed.engine.engine.scheduler.add
    keyed.engine.engine.scheduler.add = lambda request: (taken.append(request.priority), add(request))
    for name, asked, status in (
        ("ann", None, 200),
        ("ann", 2, 200),
        ("ann", -1, 403),
        ("carl", None, 200),
        ("carl", 4, 200),
        ("carl", 0, 403),
        ("root", -5, 200),
    ):
        answer = complete(keyed, name, priority=asked)
        assert answer.status_code == status and (status == 200 or refused(answer)[1] == "priority")
    assert taken == [0, 2, 3, 4, -5]
    del keyed.engine.engine.scheduler.add


def test_a_score_is_one_request(keyed: Live) -> None:
    """Though the engine is given it in two parts: a long context, then what follows."""
    context = "The quick brown fox " * 10
    body = {"model": "atlas", "prompt": context, "continuations": [" jumps", " sleeps"]}
    answer = keyed.http.post("/v1/score", json=body, headers=as_key("emil"))
    assert answer.status_code == 200, answer.text
    assert refused(complete(keyed, "emil"))[::2] == (429, "rate_limit")


def test_expired_keys(keyed: Live) -> None:
    answer = complete(keyed, "old")
    assert answer.status_code == 401 and "expired" in answer.json()["error"]["message"]


def test_rates(keyed: Live) -> None:
    """Through the official client, which retries a 429 on its own if it is let."""
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-dora", max_retries=0) as client:
        used = 0
        for left in ("1", "0"):
            raw = client.completions.with_raw_response.create(model="atlas", prompt="The quick", max_tokens=3)
            used += raw.parse().usage.total_tokens  # type: ignore[union-attr]
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == left
            assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="atlas", prompt="The quick", max_tokens=3)
        assert full.value.code == "rate_limit"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 30
        headers = full.value.response.headers
        assert float(headers["x-ratelimit-reset-requests"].removesuffix("s")) > 30
        # 1000 at first, less what the answers' `usage` says, and a little has flown in.
        assert 0 <= int(headers["x-ratelimit-remaining-tokens"]) - (1000 - used) < 200
    assert "x-ratelimit-limit-requests" not in complete(keyed, "ann").headers


def test_revoking_a_key_needs_no_restart(keyed: Live) -> None:
    keys = keyed.server.config.app.state.proxyserve.keys  # type: ignore[union-attr]
    [(path, _)] = keys._files
    before = path.stat()
    assert complete(keyed, "ann").status_code == 200
    write(path, *(entry for entry in RECORDS if entry["name"] != "ann"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    wait_until(lambda: complete(keyed, "ann").status_code == 401)
    assert complete(keyed, "bob").status_code == 200


def test_work_is_accounted_to_the_key(tiny_engine: AsyncEngine, tmp_path: Path) -> None:
    """Of one that may have one choice run at a time the others wait, and are answered."""
    path = write(tmp_path / "keys.yaml", record("one", max_running=1, max_waiting_requests=4))
    with serve(tiny_engine, ServerConfig(api_key_file=path)) as live:
        most = 0

        def note() -> None:
            nonlocal most
            most = max(most, live.engine.snapshot().running)

        step = tiny_engine.engine.step
        tiny_engine.engine.step = lambda: (note(), step())[1]  # type: ignore[method-assign]
        answer = complete(live, "one", n=4, max_tokens=8, ignore_eos=True)
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 4
        assert most == 1
        assert refused(complete(live, "one", n=5))[::2] == (400, "invalid_value")
