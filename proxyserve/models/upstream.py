"""The client of another OpenAI-style server that gives top-k log-probs: a call per position, patient within a deadline.

Safe to use from many threads at once. What the other server writes into the body of a refusal is never repeated: it
may hold what is nobody's business here. The key goes into a header and nowhere else.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from proxyserve.errors import UpstreamFailed
from proxyserve.text.token_names import id_of_name

#: Most calls at once, and so most connections.
CONCURRENCY = 32

#: Tries after the first that got a passing failure: no connection, 429, or a 5xx that may be different next time.
_RETRIES = 4
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

#: An answer for one token is a few KiB. Reading more of it would only fill the memory.
_LARGEST_ANSWER = 4 * 2**20

#: JSON has no infinity: servers write -9999 for a token that cannot be.
_IMPOSSIBLE = -9000.0


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """Where a base is served and how it is asked. `url` is up to and with `/v1`; `tokenizer` a folder with the base's
    tokenizer; `model` its name there (None: the first that the server lists). `timeout` is in seconds for one token,
    retries included; `context` in tokens (None: what the server says, else 4096). `backoff` is the pause before the
    first retry, in seconds; each further one is twice as long."""

    url: str
    tokenizer: Path
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    top_k: int = 20
    timeout: float = 60.0
    context: int | None = None
    backoff: float = 0.2


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """What a server said of one position. `logprobs` maps the returned ids to natural log-probs; no other id has more
    than `bound`; `names` are how the server called all that it returned."""

    logprobs: Mapping[int, float]
    bound: float
    names: tuple[str, ...] = ()

    @property
    def unseen(self) -> float:
        """The probability of everything that was not returned."""
        return max(0.0, 1.0 - math.fsum(map(math.exp, self.logprobs.values())))


class UpstreamClient:
    """Talks to the server of `source`. `ids_by_text` maps names of tokens that only one id has to those ids; it is used
    where `by_id` is off, for a server that does not name tokens by id."""

    def __init__(
        self, source: RemoteSource, ids_by_text: Mapping[str, int], *, model: str = "", by_id: bool = True
    ) -> None:
        self.source = source
        self.model = model
        self.by_id = by_id
        self._ids_by_text = ids_by_text
        headers = {} if source.api_key is None else {"Authorization": f"Bearer {source.api_key}"}
        limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
        # Redirects are not followed: they could carry the key elsewhere.
        self._http = httpx.Client(base_url=source.url, headers=headers, limits=limits, follow_redirects=False)

    def models(self) -> list[Mapping[str, Any]]:
        """The entries of the server's list of models. Raises UpstreamFailed."""
        listing = self._ask("GET", "models", None, self.deadline())
        entries = listing.get("data") if isinstance(listing, dict) else None
        if not isinstance(entries, list):
            raise UpstreamFailed("The base's server has no list of models at /models.")
        return [entry for entry in entries if isinstance(entry, dict)]

    def deadline(self) -> float:
        """When a call that begins now must have its answer, by `time.monotonic`."""
        return time.monotonic() + self.source.timeout

    def top_logprobs(self, prompt: Sequence[int], deadline: float) -> TopLogprobs:
        """The likeliest tokens after `prompt`. Raises UpstreamFailed once it is sure that there is no answer."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.source.top_k,
        }
        if self.by_id:
            body["return_tokens_as_token_ids"] = True
        return self._parsed(self._ask("POST", "completions", body, deadline))

    def _parsed(self, answer: Any) -> TopLogprobs:
        try:
            logprobs = answer["choices"][0]["logprobs"]
            listed = {str(name): float(value) for name, value in logprobs["top_logprobs"][0].items()}
            chosen = str(logprobs["tokens"][0])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise UpstreamFailed("The base's server answered without log-probs of the next token.") from None
        listed = {name: value for name, value in listed.items() if value > _IMPOSSIBLE}  # drops NaN too
        if not listed:
            raise UpstreamFailed("The base's server answered without log-probs of the next token.")
        # The drawn token is listed even where it is not among the likeliest, and then bounds nothing.
        others = [value for name, value in listed.items() if name != chosen]
        bound = min(others or listed.values())
        found: dict[int, float] = {}
        for name, value in listed.items():
            token = id_of_name(name)
            if token is None and not self.by_id:
                token = self._ids_by_text.get(name)
            if token is None:
                bound = max(bound, value)  # some id has it, nobody knows which
            else:
                found[token] = value
        return TopLogprobs(found, bound, tuple(listed))

    # HTTP ----------------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: Any, deadline: float) -> Any:
        """The JSON of a 200 answer. Tries again after passing failures, as long as the deadline is not in the way."""
        pause = self.source.backoff
        for tries_left in range(_RETRIES, -1, -1):
            status, wait = None, None
            try:
                status, content, wait = self._once(method, path, body, deadline)
                if 200 <= status < 300:
                    return json.loads(content)
                problem = f"answered {status}"
            except (httpx.TimeoutException, TimeoutError):
                problem = f"did not answer within {self.source.timeout:g} s"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = f"cannot be reached ({type(error).__name__})"
            except (ValueError, RecursionError):
                raise UpstreamFailed(
                    "The base's server answered with something that cannot be read.", status=status
                ) from None
            if status is not None and status not in _PASSING:
                break
            rest = pause * random.uniform(0.75, 1.25) if wait is None else wait
            if tries_left == 0 or time.monotonic() + rest >= deadline:
                if wait is not None:
                    problem += f" and asked to wait {wait:g} s"
                break
            time.sleep(rest)
            pause *= 2
        raise UpstreamFailed(f"The base's server {problem}.", status=status)

    def _once(self, method: str, path: str, body: Any, deadline: float) -> tuple[int, bytes, float | None]:
        """Status, body and seconds to wait by the answer's Retry-After. Raises httpx.HTTPError and TimeoutError."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        # httpx's limits are per read: a server that sends a byte now and then would hold a thread for ever.
        with self._http.stream(method, path, json=body, timeout=left) as response:
            content = bytearray()
            if response.is_success:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    if len(content) > _LARGEST_ANSWER:
                        raise ValueError("too long to be read")
            return response.status_code, bytes(content), _retry_after(response.headers.get("retry-after"))


def _retry_after(header: str | None) -> float | None:
    """Seconds; the header holds them or a date. None where it holds neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
