"""How long a request may take in all: what it asks for itself, at most what the server allows."""

from __future__ import annotations

import time

from fastapi import Request

from proxyserve.api.state import server_state
from proxyserve.errors import InvalidRequest, ProxyserveError


class DeadlineExceeded(ProxyserveError):
    """The request's time is over and its answer is not complete."""

    def __init__(self) -> None:
        super().__init__("The request's time is over before its answer was complete; what it had is lost.")


def set_deadline(request: Request, timeout: float | None) -> None:
    """Start the clock, which counts from the request's arrival; `timeout` is in seconds. Raises InvalidRequest."""
    most = server_state(request).config.request_timeout
    if timeout is not None and most is not None and timeout > most:
        raise InvalidRequest(
            f"A timeout of {timeout:g} seconds is asked for; this server allows {most:g}.", param="timeout"
        )
    seconds = most if timeout is None else timeout
    request.state.deadline = None if seconds is None else request.state.arrived + seconds


def seconds_left(request: Request) -> float | None:
    """Until the deadline, None without one. Raises DeadlineExceeded if it has passed."""
    deadline: float | None = getattr(request.state, "deadline", None)
    if deadline is None:
        return None
    left = deadline - time.perf_counter()
    if left <= 0:
        raise DeadlineExceeded
    return left
