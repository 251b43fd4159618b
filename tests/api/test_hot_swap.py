"""Experts that come and go over HTTP while the official `openai` client streams from the same server."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from proxyserve.cli.opening import Opened
from proxyserve.config import ServerConfig
from proxyserve.experts.audit import AUDIT, read_audit
from proxyserve.experts.source import ExpertSpec, Source
from tests.api.live import assert_idle, serve, wait_until
from tests.experts.shelf import Shelf, make_shelf, open_state, put

USER, ADMIN = "sk-of-a-user", "sk-of-the-admin"
FULL = {"tuned": "qa", "untuned": "small"}
OTHER = {"tuned": "record", "untuned": "small"}
ADAPTER = {"tuned": {"path": "lora"}, "untuned": "small"}
PROMPT = "The quick brown fox"
LENGTH = 24


@dataclass
class Swapping:
    """A server that is being changed. `admin` has the administrator's key, `user` and `openai` that of a user."""

    opened: Opened
    admin: httpx.Client
    user: httpx.Client
    openai: openai.OpenAI
    state: Path

    def put(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.admin.put(f"/admin/v1/experts/{name}", params={"wait": "true"}, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def post(self, path: str) -> httpx.Response:
        return self.admin.post(path, params={"wait": "true"})

    def ask(self, model: str, **body: Any) -> httpx.Response:
        given = {"prompt": PROMPT, "temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, **body}
        return self.user.post("/v1/completions", json={"model": model, **given})

    def text(self, model: str) -> tuple[str, dict[str, int]]:
        """What it writes, and the generations that wrote it."""
        answer = self.ask(model)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"], answer.json()["fusion"]["generations"]

    def done(self, changes: int) -> None:
        """Wait until the audit log has the ends of so many; that of a load comes soon after its answer."""
        wait_until(lambda: sum(map(_is_over, read_audit(self.state / AUDIT))) == changes)

    def models(self) -> list[str]:
        return [entry.id for entry in self.openai.models.list().data]

    def state_of(self, name: str) -> dict[str, Any]:
        return dict(self.admin.get(f"/admin/v1/experts/{name}").json())

    @contextmanager
    def held(self) -> Iterator[Callable[[], object]]:
        """Requests that are begun in here get a few tokens and then wait until what is given is called: whatever is
        changed meanwhile is changed under them. Models come and go all the same."""
        engine = self.opened.engine.engine
        step, holding = engine.step, threading.Event()
        holding.set()
        limit = engine.counters.tokens_generated + 4

        def held_step() -> Any:
            return [] if holding.is_set() and engine.counters.tokens_generated >= limit else step()

        engine.step = held_step  # type: ignore[method-assign]
        try:
            yield holding.clear
        finally:
            holding.clear()
            engine.step = step  # type: ignore[method-assign]

    def stream(self, model: str) -> Any:
        return self.openai.completions.create(
            model=model,
            prompt=PROMPT,
            temperature=0,
            max_tokens=LENGTH,
            stream=True,
            extra_body={"ignore_eos": True},
        )


def _is_over(line: dict[str, Any]) -> bool:
    return line["outcome"] != "begun"


def ended(stream: Any) -> tuple[str, dict[str, int]]:
    """The rest of a stream, and the generations that its last chunk names."""
    chunks = list(stream)
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices), chunks[-1].fusion[
        "generations"
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("made"), "llama")


@pytest.fixture
def shelf(made: Shelf, tmp_path: Path) -> Shelf:
    root = shutil.copytree(made.root, tmp_path / "root")
    return Shelf(root, root / "atlas", root / "small")


Open = Callable[..., AbstractContextManager[Swapping]]


@pytest.fixture
def opening(shelf: Shelf, tmp_path: Path) -> Open:
    @contextmanager
    def opening(*, keys: bool = True, load_wait: float = 30.0, **settings: Any) -> Iterator[Swapping]:
        for name, key in (("keys", USER), ("admin-keys", ADMIN)):
            (tmp_path / name).write_text(key)
        config = ServerConfig(
            api_key_file=tmp_path / "keys" if keys else None,
            admin_key_file=tmp_path / "admin-keys" if keys else None,
            load_wait_seconds=load_wait,
        )
        state = tmp_path / "state"
        with open_state(shelf.base, state, roots=[shelf.root], **settings) as opened:
            opened.engine.start()
            try:
                with (
                    serve(opened.engine, config, opened.experts) as live,
                    httpx.Client(
                        base_url=live.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60
                    ) as admin,
                    httpx.Client(
                        base_url=live.url, headers={"Authorization": f"Bearer {USER}"}, timeout=60
                    ) as user,
                    openai.OpenAI(base_url=f"{live.url}/v1", api_key=USER, max_retries=0) as client,
                ):
                    yield Swapping(opened, admin, user, client, state)
                    assert_idle(opened.engine)
            finally:
                opened.engine.close()

    return opening


@pytest.fixture
def server(opening: Open) -> Iterator[Swapping]:
    with opening() as server:
        yield server


# While streams run ----------------------------------------------------------------------------------------------


def test_a_stream_ends_on_the_generation_it_began_with(server: Swapping) -> None:
    server.put("qa", FULL)
    first = server.text("atlas+qa")
    assert first[1] == {"qa": 1}
    with server.held() as go_on:
        stream = iter(server.stream("atlas+qa"))
        begun = next(stream).choices[0].text
        status = server.put("qa", OTHER)
        assert status["generation"] == 2
        phases = {entry["generation"]: (entry["phase"], entry["requests"]) for entry in status["generations"]}
        assert phases == {2: ("published", 0), 1: ("draining", 1)}
        go_on()
        rest, generations = ended(stream)
    assert (begun + rest, generations) == first
    second = server.text("atlas+qa")
    assert second[1] == {"qa": 2} and second[0] != first[0]
    wait_until(lambda: server.state_of("qa")["generations"][1]["phase"] == "standby")


def test_streams_of_several_generations_run_together(server: Swapping) -> None:
    """A full folder, an adapter and a diff under one name, each of them answering what it would alone."""
    bodies: list[dict[str, Any]] = [
        FULL,
        ADAPTER,
        {"tuned": {"path": "diff-record.safetensors", "of": "small"}},
    ]
    expected = []
    for body in bodies:
        server.put("alone", body)
        expected.append(server.text("atlas+alone")[0])
    assert len(set(expected)) == 3
    streams = []
    with server.held() as go_on:
        for body in bodies:
            server.put("qa", body)
            streams.append(server.stream("atlas+qa:1.0"))
        go_on()
        answers = [ended(stream) for stream in streams]
    assert answers == [(text, {"qa": number}) for number, text in enumerate(expected, start=1)]

    def phases() -> list[str]:
        return [entry["phase"] for entry in server.state_of("qa")["generations"]]

    wait_until(lambda: phases() == ["published", "standby", "retired"])


def test_a_rollback_under_a_stream(server: Swapping) -> None:
    server.put("qa", FULL)
    first = server.text("atlas+qa")
    server.put("qa", ADAPTER)
    second = server.text("atlas+qa")
    with server.held() as go_on:
        stream = iter(server.stream("atlas+qa"))
        begun = next(stream).choices[0].text
        answer = server.post("/admin/v1/experts/qa/rollback")
        assert answer.status_code == 200 and answer.json()["generation"] == 1
        go_on()
        rest, generations = ended(stream)
    assert (begun + rest, generations) == second
    assert server.text("atlas+qa") == first
    again = server.post("/admin/v1/experts/qa/rollback")
    assert again.status_code == 409
    assert again.json()["error"]["code"] == "no_previous_generation"


def test_a_deleted_expert_finishes_what_runs(server: Swapping) -> None:
    server.put("qa", FULL)
    first = server.text("atlas+qa")
    bytes_before = server.opened.engine.engine.residents.bytes
    with server.held() as go_on:
        stream = iter(server.stream("atlas+qa"))
        begun = next(stream).choices[0].text
        answer = server.admin.delete("/admin/v1/experts/qa")
        assert answer.status_code == 202
        assert answer.json()["status"]["state"] == "draining"
        assert server.models() == ["atlas"]
        refused = server.ask("atlas+qa")
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            server.openai.completions.create(model="atlas+qa", prompt=PROMPT)
        go_on()
        rest, generations = ended(stream)
    assert (begun + rest, generations) == first
    wait_until(lambda: server.admin.get("/admin/v1/experts/qa").status_code == 404)
    wait_until(lambda: {key.name for key in server.opened.engine.engine.runners} == {"atlas"})
    assert server.opened.engine.engine.residents.bytes < bytes_before
    assert server.put("qa", FULL)["generation"] == 2  # numbers are not used twice
    assert server.text("atlas+qa") == (first[0], {"qa": 2})


def test_who_uses_one_expert_does_not_hold_another_one_of_its_weights(server: Swapping) -> None:
    """The tuned model of one is the untuned model of another."""
    server.put("one", FULL)
    server.put("two", {"tuned": "record", "untuned": "qa"})
    two = server.text("atlas+two")
    with server.held() as go_on:
        stream = server.stream("atlas+two")
        server.put("one", ADAPTER)
        wait_until(lambda: server.state_of("one")["generations"][1]["phase"] == "standby")
        assert server.state_of("one")["generations"][1]["requests"] == 0
        answer = server.admin.delete("/admin/v1/experts/one", params={"wait": "true"})
        assert answer.status_code == 200
        go_on()
        assert ended(stream) == two
    assert server.text("atlas+two") == two
    assert set(server.ask("atlas+two").json()["usage"]["lane_tokens"]) == {
        "atlas",
        "two.tuned",
        "two.untuned",
    }


def test_chat_names_the_generation_as_well(server: Swapping) -> None:
    server.put("qa", FULL)
    server.put("qa", OTHER)
    messages: Any = [{"role": "user", "content": "Who?"}]
    given: Any = {
        "model": "atlas",
        "max_tokens": 4,
        "extra_body": {
            "fusion": {"experts": {"qa": 0.5}, "prompts": {"base": "plain"}},
        },
    }
    fused = server.openai.chat.completions.create(messages=messages, **given)
    assert fused.model_extra is not None
    assert fused.model_extra["fusion"]["generations"] == {"qa": 2}
    chunks = list(server.openai.chat.completions.create(messages=messages, stream=True, **given))
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["fusion"]["generations"] == {"qa": 2}
    assert [bool((chunk.model_extra or {}).get("fusion")) for chunk in chunks[:-1]] == [False] * (
        len(chunks) - 1
    )


def test_listed_models_are_those_that_serve(server: Swapping) -> None:
    assert server.models() == ["atlas"]
    server.put("qa", FULL)
    assert server.models() == ["atlas", "atlas+qa"]
    server.put("lone", {"tuned": "record"})  # has no delta, so it cannot be named in a model's name
    assert server.models() == ["atlas", "atlas+qa"]
    server.put("over", {"tuned": {"path": "lora-base", "of": "base"}})
    assert server.models() == ["atlas", "atlas+over", "atlas+qa"]
    assert server.openai.models.retrieve("atlas+qa:0.5+over").id == "atlas+qa:0.5+over"
    server.admin.delete("/admin/v1/experts/qa", params={"wait": "true"})
    assert server.models() == ["atlas", "atlas+over"]


# What goes wrong ------------------------------------------------------------------------------------------------


def test_a_load_that_fails_leaves_the_old_generation(server: Swapping, shelf: Shelf) -> None:
    server.put("qa", FULL)
    before = server.text("atlas+qa")
    (shelf.root / "record" / "model.safetensors").write_bytes(b"broken")
    for body in (OTHER, {"tuned": {"path": "lora-base", "of": "small"}}):
        answer = server.admin.put("/admin/v1/experts/qa", params={"wait": "true"}, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "load_failed"
        assert server.text("atlas+qa") == before
    status = server.state_of("qa")
    assert status["generation"] == 1 and status["state"] == "published"
    assert "lora-base" in status["last_error"]


#: What is asked for, and how it is refused.
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"tuned": "../outside"}, 403, "tuned.path"),
    ({"tuned": "/etc"}, 403, "tuned.path"),
    ({"tuned": "nothing"}, 400, "tuned.path"),
    ({"tuned": "x" * 300}, 400, "tuned.path"),
    ({"tuned": "qa", "untuned": "lora"}, 400, "untuned.format"),
    ({"tuned": "lora"}, 400, "tuned.of"),
    ({"tuned": {"path": "qa", "scale": 2}}, 400, "tuned.scale"),
    ({"tuned": {"of": "small", "merge": [{"weight": 1, "path": "nothing"}]}}, 400, "tuned.merge[0].path"),
    ({"tuned": "qa", "trusted": True}, 400, "trusted"),
    ({"tuned": "qa", "origins": {"small": "/etc"}}, 400, "origins"),
    ({"tuned": {"path": "qa", "trusted": True}}, 400, "tuned.trusted"),
    ({"tuned": "org/name"}, 400, "tuned.path"),
]


