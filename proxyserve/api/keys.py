"""Key files: who has a key, what it allows, and how keys are made. Files hold digests of keys; a key itself is shown
once, when it is made."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from proxyserve.api.errors import StartupError, field_path
from proxyserve.engine.caller import Caller, CallerLimits

Role = Literal["user", "admin", "monitor"]

#: 256 random bits: nobody finds a key by trying, so that one round of SHA-256 is enough to hide it.
_KEY_BYTES = 32
_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"

#: How files with records are read; all others have a key per line.
_READERS: Mapping[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


def _bare(value: Any) -> Any:
    """`sha256:HEX`, which files with a key per line have, is HEX as well."""
    return value.removeprefix("sha256:").lower() if isinstance(value, str) else value


def _moment(value: Any) -> Any:
    """YAML and TOML know dates, JSON has them as text. A day without a time is its beginning."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    return value


def _in_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


_Limit = Annotated[int, Field(ge=1)]


class KeyRecord(BaseModel):
    """One key: its digest, whose it is, and what it allows. A limit that is not given is the server's.

    `experts` are the experts it may use; without them, all. `explain`: may ask for explanations, or may not; without
    it the server's policy says. `priority` is that of requests that do not say, and the lowest (that is, first served)
    they may ask for. After `expires` (UTC unless it says otherwise) the key is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    sha256: Annotated[str, BeforeValidator(_bare), Field(pattern="^[0-9a-f]{64}$")]
    role: Role = "user"
    experts: tuple[str, ...] | None = Field(None, strict=False)
    explain: bool | None = None
    max_logprobs: Annotated[int, Field(ge=0)] | None = None
    max_running: _Limit | None = None
    max_waiting_requests: _Limit | None = None
    max_waiting_tokens: _Limit | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    priority: int = 0
    expires: Annotated[datetime, BeforeValidator(_moment), AfterValidator(_in_utc)] | None = None

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)

    def caller(self) -> Caller:
        return Caller(
            name=self.name,
            admin=self.role == "admin",
            monitor=self.role == "monitor",
            experts=None if self.experts is None else frozenset(self.experts),
            explain=self.explain,
            priority=self.priority,
            limits=CallerLimits(
                running=self.max_running,
                waiting_requests=self.max_waiting_requests,
                waiting_tokens=self.max_waiting_tokens,
                requests_per_minute=self.requests_per_minute,
                tokens_per_minute=self.tokens_per_minute,
                logprobs=self.max_logprobs,
            ),
        )


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What a key file says. `plain` are the numbers of lines with a key that is not hashed."""

    path: Path
    records: Sequence[KeyRecord]
    plain: Sequence[int] = ()


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(_KEY_BYTES)}"


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def line_name(digest: bytes) -> str:
    """What a key is called that stands in a file of lines, where it has no name."""
    return f"key:{digest.hex()[:12]}"


def read_key_file(path: Path, role: Role) -> KeyFile:
    """Read a key file. With the suffix .yaml, .toml or .json it holds `keys`, a list of `KeyRecord`s, which are of
    `role` where they do not say; else it has one key per line, in plain or as `sha256:HEX`, all of `role`, and blank
    lines and lines that begin with `#` do not count. Raises StartupError for a file without keys, or with a bad one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"The key file {path} cannot be read: {error}") from error
    reader = _READERS.get(path.suffix.lower())
    file = _read_lines(path, text, role) if reader is None else _read_records(path, text, role, reader)
    if not file.records:
        raise StartupError(f"The key file {path} has no keys; add one, or start without a key file.")
    return file


def _read_lines(path: Path, text: str, role: Role) -> KeyFile:
    records: dict[bytes, KeyRecord] = {}
    plain = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        digest = _digest_of_line(line, f"{path}:{number}")
        if not line.startswith("sha256:"):
            plain.append(number)
        # The name, which has a colon, is none that a record could have, so that the two never meet.
        records[digest] = KeyRecord.model_construct(name=line_name(digest), sha256=digest.hex(), role=role)
    return KeyFile(path, tuple(records.values()), tuple(plain))


def _digest_of_line(line: str, where: str) -> bytes:
    if line.startswith("sha256:"):
        match = _SHA256.fullmatch(line)
        if match is None:
            raise StartupError(f"{where}: 'sha256:' must be followed by 64 hexadecimal digits.")
        return bytes.fromhex(match[1])
    if not line.isascii() or not line.isprintable() or " " in line:
        raise StartupError(f"{where}: a key is one word of ASCII characters; give one key per line.")
    return digest_of(line)


def _read_records(path: Path, text: str, role: Role, reader: Callable[[str], Any]) -> KeyFile:
    """What a bad file holds is not repeated in errors: it could be a key."""
    try:
        document = reader(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise StartupError(f"The key file {path} is no {path.suffix[1:].upper()}.") from error
    if not isinstance(document, dict) or set(document) != {"keys"} or not isinstance(document["keys"], list):
        raise StartupError(f"The key file {path} must hold 'keys', a list of records, and nothing else.")
    records: list[KeyRecord] = []
    for number, entry in enumerate(document["keys"]):
        given = {"role": role, **entry} if isinstance(entry, dict) else entry
        try:
            records.append(KeyRecord.model_validate(given))
        except ValidationError as error:
            first = error.errors()[0]
            where = field_path(("keys", number, *first["loc"]))
            raise StartupError(f"The key file {path}: '{where}': {first['msg']}.") from None
    return KeyFile(path, tuple(records))
