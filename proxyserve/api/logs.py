"""The form of log lines. Whatever a line says, it stays one line and cannot look like another one: characters that
do not print are escaped."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from proxyserve.config import LogConfig


def configure_logging(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send every logger's lines to `stream` (standard error by default), in place of where they went. The level is that
    of proxyserve's own loggers; libraries, whose lines may hold anything, speak up from WARNING on, and the audit log,
    where it goes to a logger, is always written."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("proxyserve", "proxyserve_kernels"):
        logging.getLogger(name).setLevel(config.level.upper())
    logging.getLogger("proxyserve.audit").setLevel(logging.INFO)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: `time`, `level`, `logger`, `message`, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE KEY=VALUE…`, the time in UTC. Lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        words = [
            _time_of(record),
            record.levelname,
            f"{record.name}:",
            visible(record.getMessage()),
            *(f"{key}={_word(value)}" for key, value in _fields_of(record).items()),
        ]
        line = " ".join(words)
        if record.exc_info:
            traceback = self.formatException(record.exc_info).split("\n")
            line = "\n".join([line, *(f"    {visible(part)}" for part in traceback)])
        return line


def visible(text: str) -> str:
    """`text` with escapes in the place of characters that do not print: ends of lines, colours of a terminal, marks of
    the direction of writing."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _time_of(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, in milliseconds."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _word(value: Any) -> str:
    """A value that ends where the next space begins, or else is quoted."""
    if isinstance(value, Mapping):
        text = ",".join(f"{key}:{entry}" for key, entry in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ",".join(map(str, value))
    else:
        text = json.dumps(value) if isinstance(value, bool) else str(value)
    if text and text.isprintable() and not any(character in text for character in ' "=\\'):
        return text
    return visible(json.dumps(text, ensure_ascii=False))
