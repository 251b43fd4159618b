"""Exit codes of the `proxyserve` command, and how errors are told: a line for people, an object for `--json`."""

from __future__ import annotations

import json
from typing import Any

from proxyserve.errors import InvalidRequest, ProxyserveError

#: The command could not do what was asked: a broken file, models that do not match, a check that failed.
FAILED = 1
#: The command line itself is wrong; nothing was done.
USAGE = 2
#: No server answers there, or it broke off.
UNREACHABLE = 3
#: The server answered, and refuses.
REFUSED = 4
#: Ctrl-C, as shells have it: 128 and the number of the signal.
INTERRUPTED = 130


class Unreachable(ProxyserveError):
    """No proxyserve server answers at the address, or it ended in the middle of an answer."""


class Refused(ProxyserveError):
    """The server answered with an error. `code` is its short reason and `param` the field at fault, None where it named
    none; `retry_after` is in seconds, None where it did not ask to wait."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def unknown_name(self) -> bool:
        """Whether there is nothing of the name that was asked for."""
        return self.status == 404 and self.code == "model_not_found"


def exit_code(error: ProxyserveError) -> int:
    """What the process ends with."""
    if isinstance(error, Unreachable):
        return UNREACHABLE
    return REFUSED if isinstance(error, Refused) else FAILED


def as_json(error: ProxyserveError) -> str:
    """The one document that `--json` prints instead of a result."""
    more: dict[str, Any] = {}
    if isinstance(error, Refused):
        kind = "refused"
        more = {"status": error.status, "retry_after": error.retry_after}
    else:
        kind = "unreachable" if isinstance(error, Unreachable) else "failed"
    if isinstance(error, Refused | InvalidRequest):
        more |= {"param": error.param, "code": error.code}
    return error_document(error.message, kind, **more)


def error_document(message: str, kind: str, **more: Any) -> str:
    """`{"error": {"message": ..., "type": ...}}`; fields that are None are left out."""
    named = {name: value for name, value in more.items() if value is not None}
    return json.dumps({"error": {"message": message, "type": kind, **named}}, ensure_ascii=False)
