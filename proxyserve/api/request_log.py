"""One line in the log for each request that is over. Never text of prompts or answers, keys, or headers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from proxyserve.api.playground import FOLDER
from proxyserve.api.record import RequestRecord, Work

logger = logging.getLogger("proxyserve.requests")

#: Routes that machines ask all the time; that all is well is worth a line to debug only. So it is for the playground's
#: files, of which one look at the page takes dozens.
_PROBES = frozenset({"/health", "/ready", "/version", "/metrics"})

#: Names that clients invent are cut here.
_LONGEST_NAME = 100

#: Refused requests cost a client nothing. Above this many lines a second, after a burst, they are only counted.
_REFUSALS_PER_SECOND = 20.0
_REFUSALS_AT_ONCE = 100


class RequestLog:
    """Writes to the logger `proxyserve.requests`, at a level by how the request ended; fields go in the log record's
    `fields`, which `logs` formats."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._allowed = float(_REFUSALS_AT_ONCE)
        self._refilled = clock()
        self._left_out = 0

    def write(self, record: RequestRecord) -> None:
        level = _level(record)
        if not logger.isEnabledFor(level):
            return
        more: dict[str, Any] = {}
        if 400 <= (record.status or 0) < 499:
            if not self._may_write():
                self._left_out += 1
                return
            if self._left_out:
                more["not_logged"], self._left_out = self._left_out, 0
        fields = {name: value for name, value in {**_fields(record), **more}.items() if value is not None}
        logger.log(level, "request", extra={"fields": fields})

    def _may_write(self) -> bool:
        now = self._clock()
        refill = (now - self._refilled) * _REFUSALS_PER_SECOND
        self._allowed, self._refilled = min(_REFUSALS_AT_ONCE, self._allowed + refill), now
        if self._allowed < 1.0:
            return False
        self._allowed -= 1.0
        return True


def _level(record: RequestRecord) -> int:
    status = record.status
    if status is None or status == 500 or record.error == "internal":
        return logging.ERROR
    routine = record.route in _PROBES or (record.route or "").startswith(FOLDER)
    if routine and (status < 400 or record.route == "/ready"):
        return logging.DEBUG
    failed_midway = status < 400 and record.error is not None
    return logging.WARNING if status > 500 or failed_midway else logging.INFO


def _fields(record: RequestRecord) -> Mapping[str, Any]:
    """None where there is nothing to say."""
    return {
        "method": record.method,
        "route": record.route,
        "path": record.path[:_LONGEST_NAME] if record.route is None else None,
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "key": record.key or None,
        "status": record.status,
        "error": record.error,
        "disconnected": True if record.disconnected else None,
        "seconds": round(record.seconds, 6),
        "first_token_seconds": _rounded(record.first_token_seconds),
        "model": None if record.model is None else record.model[:_LONGEST_NAME],
        "stream": True if record.stream else None,
        **({} if record.work is None else _work(record.work)),
        "metadata": {key[:64]: value[:_LONGEST_NAME] for key, value in [*record.metadata.items()][:16]}
        or None,
    }


def _work(work: Work) -> Mapping[str, Any]:
    timing = work.timing
    return {
        "rule": work.rule,
        "experts": dict(work.generations) or None,
        "choices": work.choices,
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "queue_seconds": None if timing is None else _rounded(timing.queue_seconds),
        "prefill_seconds": None if timing is None else _rounded(timing.prefill_seconds),
        "decode_seconds": None if timing is None else _rounded(timing.decode_seconds),
        "mean_kl": _rounded(work.mean_kl),
        "flips": work.flips,
        "drafted": work.drafted,
        "accepted": work.accepted,
        "finish_reasons": [reason.value for reason in work.finish_reasons] or None,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
