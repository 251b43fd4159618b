"""The errors that callers see.

Every refusal names the field it is about and says what to change. The HTTP layer maps each class to one
status code; the engine, the fusion rules and the loaders raise them without knowing of HTTP.
"""

from __future__ import annotations


class ProxyserveError(Exception):
    """Base of all errors raised on purpose by proxyserve."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


#: `InvalidRequest.code` where a request's own fields, or its grammar, leave no token that could come next.
NO_TOKEN_LEFT = "no_token_left"


class InvalidRequest(ProxyserveError):
    """A request that can never be served as it stands.

    `param` is the path of the offending field in the request body (for example `fusion.experts.qa`), or
    None where no single field is at fault. `code` is a short machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(InvalidRequest):
    """The request names a base, an expert or a preset that this server does not have."""

    def __init__(self, message: str, *, param: str | None = "model") -> None:
        super().__init__(message, param=param, code="model_not_found")


class Forbidden(InvalidRequest):
    """The request is well formed, and this caller may not make it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="forbidden")


class SwapConflict(ProxyserveError):
    """The change of an expert cannot begin now: another one is under way, or there is nothing to go back to. `code` is
    a short machine-readable reason."""

    def __init__(self, message: str, *, code: str = "swap_conflict") -> None:
        super().__init__(message)
        self.code = code


class NoRoom(SwapConflict):
    """The memory plan has no room for what is to be loaded; the message has the numbers."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="insufficient_memory")


class QueueFull(ProxyserveError):
    """Admission refused for now. `retry_after` is in seconds; `code` tells whose limit it is: `queue_full` (the
    server's), `key_limit` (what of the caller's may wait) or `rate_limit` (what the caller may use per minute)."""

    def __init__(self, message: str, *, retry_after: float, code: str = "queue_full") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code


class NotReady(ProxyserveError):
    """The server cannot take requests now (loading, draining or dead); the message says which."""


class ExpertParked(NotReady):
    """The request names an expert whose weights are on disk only; it can be served once they have been loaded."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Expert '{name}' is not in memory.")
        self.name = name


class UpstreamFailed(ProxyserveError):
    """The other server that runs the base gave no usable answer. `status` is that of its HTTP answer, None where there
    was none. The message holds nothing of the answer's body."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class LoadError(ProxyserveError):
    """A model, tokenizer or expert that cannot be served; the message says why and what to change."""


class RankLost(ProxyserveError):
    """A process that holds a part of the base is gone, or does not do what the others do. The server cannot go on."""
