"""The control plane's routes over a manager that does what the test says."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from proxyserve.errors import (
    Forbidden,
    InvalidRequest,
    LoadError,
    NoRoom,
    NotReady,
    SwapConflict,
    UnknownModel,
)
from proxyserve.experts.generation import Phase
from proxyserve.experts.source import ExpertSpec, LayerScale, Source
from proxyserve.experts.status import ExpertStatus
from tests.api.admin_fakes import ADMIN_KEY, USER_KEY, FakeManager, admin_app, generation_status

PAIR = {"tuned": "/experts/qa", "untuned": "/small"}
SPEC = ExpertSpec(Source("/experts/qa"), Source("/small"))

#: Method, path, and a body that the route takes.
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/experts", None),
    ("GET", "/experts/qa", None),
    ("PUT", "/experts/qa", PAIR),
    ("POST", "/experts/qa/rollback", None),
    ("DELETE", "/experts/qa", None),
    ("GET", "/presets", None),
    ("GET", "/presets/calm", None),
    ("PUT", "/presets/calm", {"experts": {"qa": 0.5}}),
    ("DELETE", "/presets/calm", None),
    ("POST", "/drain", None),
]
NAMED = [route for route in ROUTES if route[1] not in ("/experts", "/presets", "/drain")]
CHANGES = [route for route in ROUTES if route[0] != "GET"]
WAITED = [
    ("PUT", "/experts/qa", PAIR),
    ("POST", "/experts/qa/rollback", None),
    ("DELETE", "/experts/qa", None),
]


def route_id(value: Any) -> str:
    return value if isinstance(value, str) else ""


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
def app(manager: FakeManager) -> FastAPI:
    return admin_app(manager)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


def client_of(app: FastAPI, key: str | None = None) -> httpx.AsyncClient:
    """Every answer that it gets must be one that the OpenAPI document has."""

    async def require_documented(response: httpx.Response) -> None:
        request = response.request
        for (method, path), statuses in documented().items():
            pattern = re.sub(r"\{\w+\}", "[^/]+", path)
            if method == request.method and re.fullmatch(pattern, request.url.path):
                assert str(response.status_code) in statuses, (method, path, response.status_code)

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://test/admin/v1",
        headers={} if key is None else {"authorization": f"Bearer {key}"},
        event_hooks={"response": [require_documented]},
    )


@cache
def documented() -> dict[tuple[str, str], set[str]]:
    """Which statuses each method and path may answer with."""
    return {
        (method.upper(), path): set(operation["responses"])
        for path, item in admin_app(FakeManager()).openapi()["paths"].items()
        for method, operation in item.items()
    }


async def put(client: httpx.AsyncClient, body: Any = PAIR, name: str = "qa") -> httpx.Response:
    return await client.put(f"experts/{name}", json=body)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def waited_for(manager: FakeManager) -> None:
    """Returns once a request waits for a change."""
    async with asyncio.timeout(10):
        await manager.waited_for.wait()


# Who may.


def test_all_routes_are_tried_here(app: FastAPI) -> None:
    found = {(m.upper(), path) for path, item in app.openapi()["paths"].items() for m in item}
    name = re.compile(r"/(qa|calm)")
    assert found == {(method, f"/admin/v1{name.sub('/{name}', path)}") for method, path, _ in ROUTES}


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=route_id)
async def test_only_administrators(
    manager: FakeManager, tmp_path: Path, method: str, path: str, body: Any
) -> None:
    app = admin_app(manager, keys=tmp_path)
    for key, status, code in ((None, 401, "invalid_api_key"), (USER_KEY, 403, "forbidden")):
        async with client_of(app, key) as client:
            assert error_of(await client.request(method, path[1:], json=body), status)["code"] == code
            # Nothing of the request is looked at before that.
            assert (
                error_of(await client.request(method, f"{path[1:]}?x=1", content=b"{"), status)["code"]
                == code
            )
    assert manager.actions == []
    async with client_of(app, ADMIN_KEY) as client:
        assert (await client.request(method, path[1:], json=body)).status_code not in (401, 403)


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=route_id)
async def test_actors_are_named_by_the_hash_of_their_key(
    tmp_path: Path, method: str, path: str, body: Any
) -> None:
    by_key = f"key:{hashlib.sha256(ADMIN_KEY.encode()).hexdigest()[:12]}"
    # Where there are no keys, what a client sends proves nothing.
    for keys, actor in ((tmp_path, by_key), (None, "operator")):
        manager = FakeManager(at_once=True)
        manager.put("qa", SPEC, actor="test")
        manager.put("qa", SPEC, actor="test")
        manager.put_preset("calm", {}, actor="test")
        async with client_of(admin_app(manager, keys=keys), ADMIN_KEY) as client:
            assert (await client.request(method, path[1:], json=body)).is_success
        assert manager.actions[-1][-1] == actor


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=route_id)
async def test_a_server_with_fixed_experts_has_no_such_routes(method: str, path: str, body: Any) -> None:
    async with client_of(admin_app(None)) as client:
        answer = await client.request(method, path[1:], json=body)
    assert error_of(answer, 404)["code"] == "route_not_found"


# What is shown.


async def test_an_expert_is_shown_with_all_that_is_known(
    manager: FakeManager, client: httpx.AsyncClient
) -> None:
    merge = Source(of="small", merge=((0.5, Source("/a")), (0.5, Source("/b", "diff", scale=2.0))))
    newest = generation_status(
        3,
        Phase.WARMING,
        ExpertSpec(merge),
        progress=0.25,
        bytes=0,
        seconds={"loading": 1.5},
        content_hash="abc",
    )
    serving = generation_status(2, Phase.PUBLISHED, SPEC, requests=7)
    manager.show(ExpertStatus("qa", "published", 2, None, True, (newest, serving), "not enough memory"))
    body = (await client.get("experts/qa")).json()
    assert body == {
        "object": "expert",
        "name": "qa",
        "state": "published",
        "generation": 2,
        "previous": None,
        "protected": True,
        "last_error": "not enough memory",
        "generations": [
            {
                "generation": 3,
                "phase": "warming",
                "formats": {"tuned": "merge"},
                "sources": {
                    "tuned": {
                        "of": "small",
                        "merge": [
                            {"weight": 0.5, "path": "/a"},
                            {"weight": 0.5, "path": "/b", "format": "diff", "scale": 2.0},
                        ],
                    }
                },
                "bytes": 0,
                "requests": 0,
                "progress": 0.25,
                "content_hash": "abc",
                "created": 1_700_000_000.5,
                "error": None,
                "seconds": {"loading": 1.5},
            },
            {
                "generation": 2,
                "phase": "published",
                "formats": {"tuned": "folder", "untuned": "folder"},
                "sources": {"tuned": {"path": "/experts/qa"}, "untuned": {"path": "/small"}},
                "bytes": 3 * 2**20,
                "requests": 7,
                "progress": None,
                "content_hash": "",
                "created": 1_700_000_000.5,
                "error": None,
                "seconds": {},
            },
        ],
    }
    assert (await client.get("experts")).json() == {"object": "list", "data": [body]}


async def test_experts_are_listed_by_name(client: httpx.AsyncClient) -> None:
    assert (await client.get("experts")).json() == {"object": "list", "data": []}
    for name in ("record", "arith", "qa"):
        await put(client, name=name)
    assert [expert["name"] for expert in (await client.get("experts")).json()["data"]] == [
        "arith",
        "qa",
        "record",
    ]


# Changes.


async def test_a_load_that_is_not_waited_for_can_be_followed(
    manager: FakeManager, client: httpx.AsyncClient
) -> None:
    response = await put(client)
    assert response.status_code == 202
    location = response.headers["location"]
    assert response.json() == {
        "expert": "qa",
        "generation": 1,
        "status": (await client.get(f"http://test{location}")).json(),
    }
    assert response.json()["status"]["state"] == "loading"
    for phase in (Phase.VERIFYING, Phase.WARMING):
        manager.advance("qa", phase, 0.5)
        newest = (await client.get("experts/qa")).json()["generations"][0]
        assert (newest["phase"], newest["progress"]) == (phase, 0.5)
    manager.publish("qa")
    done = (await client.get("experts/qa")).json()
    assert (done["state"], done["generation"]) == ("published", 1)


async def test_waiting_ends_when_the_generation_is_published(
    manager: FakeManager, client: httpx.AsyncClient
) -> None:
    waiting = asyncio.create_task(client.put("experts/qa?wait=true", json=PAIR))
    await waited_for(manager)
    assert not waiting.done()
    manager.publish("qa")
    answer = await waiting
    assert answer.status_code == 200
    assert answer.json() == (await client.get("experts/qa")).json()
    assert answer.json()["generation"] == 1


async def test_a_load_that_fails_says_why_and_what_serves(
    manager: FakeManager, client: httpx.AsyncClient
) -> None:
    for serving in ("No generation serves.", "Generation 2 goes on serving."):
        waiting = asyncio.create_task(client.put("experts/qa?wait=true", json=PAIR))
        await waited_for(manager)
        manager.fail("qa", "the probe gave NaN.")
        error = error_of(await waiting, 400)
        assert (error["code"], error["param"]) == ("load_failed", None)
        assert error["message"].endswith(f"failed: the probe gave NaN. {serving}")
        manager.at_once = True
        await put(client)
        manager.at_once = False
    assert (await client.get("experts/qa")).json()["generations"][1]["error"] == "the probe gave NaN."


async def test_a_parked_generation_that_cannot_be_loaded_is_a_failure(
    manager: FakeManager, client: httpx.AsyncClient
) -> None:
    manager.at_once = True
    for _ in range(2):
        await put(client)
    status = manager.expert("qa")
    parked = replace(status.generations[1], phase=Phase.PARKED, error="the folder is gone")
    manager.show(replace(status, generations=(status.generations[0], parked)))
    manager.at_once = False
    waiting = asyncio.create_task(client.post("experts/qa/rollback?wait=true"))
    await waited_for(manager)
    manager.settle("qa", 1)
    error = error_of(await waiting, 400)
    assert error["code"] == "load_failed"
    assert "the folder is gone. Generation 2 goes on serving." in error["message"]


@pytest.mark.parametrize("wait", [True, False])
async def test_rollback(manager: FakeManager, client: httpx.AsyncClient, wait: bool) -> None:
    manager.at_once = True
    for _ in range(2):
        await put(client)
    answer = await client.post("experts/qa/rollback", params={"wait": wait})
    if wait:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 202
        assert answer.headers["location"] == "/admin/v1/experts/qa"
        assert (answer.json()["expert"], answer.json()["generation"]) == ("qa", 1)
    expert = answer.json() if wait else answer.json()["status"]
    assert (expert["generation"], expert["previous"]) == (1, 2)


@pytest.mark.parametrize("wait", [True, False])
async def test_delete_waits_for_what_runs(
    manager: FakeManager, client: httpx.AsyncClient, wait: bool
) -> None:
    await put(client)
    manager.publish("qa")
    deleting = asyncio.create_task(client.delete("experts/qa", params={"wait": wait}))
    if wait:
        await waited_for(manager)
        manager.retire("qa")
        answer = await deleting
        assert answer.status_code == 200
        assert answer.json() == {"expert": "qa", "generation": 1, "status": None}
    else:
        answer = await deleting
        assert answer.status_code == 202
        assert answer.json()["status"]["name"] == "qa"
        manager.retire("qa")
    assert error_of(await client.get("experts/qa"), 404)["param"] == "name"


@pytest.mark.parametrize(("wait", "status"), [(True, 200), (False, 202)])
async def test_delete_of_an_idle_expert_leaves_nothing_to_show(
    manager: FakeManager, client: httpx.AsyncClient, wait: bool, status: int
) -> None:
    manager.at_once = True
    await put(client)
    answer = await client.delete("experts/qa", params={"wait": wait})
    assert answer.status_code == status
    assert answer.json() == {"expert": "qa", "generation": 1, "status": None}


@pytest.mark.parametrize(("method", "path", "body"), WAITED, ids=route_id)
async def test_waiting_ends_when_the_server_stops(
    manager: FakeManager, app: FastAPI, client: httpx.AsyncClient, method: str, path: str, body: Any
) -> None:
    await two_generations(manager)
    waiting = asyncio.create_task(client.request(method, f"{path[1:]}?wait=true", json=body))
    await waited_for(manager)
    app.state.proxyserve.stopping.set()
    async with asyncio.timeout(10):
        answer = await waiting
    assert error_of(answer, 503)["code"] == "not_ready"
    assert manager.waiting == 0


@pytest.mark.parametrize(("method", "path", "body"), WAITED, ids=route_id)
async def test_a_client_that_leaves_stops_waiting_but_not_the_change(
    manager: FakeManager, app: FastAPI, method: str, path: str, body: Any
) -> None:
    await two_generations(manager)
    left = asyncio.Event()
    content = b"" if body is None else json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": method,
        "path": f"/admin/v1{path}",
        "raw_path": f"/admin/v1{path}".encode(),
        "query_string": b"wait=true",
        "headers": [(b"content-type", b"application/json")],
        "root_path": "",
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    serving = asyncio.create_task(app(scope, receive, send))
    await waited_for(manager)
    left.set()
    async with asyncio.timeout(10):
        await serving
    assert manager.waiting == 0
    change = manager.changes[-1]
    assert not manager.is_settled(change), "it was over already, so this shows nothing"
    if method == "DELETE":
        manager.retire("qa")
    else:
        manager.publish("qa", change.generation)
    assert manager.is_settled(change)


async def two_generations(manager: FakeManager) -> None:
    manager.at_once = True
    for _ in range(2):
        manager.put("qa", SPEC, actor="test")
    manager.at_once = False


# Sources.


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        ({"tuned": "/a"}, ExpertSpec(Source("/a"))),
        (PAIR, SPEC),
        ({"tuned": {"path": "/a"}, "untuned": None, "protected": None}, ExpertSpec(Source("/a"))),
        ({"tuned": "/a", "protected": True}, ExpertSpec(Source("/a"), None, True)),
        ({"tuned": "/a", "untuned": {"of": "small"}}, ExpertSpec(Source("/a"), Source(of="small"))),
        (
            {"tuned": {"path": "/a", "format": "lora", "of": "small", "scale": 2}},
            ExpertSpec(Source("/a", "lora", "small", 2.0)),
        ),
        (
            {"tuned": {"path": "/a", "format": "diff", "layers": {"first": 0.25, "last": 1}, "scale": None}},
            ExpertSpec(Source("/a", "diff", layers=LayerScale(0.25, 1.0))),
        ),
        (
            {
                "tuned": {
                    "of": "small",
                    "merge": [
                        {"weight": 0.5, "path": "/a"},
                        {"weight": -1, "path": "/b", "format": "compressed", "scale": 0.5},
                        {"weight": 1, "path": "/c", "layers": {"first": 0, "last": 1}},
                    ],
                }
            },
            ExpertSpec(
                Source(
                    of="small",
                    merge=(
                        (0.5, Source("/a")),
                        (-1.0, Source("/b", "compressed", scale=0.5)),
                        (1.0, Source("/c", layers=LayerScale(0.0, 1.0))),
                    ),
                )
            ),
        ),
    ],
    ids=str,
)
async def test_what_a_body_asks_for(
    manager: FakeManager, client: httpx.AsyncClient, body: dict[str, Any], spec: ExpertSpec
) -> None:
    assert (await put(client, body)).status_code == 202
    assert manager.actions == [("put", "qa", spec, "operator")]


DIFF = {"path": "/a", "format": "diff"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ("/a", None),
        ({}, "tuned"),
        ({"tuned": None}, "tuned"),
        ({"tuned": 5}, "tuned"),
        ({"tuned": ["/a"]}, "tuned"),
        ({"tuned": ""}, "tuned.path"),
        ({"tuned": "  "}, "tuned.path"),
        ({"tuned": "a" * 4097}, "tuned.path"),
        ({"tuned": {}}, "tuned.path"),
        ({"tuned": {"path": 5}}, "tuned.path"),
        ({"tuned": {"path": "/a", "merge": [{"weight": 1, "path": "/b"}]}}, "tuned.merge"),
        ({"tuned": {"path": "/a", "format": "gguf"}}, "tuned.format"),
        ({"tuned": {"path": "/a", "of": ""}}, "tuned.of"),
        ({"tuned": {"path": "/a", "of": 1}}, "tuned.of"),
        ({"tuned": {"path": "/a", "scale": "1"}}, "tuned.scale"),
        ({"tuned": {"path": "/a", "scale": True}}, "tuned.scale"),
        ({"tuned": {"path": "/a", "format": "folder", "scale": 2}}, "tuned.scale"),
        ({"tuned": {"of": "small", "scale": 2}}, "tuned.scale"),
        ({"tuned": {**DIFF, "layers": [1, 2]}}, "tuned.layers"),
        ({"tuned": {**DIFF, "layers": {"first": 1}}}, "tuned.layers.last"),
        ({"tuned": {**DIFF, "layers": {"first": 1, "last": 1, "middle": 1}}}, "tuned.layers.middle"),
        ({"tuned": {"path": "/a", "format": "lora", "layers": {"first": 1, "last": 1}}}, "tuned.layers"),
        ({"tuned": {"path": "/a", "sha256": "0"}}, "tuned.sha256"),
        ({"tuned": {"merge": []}}, "tuned.merge"),
        ({"tuned": {"merge": {"/a": 1}}}, "tuned.merge"),
        ({"tuned": {"merge": [{"weight": 1, "path": "/a"}] * 65}}, "tuned.merge"),
        ({"tuned": {"merge": ["/a"]}}, "tuned.merge[0]"),
        ({"tuned": {"merge": [{"path": "/a"}]}}, "tuned.merge[0].weight"),
        ({"tuned": {"merge": [{"weight": "1", "path": "/a"}]}}, "tuned.merge[0].weight"),
        ({"tuned": {"merge": [{"weight": 1, "path": "/a"}, {"weight": 1}]}}, "tuned.merge[1].path"),
        (
            {"tuned": {"merge": [{"weight": 1, "path": "/a"}, {"weight": 1, "path": " "}]}},
            "tuned.merge[1].path",
        ),
        (
            {"tuned": {"merge": [{"weight": 1, "path": "/a", "format": "folder", "scale": 2}]}},
            "tuned.merge[0].scale",
        ),
        ({"tuned": {"merge": [{"weight": 1, "path": "/a", "merge": []}]}}, "tuned.merge[0].merge"),
        ({"tuned": "/a", "untuned": ""}, "untuned.path"),
        ({"tuned": "/a", "untuned": {"format": "folder"}}, "untuned.path"),
        ({"tuned": "/a", "untuned": {"path": "/b", "format": "folder", "scale": 0.5}}, "untuned.scale"),
        ({"tuned": "/a", "protected": 1}, "protected"),
        ({"tuned": "/a", "name": "qa"}, "name"),
    ],
    ids=lambda value: str(value)[:70],
)
async def test_bad_bodies_name_the_field(
    manager: FakeManager, client: httpx.AsyncClient, body: Any, param: str | None
) -> None:
    assert error_of(await put(client, body), 400)["param"] == param
    assert manager.actions == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
async def test_numbers_are_finite(client: httpx.AsyncClient, value: str) -> None:
    content = f'{{"tuned": {{"path": "/a", "scale": {value}}}}}'
    response = await client.put("experts/qa", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400


# Names and what else is refused.


@pytest.mark.parametrize("name", ["-qa", "q.a", "q+a", "q:a", "q a", "ü", "a" * 65, "%2e%2e", "q%0a"])
@pytest.mark.parametrize(("method", "path", "body"), NAMED, ids=route_id)
async def test_names_that_can_name_nothing(
    manager: FakeManager, client: httpx.AsyncClient, method: str, path: str, body: Any, name: str
) -> None:
    place = re.sub("qa|calm", name, path[1:])
    error = error_of(await client.request(method, place, json=body), 400)
    assert error["param"] == "name"
    assert manager.actions == []


@pytest.mark.parametrize(
    ("method", "path", "body"), [route for route in NAMED if route[0] != "PUT"], ids=route_id
)
async def test_unknown_names(client: httpx.AsyncClient, method: str, path: str, body: Any) -> None:
    error = error_of(await client.request(method, path[1:], json=body), 404)
    assert (error["param"], error["code"]) == ("name", "model_not_found")


@pytest.mark.parametrize(
    ("refusal", "status", "param", "code"),
    [
        (SwapConflict("Another change runs."), 409, None, "swap_conflict"),
        (NoRoom("3 GiB are needed, 1 GiB is left."), 409, None, "insufficient_memory"),
        (
            InvalidRequest("That is outside of --expert-root.", param="tuned.path"),
            400,
            "tuned.path",
            "invalid_value",
        ),
        (UnknownModel("There is no model 'tiny'.", param="tuned.of"), 404, "tuned.of", "model_not_found"),
        (Forbidden("That is outside.", param="tuned.path"), 403, "tuned.path", "forbidden"),
        (LoadError("/a: holds no model of a known format"), 400, None, "load_failed"),
        (NotReady("The server is draining."), 503, None, "not_ready"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_what_the_manager_refuses(
    manager: FakeManager, client: httpx.AsyncClient, refusal: Exception, status: int, param: str, code: str
) -> None:
    manager.refusal = refusal
    for query in ("", "?wait=true"):
        error = error_of(await client.put(f"experts/qa{query}", json=PAIR), status)
        assert (error["message"], error["param"], error["code"]) == (str(refusal), param, code)


async def test_two_changes_at_once_and_nothing_to_go_back_to(client: httpx.AsyncClient) -> None:
    assert (await put(client)).status_code == 202
    assert error_of(await put(client), 409)["code"] == "swap_conflict"
    assert error_of(await client.post("experts/qa/rollback"), 409)["code"] == "swap_conflict"


@pytest.mark.parametrize(("method", "path", "body"), WAITED, ids=route_id)
@pytest.mark.parametrize(("query", "param"), [("wait=maybe", "wait"), ("wiat=true", "wiat")])
async def test_queries_are_not_guessed_at(
    manager: FakeManager, client: httpx.AsyncClient, method: str, path: str, body: Any, query: str, param: str
) -> None:
    assert error_of(await client.request(method, f"{path[1:]}?{query}", json=body), 400)["param"] == param
    assert manager.actions == []


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=route_id)
async def test_bodies_are_json_where_there_are_any(
    manager: FakeManager, client: httpx.AsyncClient, method: str, path: str, body: Any
) -> None:
    as_json = {"content-type": "application/json"}
    if body is None:
        error = error_of(await client.request(method, path[1:], json={}), 400)
        assert error["code"] == "invalid_body"
    else:
        error = error_of(await client.request(method, path[1:], content=b"{", headers=as_json), 400)
        assert error["code"] == "invalid_json"
        error = error_of(await client.request(method, path[1:], content=json.dumps(body)), 415)
        assert error["code"] == "unsupported_media_type"
    large = b" " * (8 * 2**20 + 1)
    error_of(await client.request(method, path[1:], content=large, headers=as_json), 413)
    assert manager.actions == []


# Presets and draining.


async def test_presets_come_and_go(manager: FakeManager, client: httpx.AsyncClient) -> None:
    assert (await client.get("presets")).json() == {"object": "list", "data": []}
    calm = {"rule": "proxy", "experts": {"qa": 0.5}, "support": None}
    bold = {"experts": [{"expert": "qa", "weight": 2}], "gate": {"confidence": 0.9}}
    for name, fusion in (("calm", bold), ("calm", calm), ("bold", bold)):
        answer = await client.put(f"presets/{name}", json=fusion)
        assert answer.status_code == 200
        assert answer.json() == {"object": "preset", "name": name, "fusion": fusion}
    assert body_of(await client.get("presets/calm")) == {"object": "preset", "name": "calm", "fusion": calm}
    listing = body_of(await client.get("presets"))
    assert [(entry["name"], entry["fusion"]) for entry in listing["data"]] == [("bold", bold), ("calm", calm)]
    answer = await client.delete("presets/calm")
    assert body_of(answer) == {"object": "preset", "name": "calm", "deleted": True}
    assert "Presets: bold" in error_of(await client.get("presets/calm"), 404)["message"]


def body_of(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("fusion", "param"),
    [
        ([], "fusion"),
        ("proxy", "fusion"),
        ({"rule": "dynamite"}, "fusion.rule"),
        ({"experts": {"qa": "much"}}, "fusion.experts.qa"),
        ({"gate": {}}, "fusion.gate.confidence"),
        ({"rule": "upscale", "experts": {"qa": 1}, "gamma": 1}, "fusion.gamma"),
        ({"fusion": {"experts": {"qa": 1}}}, "fusion.fusion"),
        ({"rule": "guidance"}, "fusion.negative_prompt"),
    ],
    ids=str,
)
async def test_bad_presets_name_the_field(
    manager: FakeManager, client: httpx.AsyncClient, fusion: Any, param: str
) -> None:
    assert error_of(await client.put("presets/calm", json=fusion), 400)["param"] == param
    assert manager.actions == []


async def test_a_preset_that_the_manager_refuses(manager: FakeManager, client: httpx.AsyncClient) -> None:
    await put(client)
    assert error_of(await client.put("presets/qa", json={}), 400)["param"] == "name"
    manager.refusal = UnknownModel("There is no expert 'ghost' here.", param="fusion.experts.ghost")
    answer = await client.put("presets/calm", json={"experts": {"ghost": 1}})
    assert error_of(answer, 404)["param"] == "fusion.experts.ghost"
    manager.refusal = SwapConflict("Preset 'bold' is made of it.", code="in_use")
    assert error_of(await client.put("presets/calm", json={}), 409)["code"] == "in_use"
    assert error_of(await client.delete("presets/calm"), 409)["code"] == "in_use"


async def test_drain(manager: FakeManager, client: httpx.AsyncClient) -> None:
    answer = await client.post("drain")
    assert (answer.status_code, answer.json()) == (202, {"status": "draining"})
    assert manager.drained


# Documentation.


def test_the_document_says_what_the_routes_take_and_answer(app: FastAPI) -> None:
    document = app.openapi()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    defined = {f"#/components/schemas/{name}" for name in schemas}
    assert set(re.findall(r'"\$ref": "([^"]+)"', text)) <= defined
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation["summary"], (path, method)
            assert {"401", "403", "404"} <= set(operation["responses"])
            assert "422" not in operation["responses"], "FastAPI's own validation answer is never sent"
            assert ("requestBody" in operation) == (method == "put")
    swap = document["paths"]["/admin/v1/experts/{name}"]["put"]
    assert {"200", "202", "400", "409", "413", "415", "503"} <= set(swap["responses"])
    assert "Location" in swap["responses"]["202"]["headers"]
    assert [
        choice.get("type", "object") for choice in schemas["ExpertRequest"]["properties"]["tuned"]["anyOf"]
    ] == [
        "string",
        "object",
    ]
    preset = document["paths"]["/admin/v1/presets/{name}"]["put"]["requestBody"]["content"][
        "application/json"
    ]
    assert {"$ref": "#/components/schemas/ProxyFusion"} in preset["schema"]["oneOf"]
    for name in ("ExpertRequest", "SourceObject", "PartObject", "LayersObject"):
        assert schemas[name]["additionalProperties"] is False
        for field, schema in schemas[name]["properties"].items():
            assert "description" in schema or field == "tuned", (name, field)
