"""Keys: who gets in, which routes are public, and where a server without keys may listen."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from proxyserve.api.app import create_app
from proxyserve.api.auth import PUBLIC_PATHS
from proxyserve.api.errors import StartupError
from proxyserve.api.key_ring import Keys
from proxyserve.api.playground import playground_files
from proxyserve.api.server import check_binding, listen, run_server
from proxyserve.config import ServerConfig
from proxyserve.engine.submission import Submission
from proxyserve.models.model_set import ModelSet
from proxyserve.types import OutputEvent
from tests.api.admin_fakes import ADMIN_KEY, USER_KEY, FakeManager, with_keys
from tests.api.fakes import FakeEngine, last
from tests.api.test_keys import as_key, record, write

PLAIN, HASHED = "sk-plain-key", "sk-hashed-key"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    path.write_text(f"# who has it\n\n  {PLAIN}  \nsha256:{digest.upper()}\n")
    return path


@pytest.fixture
def engine(tiny_models: ModelSet) -> Any:
    return FakeEngine(tiny_models)


@pytest.fixture
def app(engine: Any, key_file: Path) -> FastAPI:
    return create_app(engine, ServerConfig(api_key_file=key_file))


def client_of(app: FastAPI, authorization: str | None = None) -> httpx.AsyncClient:
    headers = {} if authorization is None else {"authorization": authorization}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path that the application answers, documented or not."""
    found: list[tuple[str, str]] = []

    def walk(routes: list[BaseRoute]) -> None:
        for route in routes:
            nested = getattr(getattr(route, "original_router", route), "routes", None)  # an included router
            if isinstance(route, Route):
                found.extend((method, route.path) for method in sorted(route.methods or ()))
            elif nested:
                walk(nested)
            else:
                raise AssertionError(f"{route!r} is no HTTP route; its access was not thought about")

    walk(list(app.routes))
    return found


async def test_every_route_needs_the_right_key(engine: Any, tmp_path: Path) -> None:
    """No key, a user's and an administrator's on each route that there is, the control plane's too: a new route that
    nobody thought about fails here."""
    app = create_app(engine, with_keys(tmp_path), FakeManager())  # type: ignore[arg-type]
    routes, page = routes_of(app), playground_files()
    documented = {(m.upper(), path) for path, item in app.openapi()["paths"].items() for m in item}
    paths = {path for _, path in routes}
    assert paths >= {path.replace("{model_id}", "{model_id:path}") for _, path in documented}
    assert paths >= {"/v1/chat/completions", "/metrics", "/docs", "/openapi.json", "/load", "/admin/v1/drain"}
    unknown = [("POST", "/nothing"), ("GET", "/health/"), ("GET", "//health"), ("GET", "/admin/v1/nothing")]
    for method, path in [*routes, *unknown]:
        statuses = []
        for key in (None, "sk-other", USER_KEY, ADMIN_KEY):
            async with client_of(app, key and f"Bearer {key}") as client:
                url = f"http://test{path}"  # whole: `//health` alone would be a host
                answer = await client.request(method, re.sub(r"{\w+(:path)?}", "x", url))
                statuses.append(answer.status_code if answer.status_code in (401, 403) else 0)
        if path in PUBLIC_PATHS or path in page:
            expected = [0, 0, 0, 0]
        elif path == "/metrics" or (path.startswith("/admin/") and (method, path) not in unknown):
            expected = [401, 401, 403, 0]
        else:
            expected = [401, 401, 0, 0]
        assert statuses == expected, (method, path)
    assert sorted(PUBLIC_PATHS) == ["/health", "/ready", "/version"]
    assert paths >= page.keys() | {"/", "/playground/settings"}


async def test_a_monitor_may_watch_and_nothing_else(engine: Any, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.yaml", record("prometheus", role="monitor"))
    app = create_app(engine, ServerConfig(api_key_file=keys), FakeManager())  # type: ignore[arg-type]
    allowed = set()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=as_key("prometheus")
    ) as client:
        for method, path in routes_of(app):
            answer = await client.request(method, re.sub(r"{\w+(:path)?}", "x", path))
            if answer.status_code != 403:
                allowed.add(path)
    assert allowed == PUBLIC_PATHS | {"/metrics", "/load"} | playground_files().keys()


