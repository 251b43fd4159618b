"""Calls of a running server: its address and key as options, JSON and streams as Python objects, refusals as errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
import typer

from proxyserve.cli.completing import complete_models
from proxyserve.cli.exits import Refused, Unreachable
from proxyserve.cli.files import read_text
from proxyserve.cli.panels import SERVER

DEFAULT_URL = "http://127.0.0.1:8000"

#: Seconds for an answer that waits for nothing.
PATIENCE = 60.0

Url = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="PROXYSERVE_URL",
        metavar="URL",
        help="Address of the server.",
        rich_help_panel=SERVER,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="PROXYSERVE_API_KEY",
        metavar="KEY",
        help="Key, for a server that has keys. Other users of this machine can read command lines: rather set the "
        "variable or name a file.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        envvar="PROXYSERVE_API_KEY_FILE",
        exists=True,
        dir_okay=False,
        help="File with a key of the server, in a line of its own.",
        rich_help_panel=SERVER,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="PROXYSERVE_MODEL",
        autocompletion=complete_models,
        help="BASE, BASE+EXPERT:WEIGHT..., or a preset.",
    ),
]


def choose_key(key: str | None, file: Path | None) -> str | None:
    """The key itself or that of the file. Raises BadParameter."""
    if key is None:
        return None if file is None else key_in(file, "--api-key-file")
    if not is_key(key):
        raise typer.BadParameter("a key has printable ASCII characters and no spaces", param_hint="--api-key")
    return key


def is_key(text: str) -> bool:
    """Whether it can be sent in a header."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def key_in(file: Path, option: str) -> str:
    """The first key of a key file. What the file holds is never repeated."""
    for line in map(str.strip, read_text(file).splitlines()):
        if line and not line.startswith(("#", "sha256:")):
            if is_key(line):
                return line
            break
    raise typer.BadParameter(f"{file} must hold a key itself, in a line of its own", param_hint=option)


class Connection:
    """One server. Every call raises Unreachable where nobody answers, and Refused for an error of the server."""

    def __init__(self, url: str, key: str | None = None, *, key_option: str = "--api-key-file") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key_option = key_option
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(headers=headers, timeout=PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(
        self, method: str, path: str, body: Any = None, *, wait: bool = False, timeout: float = PATIENCE
    ) -> dict[str, Any]:
        """The answer's JSON object. `wait`: the server is asked to answer when it is over, however long that takes."""
        try:
            response = self._http.request(
                method,
                self.url + path,
                params={"wait": "true"} if wait else None,
                **({} if body is None else {"json": body}),
                timeout=httpx.Timeout(timeout, read=None) if wait else timeout,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise self._refused(response)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._stranger(response)
        return answer

    def models(self, *, timeout: float = PATIENCE) -> list[str]:
        """What can be asked for: the base first, each expert on it, presets."""
        return [str(entry["id"]) for entry in self.call("GET", "/v1/models", timeout=timeout)["data"]]

    @contextmanager
    def stream(self, path: str, body: Any, *, timeout: float) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a streamed answer, as they come. `timeout`: seconds of silence that are too many. Leaving the
        block before the last event closes the connection, which ends the request on the server."""
        begun = False
        limits = httpx.Timeout(timeout, connect=PATIENCE)
        try:
            with self._http.stream("POST", self.url + path, json=body, timeout=limits) as response:
                if not response.is_success:
                    response.read()
                    raise self._refused(response)
                if "text/event-stream" not in response.headers.get("content-type", ""):
                    raise self._stranger(response)
                begun = True
                yield self._events(response.iter_bytes())
        except httpx.ReadTimeout as error:
            raise Unreachable(f"{self.url} has said nothing for {timeout:g} seconds.") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if begun:
                raise self._broken_off() from error
            raise self._unreachable(error) from error

    def _events(self, pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
        for line in lines_of(pieces):
            if not line.startswith(b"data:"):
                continue  # comments that keep the connection open, and names of events
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise Unreachable(
                    f"{self.url} streams what is no JSON object; it must be a proxyserve server."
                )
            if "error" in event:
                raise _midway(event["error"])
            yield event
        raise self._broken_off()

    def _unreachable(self, error: Exception) -> Unreachable:
        # Some of httpx's errors have no message.
        return Unreachable(f"{self.url} cannot be reached: {str(error) or type(error).__name__}")

    def _broken_off(self) -> Unreachable:
        return Unreachable(f"{self.url} broke off in the middle of the answer.")

    def _stranger(self, response: httpx.Response) -> Unreachable:
        return Unreachable(
            f"{self.url} answers with status {response.status_code} and not as a proxyserve server does; see --url."
        )

    def _refused(self, response: httpx.Response) -> Refused | Unreachable:
        try:
            told = response.json()["error"]
            message, code, param = str(told["message"]), told.get("code"), told.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._stranger(response)
        status = response.status_code
        if status in (401, 403) and param is None:  # about the key, not about a field
            message += f" See {self._key_option}."
        return Refused(
            message,
            status=status,
            code=None if code is None else str(code),
            param=None if param is None else str(param),
            retry_after=_seconds(response.headers.get("retry-after")),
        )


def _midway(told: Any) -> Refused:
    """An answer that had begun ends with an error."""
    detail = told if isinstance(told, dict) else {}
    message = f"The server failed midway: {detail.get('message', told)}"
    return Refused(message, status=500, code=detail.get("code"), param=detail.get("param"))


def _seconds(header: str | None) -> float | None:
    """Our server writes seconds; a proxy before it might write a date, which is of no use here."""
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None


def lines_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines without their ends, whatever the pieces. Only a line feed ends one: text may hold other characters
    that some take for the end of a line, and characters may be cut by the ends of pieces."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
    if rest:
        yield rest
