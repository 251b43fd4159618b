"""A request to a route that the `openai` package has no method for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import openai


@dataclass(frozen=True, slots=True)
class Call:
    """`path` is from the server's root. `once`: never send it again by itself. `wait`: the answer is to come when the
    change is done. `timeout` is in seconds, None for the client's own."""

    method: str
    path: str
    body: Any = None
    once: bool = False
    wait: bool = False
    timeout: float | None = None

    def send(self, client: openai.OpenAI | openai.AsyncOpenAI, root: str) -> Any:
        """The JSON of the answer, or for an async client what gives it when awaited."""
        if self.once:
            client = client.with_options(max_retries=0)
        options: dict[str, Any] = {}
        if self.wait:
            options["params"] = {"wait": "true"}
        if self.timeout is not None:
            options["timeout"] = self.timeout
        body = {} if self.body is None else {"body": self.body}
        return getattr(client, self.method)(f"{root}{self.path}", cast_to=object, options=options, **body)
