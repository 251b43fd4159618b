"""The keys that a server accepts at this moment, and how they change while it runs."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from proxyserve.api.errors import StartupError
from proxyserve.api.keys import KeyFile, KeyRecord, Role, digest_of, read_key_file
from proxyserve.config import ServerConfig
from proxyserve.engine.caller import Caller

logger = logging.getLogger("proxyserve.api")


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that was recognised. `expires` is None for one that does not."""

    digest: bytes
    caller: Caller
    expires: datetime | None

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires


class KeyRing:
    """Keys by their SHA-256 digests; the keys themselves are not kept. Immutable."""

    def __init__(self, records: Iterable[KeyRecord] = ()) -> None:
        """Raises StartupError if a key or a name is there twice. A key that stands in plain files of both roles is an
        administrator's."""
        known: dict[bytes, KnownKey] = {}
        owner: dict[str, bytes] = {}
        for record in records:
            key = KnownKey(record.digest, record.caller(), record.expires)
            other = known.get(key.digest)
            if other is not None and other.caller.name != record.name:
                raise StartupError(f"The keys '{other.caller.name}' and '{record.name}' are the same key.")
            if owner.setdefault(record.name, key.digest) != key.digest:
                raise StartupError(f"There are two keys with the name '{record.name}'; name them apart.")
            if other is None or not other.caller.admin:
                known[key.digest] = key
        self._keys = tuple(known.values())

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def admins(self) -> int:
        """How many of the keys are administrators'."""
        return sum(key.caller.admin for key in self._keys)

    def match(self, presented: str) -> KnownKey | None:
        """The key if this ring has it. The time taken does not tell which one came near."""
        digest = digest_of(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


class Keys:
    """The ring of a server's key files, read again when they change. `ring` is replaced as a whole."""

    def __init__(self, files: Sequence[tuple[Path, Role]] = ()) -> None:
        """Raises StartupError for an unusable file."""
        self._files = tuple(files)
        self._seen = self._signatures()
        self.ring, self.plain = self._read()

    @classmethod
    def of(cls, config: ServerConfig) -> Keys:
        given: list[tuple[Path | None, Role]] = [
            (config.api_key_file, "user"),
            (config.admin_key_file, "admin"),
        ]
        return cls([(path, role) for path, role in given if path is not None])

    @property
    def required(self) -> bool:
        """Whether this server has keys at all; without any, whoever can connect is the operator."""
        return bool(self._files)

    @property
    def warnings(self) -> Sequence[str]:
        """What the operator should change."""
        return [
            f"{file.path} has keys that are not hashed (line {', '.join(map(str, file.plain))}): whoever reads it "
            "can use them; replace each with what `proxyserve keys hash` makes of it"
            for file in self.plain
        ]

    def refresh(self) -> bool:
        """Read the files again if one has changed since. Files that cannot be used leave the keys as they are, which
        is logged; the next change is a new attempt. Whether the ring was replaced."""
        signatures = self._signatures()
        if signatures == self._seen:
            return False
        self._seen = signatures
        try:
            self.ring, self.plain = self._read()
        except StartupError as error:
            logger.error(
                "the key files have changed and cannot be used, the keys from before stay: %s", error
            )
            return False
        logger.warning(
            "the key files have changed: %d keys, %d of administrators", len(self.ring), self.ring.admins
        )
        return True

    def _read(self) -> tuple[KeyRing, Sequence[KeyFile]]:
        """The ring, and the files that have plain keys."""
        files = [read_key_file(path, role) for path, role in self._files]
        return KeyRing(record for file in files for record in file.records), [f for f in files if f.plain]

    def _signatures(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file does; None for one that is not there."""
        return [_signature(path) for path, _ in self._files]


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
