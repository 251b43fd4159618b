"""The requests that are being answered, by the ids that clients know them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from proxyserve.engine.caller import Caller
from proxyserve.errors import ProxyserveError


class RequestCancelled(ProxyserveError):
    """Somebody has cancelled the request by its id."""

    def __init__(self) -> None:
        super().__init__("The request was cancelled by its id.")


@dataclass(eq=False)
class Running:
    """One request. `end` ends it early, with an error for whoever waits for the answer."""

    caller: Caller
    end: Callable[[ProxyserveError], None]
    ids: set[str] = field(default_factory=set)


class RunningRequests:
    """A request has the id that its client sent or was given (`x-request-id`), which need not be unique, and the `id`
    of its answer."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[Running]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, running: Running, request_id: str) -> None:
        """Also under a further id. `remove` undoes all of it."""
        if request_id not in running.ids:
            running.ids.add(request_id)
            self._by_id.setdefault(request_id, []).append(running)

    def remove(self, running: Running) -> None:
        """Safe to call more than once."""
        for request_id in running.ids:
            self._by_id[request_id].remove(running)
            if not self._by_id[request_id]:
                del self._by_id[request_id]
        running.ids.clear()

    def cancel(self, request_id: str, caller: Caller) -> int:
        """End the caller's requests with that id, or anybody's for an administrator. Returns how many there were."""
        found = [
            running
            for running in self._by_id.get(request_id, ())
            if caller.admin or running.caller.name == caller.name
        ]
        for running in found:
            running.end(RequestCancelled())
        return len(found)