def test_refusals_begin_nothing(server: Swapping) -> None:
    for body, status, param in REFUSED:
        answer = server.admin.put(
            "/admin/v1/experts/qa",
            content=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == status, (body, answer.text)
        assert answer.json()["error"]["param"] == param, body
        assert server.admin.get("/admin/v1/experts").json()["data"] == []
        assert server.admin.get("/admin/v1/experts/qa").status_code == 404


def test_one_of_two_changes_of_one_expert_wins(server: Swapping, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("qa", FULL)
    library, may_go_on = server.opened.experts._library, threading.Event()
    verify = library.verify

    def slow(loaded: Any) -> None:
        assert may_go_on.wait(20)
        verify(loaded)

    monkeypatch.setattr(library, "verify", slow)
    begun = server.admin.put("/admin/v1/experts/qa", json=OTHER)
    assert begun.status_code == 202 and begun.json()["generation"] == 2
    assert begun.headers["location"] == "/admin/v1/experts/qa"
    for refused in (
        server.admin.put("/admin/v1/experts/qa", json=ADAPTER),
        server.admin.post("/admin/v1/experts/qa/rollback"),
        server.admin.delete("/admin/v1/experts/qa"),
    ):
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "swap_conflict"
    assert server.text("atlas+qa")[1] == {"qa": 1}
    may_go_on.set()
    wait_until(lambda: server.state_of("qa")["generation"] == 2)
    assert server.text("atlas+qa")[1] == {"qa": 2}


# Presets --------------------------------------------------------------------------------------------------------


def test_a_preset_lives_and_is_called_by_its_name(server: Swapping) -> None:
    server.put("qa", FULL)
    fusion = {"experts": {"qa": 0.5}}
    refused = server.admin.put("/admin/v1/presets/mine", json={"experts": {"nobody": 1}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "fusion.experts.nobody"
    put = server.admin.put("/admin/v1/presets/mine", json=fusion)
    assert put.status_code == 200 and put.json()["fusion"] == fusion
    assert server.models() == ["atlas", "atlas+qa", "mine"]
    assert server.text("mine") == server.text("atlas+qa:0.5")
    changed = server.admin.put("/admin/v1/presets/mine", json={"experts": {"qa": -0.7}})
    assert changed.status_code == 200
    assert server.text("mine") == server.text("atlas+qa:-0.7")
    assert server.admin.get("/admin/v1/presets/mine").json()["fusion"] == {"experts": {"qa": -0.7}}
    kept = server.admin.delete("/admin/v1/experts/qa")
    assert kept.status_code == 409 and kept.json()["error"]["code"] == "in_use"
    server.put("qa", OTHER)  # a preset goes with its experts' generations
    assert server.text("mine")[1] == {"qa": 2}
    assert server.admin.delete("/admin/v1/presets/mine").status_code == 200
    assert server.ask("mine").status_code == 404
    assert server.models() == ["atlas", "atlas+qa"]
    assert server.admin.delete("/admin/v1/experts/qa", params={"wait": "true"}).status_code == 200


def test_names_are_taken_once(server: Swapping) -> None:
    server.put("qa", FULL)
    assert server.admin.put("/admin/v1/presets/mine", json={"experts": {"qa": 1}}).status_code == 200
    for path, body in (
        ("presets/qa", {"experts": {"qa": 1}}),
        ("presets/atlas", {"experts": {"qa": 1}}),
        ("experts/mine", FULL),
    ):
        answer = server.admin.put(f"/admin/v1/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_taken"), path
    for path in ("experts/atlas", "experts/base", "presets/base", "experts/a.b", "presets/a+b"):
        body = FULL if path.startswith("experts") else {"experts": {"qa": 1}}
        answer = server.admin.put(f"/admin/v1/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name"), path


def test_everything_is_there_after_a_restart(opening: Open) -> None:
    with opening() as server:
        server.put("qa", FULL)
        server.put("over", {"tuned": {"path": "lora", "of": "small"}})
        server.admin.put("/admin/v1/presets/mine", json={"experts": {"qa": 0.5, "over": 0.5}})
        before = server.text("mine")
    with opening() as server:
        assert server.models() == ["atlas", "atlas+over", "atlas+qa", "mine"]
        assert server.text("mine") == before


# Who may --------------------------------------------------------------------------------------------------------


ROUTES = [
    ("GET", "experts", None),
    ("GET", "experts/qa", None),
    ("PUT", "experts/qa", OTHER),
    ("POST", "experts/qa/rollback", None),
    ("DELETE", "experts/qa", None),
    ("GET", "presets", None),
    ("GET", "presets/mine", None),
    ("PUT", "presets/mine", {"experts": {"qa": 1}}),
    ("DELETE", "presets/mine", None),
    ("POST", "drain", None),
]


def test_the_control_plane_is_for_administrators(server: Swapping) -> None:
    server.put("qa", FULL)
    server.done(1)
    lines = read_audit(server.state / AUDIT)
    wrong = {"Authorization": "Bearer sk-wrong"}
    for method, path, body in ROUTES:
        url = f"/admin/v1/{path}"
        for answer, status in (
            (server.user.request(method, url, json=body), 403),
            (httpx.request(method, f"{server.user.base_url}{url}", json=body), 401),
            (httpx.request(method, f"{server.user.base_url}{url}", json=body, headers=wrong), 401),
        ):
            assert answer.status_code == status, (method, path, answer.text)
        assert read_audit(server.state / AUDIT) == lines, (method, path)
    assert server.text("atlas+qa")[1] == {"qa": 1}


def test_every_change_is_in_the_audit_log(server: Swapping) -> None:
    wrong = {"tuned": {"path": "lora-base", "of": "small"}}
    changes: list[Callable[[], object]] = [
        lambda: server.put("qa", FULL),
        lambda: server.put("qa", OTHER),
        lambda: server.post("/admin/v1/experts/qa/rollback"),
        lambda: server.admin.put("/admin/v1/experts/qa", params={"wait": "true"}, json=wrong),
        lambda: server.admin.put("/admin/v1/presets/mine", json={"experts": {"qa": 1}}),
        lambda: server.admin.delete("/admin/v1/presets/mine"),
        lambda: server.admin.delete("/admin/v1/experts/qa", params={"wait": "true"}),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        server.done(number)
    lines = read_audit(server.state / AUDIT)
    done = [(line["action"], line.get("generation"), line["outcome"]) for line in lines if _is_over(line)]
    assert done == [
        ("put", 1, "done"),
        ("put", 2, "done"),
        ("rollback", 1, "done"),
        ("put", 3, "failed"),
        ("put_preset", None, "done"),
        ("delete_preset", None, "done"),
        ("delete", 1, "done"),
    ]
    actor = f"key:{hashlib.sha256(ADMIN.encode()).hexdigest()[:12]}"
    assert {line["actor"] for line in lines} == {actor}
    assert ADMIN not in (server.state / AUDIT).read_text()
    loads = [line for line in lines if line["action"] == "put" and line["outcome"] == "done"]
    hashes = {line["generation"]: line["content_hash"] for line in loads}
    assert all(len(value) == 64 for value in hashes.values()) and len(set(hashes.values())) == 2
    assert PROMPT not in (server.state / AUDIT).read_text()


def test_without_keys_the_operator_did_it(opening: Open) -> None:
    with opening(keys=False) as server:
        server.put("qa", FULL)
        assert {line["actor"] for line in read_audit(server.state / AUDIT)} == {"operator"}


def test_only_an_administrator_weighs_against_a_protected_expert(server: Swapping) -> None:
    assert server.put("qa", {**FULL, "protected": True})["protected"] is True
    for fusion in (
        {"experts": {"qa": -0.5}},
        {"experts": {"qa": {"weight": 1.0, "schedule": [[0, 1.0], [4, -0.5]]}}},
        {"rule": "formula", "formula": "base - 0.5 * qa"},
        {"rule": "arm", "experts": {"qa": -1}},
    ):
        body = {"model": "atlas", "prompt": PROMPT, "max_tokens": 2, "fusion": fusion}
        refused = server.user.post("/v1/completions", json=body)
        assert refused.status_code == 403, fusion
        assert "protected" in refused.json()["error"]["message"]
        assert server.admin.post("/v1/completions", json=body).status_code == 200
    assert server.ask("atlas+qa:-0.5").status_code == 403
    assert server.ask("atlas+qa:0.5").status_code == 200
    assert server.put("qa", FULL)["protected"] is False
    assert server.ask("atlas+qa:-0.5").status_code == 200


def test_only_an_administrator_has_a_swapped_expert_explained(server: Swapping) -> None:
    server.put("qa", ADAPTER)
    body = {
        "model": "atlas",
        "prompt": PROMPT,
        "max_tokens": 3,
        "fusion": {"experts": {"qa": 0.5}, "explain": 2},
    }
    assert server.user.post("/v1/completions", json=body).status_code == 403
    answer = server.admin.post("/v1/completions", json=body)
    assert answer.status_code == 200
    explained = answer.json()["choices"][0]["explain"]
    assert len(explained) == 3
    assert {"base", "qa.tuned"} < set(explained[0]["lanes"])


# Memory ---------------------------------------------------------------------------------------------------------


def room_for(shelf: Shelf, experts: int) -> dict[str, Any]:
    """Settings under which memory holds so many experts that share one untuned model, and not one more."""
    settings = {"kv_memory": 2**18, "max_batch": 1}
    with open_state(shelf.base, None, roots=[shelf.root], **settings) as opened:
        for number in range(experts):
            put(opened, f"e{number}", ExpertSpec(Source(f"e{number}"), Source("small")))
        small = opened.engine.engine.models.expert("e0").tuned.bytes
        return {**settings, "memory": opened.engine.engine.residents.bytes + small // 2}


@pytest.fixture
def many(shelf: Shelf) -> list[str]:
    """Names of experts, and of the folders of their tuned models."""
    for number, folder in enumerate(("qa", "record", "lora-full", "third-full", "soup-full", "blend-full")):
        shutil.copytree(shelf.root / folder, shelf.root / f"e{number}")
    return [f"e{number}" for number in range(6)]


def test_a_load_without_room_is_refused_before_it_begins(
    opening: Open, shelf: Shelf, many: list[str]
) -> None:
    with opening(**room_for(shelf, 2)) as server:
        for name in many[:2]:
            server.put(name, {"tuned": name, "untuned": "small"})
        before = server.opened.engine.engine.residents.bytes
        answer = server.admin.put("/admin/v1/experts/e2", json={"tuned": "e2", "untuned": "small"})
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert error["code"] == "insufficient_memory" and "--memory" in error["message"]
        assert server.admin.get("/admin/v1/experts/e2").status_code == 404
        assert server.opened.engine.engine.residents.bytes == before
        assert server.put("e2", ADAPTER)["generation"] == 1  # adapters take next to nothing
        assert server.text("atlas+e2")[1] == {"e2": 1}
        server.admin.delete("/admin/v1/experts/e1", params={"wait": "true"})
        assert server.put("e3", {"tuned": "e3", "untuned": "small"})["generation"] == 1


@pytest.fixture
def parking(opening: Open, shelf: Shelf, many: list[str]) -> Open:
    """A server with more experts than its memory holds; the first one is parked."""

    @contextmanager
    def parking(**settings: Any) -> Iterator[Swapping]:
        room = room_for(shelf, 3)
        with opening(**room, evict_idle=True, **settings) as server:
            for name in many:
                server.put(name, {"tuned": name, "untuned": "small"})
            states = {name: server.state_of(name)["state"] for name in many}
            assert states == {**dict.fromkeys(many[:3], "parked"), **dict.fromkeys(many[3:], "published")}
            yield server
            assert server.opened.engine.engine.residents.bytes <= room["memory"]

    return parking


def test_a_request_wakes_a_parked_expert(parking: Open) -> None:
    with parking() as server:
        assert "atlas+e0" in server.models()
        text, generations = server.text("atlas+e0")
        assert generations == {"e0": 1}
        assert server.state_of("e0")["state"] == "published"
        server.put("again", {"tuned": "e0", "untuned": "small"})
        assert server.text("atlas+again")[0] == text


def test_all_of_them_answer_in_turn(parking: Open) -> None:
    with parking() as server:
        texts = [server.text(f"atlas+e{number}")[0] for number in range(6)]
        assert [server.text(f"atlas+e{number}")[0] for number in range(6)] == texts
        assert len(set(texts)) == 6


def test_waiting_for_a_parked_expert_ends_with_a_reason(parking: Open) -> None:
    with parking(load_wait=0.0) as server:
        refused = server.ask("atlas+e0")
        assert refused.status_code == 503
        assert "'e0' is still being loaded" in refused.json()["error"]["message"]
        wait_until(lambda: server.state_of("e0")["state"] == "published")  # the load went on
        assert server.text("atlas+e0")[1] == {"e0": 1}


def test_a_parked_expert_whose_files_are_gone_says_so(parking: Open, shelf: Shelf) -> None:
    with parking() as server:
        shutil.rmtree(shelf.root / "e0")
        refused = server.ask("atlas+e0")
        assert refused.status_code == 503
        assert "'e0' cannot be loaded now" in refused.json()["error"]["message"]
        assert server.text("atlas+e5")[1] == {"e5": 1}
        assert server.state_of("e0")["state"] == "parked"