@pytest.mark.parametrize("authorization", [f"Bearer {PLAIN}", f"bearer  {HASHED} ", f"BEARER {HASHED}"])
async def test_known_keys_get_in(app: FastAPI, authorization: str) -> None:
    async with client_of(app, authorization) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/openapi.json")).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-other",
        f"Bearer {PLAIN}x",
        f"Bearer {PLAIN[:-1]}",
        f"Basic {PLAIN}",
        PLAIN,
        f"Bearer sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}",
        f"Bearer {hashlib.sha256(PLAIN.encode()).hexdigest()}",
        "Bearer # who has it",
        "Bearer \xe9",
    ],
)
async def test_others_do_not(app: FastAPI, authorization: str | None) -> None:
    async with client_of(app) as client:
        headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


async def test_without_key_file_any_header_does(engine: Any) -> None:
    app = create_app(engine, ServerConfig())
    for authorization in (None, "Bearer ", "Bearer anything"):  # evaluation harnesses send an empty key
        async with client_of(app, authorization) as client:
            assert (await client.get("/v1/models")).status_code == 200


async def test_refusal_comes_before_the_body(app: FastAPI) -> None:
    async with client_of(app) as client:
        response = await client.post("/v1/completions", content=b"{", headers={"content-length": "999999999"})
    assert response.status_code == 401


async def test_keys_do_not_share_the_prefix_cache(app: FastAPI, engine: Any) -> None:
    async def script(submissions: Sequence[Submission]) -> AsyncIterator[OutputEvent]:
        yield last(submissions[0])

    engine.script = script
    for key in (PLAIN, HASHED):
        for user in (None, "ann"):
            async with client_of(app, f"Bearer {key}") as client:
                body = {"model": "atlas", "prompt": "Hi", "user": user}
                assert (await client.post("/v1/completions", json=body)).status_code == 200
    salts = [submission.salt for submission in engine.submitted]
    assert len(set(salts)) == 4
    assert all(salts)
    assert not any(key in salt for key in (PLAIN, HASHED) for salt in salts)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no keys"),
        (b"# nothing here\n\n", "no keys"),
        (b"sha256:12\n", ":1:"),
        (b"ok\ntwo words\n", ":2:"),
        ("schlüssel\n".encode(), ":1:"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_unusable_key_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=words):
        Keys([(path, "user")])


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read"):
        Keys([(tmp_path / "none", "user")])


def test_ring_keeps_no_keys(key_file: Path) -> None:
    keys = Keys([(key_file, "user")])
    assert len(keys.ring) == 2
    assert [file.plain for file in keys.plain] == [(3,)]
    assert PLAIN not in repr((vars(keys), vars(keys.ring)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_keys_only_loopback(engine: Any, host: str, key_file: Path) -> None:
    with pytest.raises(StartupError, match="--api-key-file"):
        run_server(engine, ServerConfig(host=host))
    check_binding(ServerConfig(host=host, api_key_file=key_file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_binding(ServerConfig(host=host))


def test_port_in_use_is_said_clearly() -> None:
    with listen("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(StartupError, match="Choose another --port"):
            listen("127.0.0.1", first.getsockname()[1])
    with pytest.raises(StartupError, match="no address"):
        listen("not an address", 0)


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"host": "127.0.0.1:8000"}, 200),
        ("GET", {"host": "localhost:8000"}, 200),
        ("GET", {"host": "[::1]:8000"}, 200),
        ("GET", {"host": "app.example"}, 200),  # a proxy in front, of an origin that may call
        ("GET", {"host": "evil.example"}, 403),  # its name led to 127.0.0.1 all of a sudden
        ("GET", {"host": "127.0.0.1.evil.example"}, 403),
        ("GET", {"host": "["}, 403),
        ("GET", {"origin": "https://evil.example"}, 200),  # cannot be read there
        ("POST", {}, 200),
        ("POST", {"origin": "http://localhost:3000"}, 200),
        ("POST", {"origin": "https://app.example"}, 200),
        ("POST", {"origin": "https://app.example.evil"}, 403),
        ("POST", {"origin": "null"}, 403),
    ],
)
async def test_pages_of_other_sites_without_keys(
    engine: Any, method: str, headers: dict[str, str], status: int
) -> None:
    """Whoever connects is the administrator there, and a browser connects for any page."""
    app = create_app(engine, ServerConfig(cors_origins=("https://app.example",)))
    path, body = ("/v1/models", None) if method == "GET" else ("/tokenize", {"prompt": "a"})
    async with client_of(app) as client:
        answer = await client.request(method, path, json=body, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "--cors-origin" in answer.json()["error"]["message"]


async def test_pages_of_other_sites_with_keys(app: FastAPI) -> None:
    """They have none."""
    async with client_of(app, f"Bearer {PLAIN}") as client:
        answer = await client.get("/v1/models", headers={"host": "inference.example.com"})
    assert answer.status_code == 200
