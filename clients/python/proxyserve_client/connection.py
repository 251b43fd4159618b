"""Where a server is and whether it can serve: what the sync and the async client share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import openai

DEFAULT_URL = "http://127.0.0.1:8000"

#: The environment variable that holds the key of a server that wants one.
KEY_VARIABLE = "PROXYSERVE_API_KEY"


def server_root(url: str) -> str:
    """The server's address without `/v1`, which other OpenAI clients want and this one adds itself."""
    return url.rstrip("/").removesuffix("/v1")


def settings(root: str, api_key: str | None, timeout: float | None, max_retries: int) -> dict[str, Any]:
    """Arguments for the client class of the `openai` package. It insists on a key, and without one it would send the
    OPENAI_API_KEY of the environment to this server, which has no business seeing it."""
    return {
        "base_url": f"{root}/v1",
        "api_key": api_key or os.environ.get(KEY_VARIABLE) or "no-key",
        "timeout": openai.NOT_GIVEN if timeout is None else timeout,
        "max_retries": max_retries,
    }


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the server takes requests; `reason` says why not. It is true or false like its `ready`."""

    ready: bool
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.ready


def not_ready(error: openai.APIError) -> Readiness:
    """What a failed question to `/ready` says. A refusal of another kind than 503 is raised again: waiting would not
    help."""
    if isinstance(error, openai.APIStatusError) and error.status_code != 503:
        raise error
    body = error.body if isinstance(error.body, dict) else {}
    return Readiness(False, body.get("reason") or body.get("status") or error.message)
