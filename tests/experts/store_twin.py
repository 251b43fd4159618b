"""The state store in plain dicts, and calls of either as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxyserve.errors import SwapConflict, UnknownModel
from proxyserve.experts.source import ExpertSpec
from proxyserve.experts.store import Restored, StateStore, StoredExpert, StoredGeneration


@dataclass
class Twin:
    last: dict[str, int] = field(default_factory=dict)
    history: dict[str, list[StoredGeneration]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    loads: set[tuple[str, int]] = field(default_factory=set)
    presets: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def restore(self) -> Restored:
        """`dropped` has only the beginnings of its messages."""
        dropped = tuple(
            f"the load of generation {generation} of expert '{expert}' was not finished"
            for expert, generation in sorted(self.loads)
        )
        self.loads.clear()
        return Restored(
            tuple(self.stored(name) for name in sorted(self.history)),
            dict(self.presets),
            {name: origin for name, origin in self.origins.items() if name not in self.history},
            dropped,
            dict(self.errors),
        )

    def stored(self, name: str) -> StoredExpert:
        before, published = [None, *self.history[name]][-2:]
        assert published is not None
        return StoredExpert(name, published, before, self.origins.get(name))

    def next_generation(self, expert: str) -> int:
        self.last[expert] = self.last.get(expert, 0) + 1
        return self.last[expert]

    def begin(self, expert: str, generation: int, spec: ExpertSpec) -> None:
        self.require_reserved(expert, generation)
        self.loads.add((expert, generation))

    def fail(self, expert: str, generation: int, error: str) -> None:
        self.loads.discard((expert, generation))
        if expert in self.last:
            self.errors[expert] = error

    def publish(self, stored: StoredGeneration, *, origin: str | None = None) -> None:
        expert = stored.expert
        self.require_reserved(expert, stored.generation)
        history = self.history.get(expert, [])
        if history and stored.generation < history[-1].generation:
            raise ValueError("older than what serves")
        if history and stored.generation == history[-1].generation:
            history = history[:-1]
        self.history[expert] = [*history, stored][-2:]
        self.loads.discard((expert, stored.generation))
        self.errors.pop(expert, None)
        if origin is not None:
            self.origins[expert] = origin

    def roll_back(self, expert: str) -> StoredExpert:
        if expert not in self.history:
            raise UnknownModel("")
        if len(self.history[expert]) < 2:
            raise SwapConflict("")
        del self.history[expert][1]
        return self.stored(expert)

    def delete(self, expert: str) -> None:
        self.history.pop(expert, None)
        self.errors.pop(expert, None)

    def put_preset(self, name: str, value: Mapping[str, Any]) -> None:
        self.presets[name] = value

    def delete_preset(self, name: str) -> None:
        self.presets.pop(name, None)

    def require_reserved(self, expert: str, generation: int) -> None:
        if not 1 <= generation <= self.last.get(expert, 0):
            raise ValueError("never reserved")


def without_specs(restored: Restored) -> Restored:
    """With the messages of `dropped` as the twin has them."""
    dropped = tuple(message.split(";")[0] for message in restored.dropped)
    return Restored(restored.experts, restored.presets, restored.deleted, dropped, dict(restored.last_errors))


def perform(target: StateStore | Twin, method: str, arguments: Mapping[str, Any]) -> Any:
    """A call whose arguments are JSON values. The result as one: an error is its name, an expert its `repr`."""
    given: dict[str, Any] = dict(arguments)
    if method == "publish":
        origin = given.pop("origin")
        given["spec"] = ExpertSpec.of_json(given["spec"])
        given = {"stored": StoredGeneration(**given), "origin": origin}
    elif "spec" in given:
        given["spec"] = ExpertSpec.of_json(given["spec"])
    try:
        result = getattr(target, method)(**given)
    except (SwapConflict, UnknownModel, ValueError) as error:
        return type(error).__name__
    return repr(result) if isinstance(result, StoredExpert) else result
