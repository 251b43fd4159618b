"""How the page is served: what may be cached, what may not be run, and who may have what."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from proxyserve.api.app import create_app
from proxyserve.api.playground import playground_files
from proxyserve.config import ServerConfig
from proxyserve.models.model_set import ModelSet
from tests.api.admin_fakes import FakeManager, with_keys
from tests.api.fakes import FakeEngine
from tests.api.test_keys import as_key, record, write


def app_of(models: ModelSet, config: ServerConfig | None = None, **options: Any) -> FastAPI:
    return create_app(FakeEngine(models), config or ServerConfig(**options), FakeManager())  # type: ignore[arg-type]


def client_of(app: FastAPI, base: str = "http://test:8000", **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base, headers=headers)


async def test_the_page_may_run_nothing_but_its_own(tiny_models: ModelSet) -> None:
    async with client_of(app_of(tiny_models)) as client:
        page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=|style=", page.text), "nothing inline"
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text), "nothing from another host"


async def test_files_are_asked_for_again_and_not_sent_again(tiny_models: ModelSet) -> None:
    async with client_of(app_of(tiny_models)) as client:
        plain = await client.get("/playground/main.js", headers={"accept-encoding": "identity"})
        packed = await client.get("/playground/main.js", headers={"accept-encoding": "gzip"})
        assert plain.headers["cache-control"] == packed.headers["cache-control"] == "no-cache"
        assert plain.headers["content-type"] == "text/javascript; charset=utf-8"
        assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
        assert plain.text == packed.text and plain.headers["etag"] != packed.headers["etag"]
        for known in (plain.headers["etag"], f'"other", W/{plain.headers["etag"]}', "*"):
            again = await client.get(
                "/playground/main.js", headers={"accept-encoding": "identity", "if-none-match": known}
            )
            assert again.status_code == 304 and again.content == b"" and again.headers["etag"]
        changed = await client.get("/playground/main.js", headers={"if-none-match": '"other"'})
        assert changed.status_code == 200
        assert (await client.head("/playground/main.js")).status_code == 200


@pytest.mark.parametrize("path", ["/playground/", "/playground/nothing.js", "/playground/..%2fconfig.py"])
async def test_there_is_nothing_else(tiny_models: ModelSet, path: str) -> None:
    async with client_of(app_of(tiny_models)) as client:
        assert (await client.get(path)).status_code == 404


def test_all_that_files_name_is_there() -> None:
    files = playground_files()
    imports, links = re.compile(rb'(?:from|import) ?"(\.[^"]+)"'), re.compile(rb'(?:src|href)="([^"]+)"')
    found = 0
    for path, file in files.items():
        pattern = links if path == "/" else imports
        for name in pattern.findall(file.content) if path.endswith(("/", ".js")) else ():
            found += 1
            assert httpx.URL(f"http://test{path}").join(name.decode()).path in files, (path, name)
    assert found > 80


async def test_one_look_at_the_page_is_one_line_of_log(
    tiny_models: ModelSet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "proxyserve.requests")
    async with client_of(app_of(tiny_models)) as client:
        for path in ("/", "/playground/main.js", "/playground/icon.svg", "/playground/settings"):
            assert (await client.get(path)).status_code == 200
        await client.get("/playground/nothing.js")
    assert [record.fields.get("route", record.fields.get("path")) for record in caplog.records] == [  # type: ignore[attr-defined]
        "/",
        "/playground/nothing.js",
    ]


async def test_it_can_be_switched_off(tiny_models: ModelSet) -> None:
    async with client_of(app_of(tiny_models, playground=False)) as client:
        for path in ("/", "/playground/main.js", "/playground/settings"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200


async def test_files_are_public_and_settings_are_not(tiny_models: ModelSet, tmp_path: Path) -> None:
    async with client_of(app_of(tiny_models, with_keys(tmp_path))) as client:
        for path in ("/", "/playground/main.js"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/playground/settings")).status_code == 401
        assert (await client.get("/playground/nothing.js")).status_code == 401


@pytest.mark.parametrize(
    ("role", "explain"),
    [({}, 0), ({"explain": True}, 20), ({"explain": True, "max_logprobs": 3}, 3), ({"role": "admin"}, 20)],
)
async def test_settings_are_of_the_key(
    tiny_models: ModelSet, tmp_path: Path, role: dict[str, Any], explain: int
) -> None:
    keys = write(tmp_path / "keys.yaml", record("ann", **role), record("bob", experts=["qa"]))
    app = app_of(tiny_models, ServerConfig(api_key_file=keys))
    async with client_of(app) as client:
        ann = (await client.get("/playground/settings", headers=as_key("ann"))).json()
        bob = (await client.get("/playground/settings", headers=as_key("bob"))).json()
    assert ann["explain"] == explain and ann["admin"] is ("role" in role)
    assert [expert["name"] for expert in ann["experts"]] == ["qa", "record"]
    assert [expert["name"] for expert in bob["experts"]] == ["qa"]
    assert ann["base"] == "atlas" and ann["control_plane"] == "here" and ann["generates"]
    assert [ann["min_weight"], ann["max_weight"]] == [-4, 4]


@pytest.mark.parametrize(("port", "plane", "generates"), [(9000, "elsewhere", True), (9001, "here", False)])
async def test_with_a_port_for_administrators(
    tiny_models: ModelSet, port: int, plane: str, generates: bool
) -> None:
    async with client_of(app_of(tiny_models, port=9000, admin_port=9001), f"http://test:{port}") as client:
        assert (await client.get("/")).status_code == 200
        settings = (await client.get("/playground/settings")).json()
    assert (settings["control_plane"], settings["generates"], settings["admin_port"]) == (
        plane,
        generates,
        9001,
    )
