"""Which places experts may be loaded from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from proxyserve.errors import Forbidden, InvalidRequest

_HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Roots:
    """Folders that sources must lie in once all links have been followed. `fetch` brings a hub id into a local folder,
    None where the operator has not allowed that."""

    def __init__(self, folders: Iterable[Path] = (), fetch: Callable[[str], Path] | None = None) -> None:
        self.folders: Sequence[Path] = tuple(folder.expanduser().resolve() for folder in folders)
        self._fetch = fetch

    def is_hub_id(self, text: str) -> bool:
        """Whether `find` would have to ask the hub, which can take long."""
        return self._fetch is not None and _HUB_ID.fullmatch(text) is not None and self._local(text) is None

    def find(self, text: str) -> Path:
        """The folder or file that a source's `path` means: absolute, or relative to one of the folders; else a hub id.
        Raises Forbidden for what lies outside, also through a link, InvalidRequest for what is not there, and LoadError
        if the hub does not have it. Whether a path outside exists is never said."""
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise InvalidRequest("The path is no Unicode text.", param="path") from None
        if "\0" in text:
            raise InvalidRequest("A path cannot hold a NUL character.", param="path")
        local = self._local(text)
        if local is not None:
            return local
        if self._fetch is not None and _HUB_ID.fullmatch(text):
            return self._fetch(text)
        if not self.folders:
            raise Forbidden(
                "This server loads no experts from paths; start it with --expert-root FOLDER.", param="path"
            )
        if not any(_inside(folder, text) for folder in self.folders):
            raise Forbidden(
                "The path is outside of the folders that experts may come from (--expert-root).", param="path"
            )
        raise InvalidRequest("There is no such folder or file under --expert-root.", param="path")

    def _local(self, text: str) -> Path | None:
        for folder in self.folders:
            candidate = _inside(folder, text)
            if candidate is not None and os.path.exists(candidate):  # noqa: PTH110 (see `_real`)
                return candidate
        return None

    def check(self, path: Path, files: Iterable[Path]) -> None:
        """Raise Forbidden unless the files of a source at `path` lie in a root themselves, whatever links lead to them.
        A hub download, which is not under a root, is made of links and has been checked as it came."""
        if not self._inside(path):
            return
        for file in files:
            real = _real(file)
            if real is None or not self._inside(real):
                raise Forbidden(
                    f"'{file.name}' is a link that leaves the folders that experts may come from (--expert-root).",
                    param="path",
                )

    def _inside(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.folders)


def _inside(folder: Path, text: str) -> Path | None:
    """Where `text` leads from `folder`, whether there is anything or not; None if that is outside of it."""
    real = _real(folder / text)
    return real if real is not None and real.is_relative_to(folder) else None


def _real(path: Path) -> Path | None:
    """Where links lead; None where a circle of them hides that. Unlike `Path.resolve` it raises nothing, be it for a
    circle or for a name that is too long."""
    real = os.path.realpath(path)
    # Behind a circle nothing is resolved any more: `circle/../link` comes back as `link`.
    return Path(real) if os.path.realpath(real) == real else None
