"""What the commands of the control plane share: its options and its routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from proxyserve.cli.connection import Connection, key_in
from proxyserve.cli.exits import Refused
from proxyserve.cli.panels import SERVER
from proxyserve.types import NAME

AdminKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--admin-key-file",
        envvar="PROXYSERVE_ADMIN_KEY_FILE",
        exists=True,
        dir_okay=False,
        help="File with an administrator's key, for a server that has keys.",
        rich_help_panel=SERVER,
    ),
]


class ControlPlane(Connection):
    """The routes under `/admin/v1` of one server. Every call gives the answer's JSON."""

    def __init__(self, url: str, key_file: Path | None) -> None:
        option = "--admin-key-file"
        key = None if key_file is None else key_in(key_file, option)
        super().__init__(url, key, key_option=option)

    def experts(self) -> list[dict[str, Any]]:
        return _list(self._admin("GET", "/experts"))

    def expert(self, name: str) -> dict[str, Any]:
        return self._admin("GET", f"/experts/{_in_path(name)}")

    def put_expert(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The change, which has only begun."""
        return self._admin("PUT", f"/experts/{_in_path(name)}", body)

    def rollback(self, name: str, *, wait: bool) -> dict[str, Any]:
        """The expert after it if `wait`, else the change that has begun."""
        return self._admin("POST", f"/experts/{_in_path(name)}/rollback", wait=wait)

    def delete_expert(self, name: str, *, wait: bool) -> dict[str, Any]:
        """The change: it is over if `wait`, else it has begun."""
        return self._admin("DELETE", f"/experts/{_in_path(name)}", wait=wait)

    def presets(self) -> list[dict[str, Any]]:
        return _list(self._admin("GET", "/presets"))

    def preset(self, name: str) -> dict[str, Any]:
        return self._admin("GET", f"/presets/{_in_path(name)}")

    def put_preset(self, name: str, fusion: Any) -> dict[str, Any]:
        return self._admin("PUT", f"/presets/{_in_path(name)}", fusion)

    def delete_preset(self, name: str) -> dict[str, Any]:
        return self._admin("DELETE", f"/presets/{_in_path(name)}")

    def _admin(self, method: str, path: str, body: Any = None, *, wait: bool = False) -> dict[str, Any]:
        try:
            return self.call(method, f"/admin/v1{path}", body, wait=wait)
        except Refused as error:
            if error.code == "route_not_found":
                raise Refused(
                    f"{self.url} has no control plane.", status=error.status, code=error.code
                ) from error
            raise


def _in_path(name: str) -> str:
    """Raises BadParameter for what can name nothing, and so might name another route."""
    if not NAME.fullmatch(name):
        raise typer.BadParameter(
            f"'{name}' cannot be a name; use letters, digits, '_' and '-', at most 64", param_hint="NAME"
        )
    return name


def _list(answer: dict[str, Any]) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = answer["data"]
    return data
