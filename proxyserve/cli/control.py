"""What the commands of the control plane share: the address and key of a server, its routes, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
import typer

from proxyserve.cli.files import read_text
from proxyserve.errors import ProxyserveError
from proxyserve.models.model_set import NAME

DEFAULT_URL = "http://127.0.0.1:8000"

#: Seconds for an answer that waits for nothing.
_PATIENCE = 60.0

Url = Annotated[
    str, typer.Option("--url", envvar="PROXYSERVE_URL", metavar="URL", help="Address of the server.")
]
AdminKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--admin-key-file",
        envvar="PROXYSERVE_ADMIN_KEY_FILE",
        exists=True,
        dir_okay=False,
        help="File with an administrator's key, for a server that has keys.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the server gives it.")]


class Refused(ProxyserveError):
    """The server answered with an error. `code` is its short reason, None where it gave none."""

    def __init__(self, message: str, *, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    @property
    def unknown_name(self) -> bool:
        """Whether there is nothing of the name that was asked for."""
        return self.status == 404 and self.code == "model_not_found"


class ControlPlane:
    """The routes under `/admin/v1` of one server. Every call gives the answer's JSON and raises ProxyserveError, in one
    line, where there is none, and Refused for an error of the server."""

    def __init__(self, url: str, key_file: Path | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if key_file is None else {"authorization": f"Bearer {_key(key_file)}"}
        self._http = httpx.Client(headers=headers, timeout=_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def experts(self) -> list[dict[str, Any]]:
        return _list(self._call("GET", "/experts"))

    def expert(self, name: str) -> dict[str, Any]:
        return self._call("GET", f"/experts/{_in_path(name)}")

    def put_expert(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The change, which has only begun."""
        return self._call("PUT", f"/experts/{_in_path(name)}", body)

    def rollback(self, name: str, *, wait: bool) -> dict[str, Any]:
        """The expert after it if `wait`, else the change that has begun."""
        return self._call("POST", f"/experts/{_in_path(name)}/rollback", wait=wait)

    def delete_expert(self, name: str, *, wait: bool) -> dict[str, Any]:
        """The change: it is over if `wait`, else it has begun."""
        return self._call("DELETE", f"/experts/{_in_path(name)}", wait=wait)

    def presets(self) -> list[dict[str, Any]]:
        return _list(self._call("GET", "/presets"))

    def preset(self, name: str) -> dict[str, Any]:
        return self._call("GET", f"/presets/{_in_path(name)}")

    def put_preset(self, name: str, fusion: Any) -> dict[str, Any]:
        return self._call("PUT", f"/presets/{_in_path(name)}", fusion)

    def delete_preset(self, name: str) -> dict[str, Any]:
        return self._call("DELETE", f"/presets/{_in_path(name)}")

    def _call(self, method: str, path: str, body: Any = None, *, wait: bool = False) -> dict[str, Any]:
        try:
            response = self._http.request(
                method,
                f"{self.url}/admin/v1{path}",
                params={"wait": "true"} if wait else None,
                **({} if body is None else {"json": body}),
                # What is waited for may take as long as somebody's answer.
                timeout=httpx.Timeout(_PATIENCE, read=None) if wait else _PATIENCE,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ProxyserveError(f"{self.url} cannot be reached: {error}") from error
        try:
            answer = response.json()
            if not response.is_success:
                raise self._refused(response.status_code, answer["error"])
        except (ValueError, KeyError, TypeError):
            answer = None
        if not isinstance(answer, dict):
            raise ProxyserveError(
                f"{self.url} answers with status {response.status_code} and not as a proxyserve server does; see --url."
            )
        return answer

    def _refused(self, status: int, error: dict[str, Any]) -> Refused:
        message, code = str(error["message"]), error.get("code")
        if status in (401, 403) and error.get("param") is None:  # about the key, not about a path
            message += " See --admin-key-file."
        elif code == "route_not_found":
            message = f"{self.url} has no control plane."
        return Refused(message, status=status, code=code)


def parse_json_object(text: str, hint: str) -> dict[str, Any]:
    """Raises BadParameter, naming the argument, for text that is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=hint) from error
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=hint)
    return value


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


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


def _key(file: Path) -> str:
    """The first key of a key file. What the file holds is never repeated."""
    lines = (line.strip() for line in read_text(file).splitlines())
    for line in lines:
        if line and not line.startswith(("#", "sha256:")):
            if line.isascii() and line.isprintable() and " " not in line:
                return line
            break
    raise typer.BadParameter(
        f"{file} must hold a key itself, in a line of its own", param_hint="--admin-key-file"
    )
