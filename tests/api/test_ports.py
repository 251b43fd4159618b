"""The control plane on a port of its own."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from proxyserve.api.app import create_app
from proxyserve.config import ServerConfig
from proxyserve.models.model_set import ModelSet
from tests.api.admin_fakes import FakeManager
from tests.api.fakes import FakeEngine

USERS, ADMINS = 9000, 9001


def status_of(models: ModelSet, port: int, path: str, **config: Any) -> Any:
    app = create_app(FakeEngine(models), ServerConfig(port=USERS, **config), FakeManager())  # type: ignore[arg-type]
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://test:{port}")
    return client.get(path)


@pytest.mark.parametrize(
    ("port", "path", "status"),
    [
        (USERS, "/v1/models", 200),
        (USERS, "/admin/v1/experts", 404),
        (USERS, "/health", 200),
        (ADMINS, "/admin/v1/experts", 200),
        (ADMINS, "/v1/models", 404),
        (ADMINS, "/ready", 200),
        (ADMINS, "/administer", 404),
    ],
)
async def test_each_port_answers_its_own(tiny_models: ModelSet, port: int, path: str, status: int) -> None:
    answer = await status_of(tiny_models, port, path, admin_port=ADMINS)
    assert answer.status_code == status
    if status == 404:
        assert answer.json()["error"]["code"] == "route_not_found"


async def test_one_port_answers_everything(tiny_models: ModelSet) -> None:
    assert (await status_of(tiny_models, USERS, "/admin/v1/experts")).status_code == 200


@pytest.mark.parametrize("port", [USERS, 0])
def test_it_must_be_another_port(port: int) -> None:
    with pytest.raises(ValueError, match="admin_port"):
        ServerConfig(port=USERS, admin_port=port)
