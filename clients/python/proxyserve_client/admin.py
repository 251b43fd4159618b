"""The control plane of a server, for administrators' keys: `client.experts`, `client.presets` and `client.drain()`.

A change is sent once and never again by itself: whether it arrived is for the caller to look up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from os import PathLike, fspath
from typing import Any
from urllib.parse import quote

import openai

from proxyserve_client.call import Call
from proxyserve_client.experts import Expert, ExpertGeneration, Followed, Source
from proxyserve_client.fusion import Fusion

#: A source, or its path or hub id alone.
AnySource = str | PathLike[str] | Source


class Experts:
    """The experts of a server. Changes return once they are done: `put` and `rollback` when the generation serves,
    `delete` when the last request that runs on the expert has ended; with `wait=False` as soon as they have begun. A
    generation that fails raises `openai.BadRequestError` with code `load_failed`, and what served goes on serving. A
    wait that ends early (`openai.APITimeoutError`) leaves the change alone."""

    def __init__(self, client: openai.OpenAI, root: str) -> None:
        self._client = client
        self._root = root

    def list(self) -> tuple[Expert, ...]:
        """All of them, by name."""
        return _experts(list_experts().send(self._client, self._root))

    def get(self, name: str) -> Expert:
        return Expert.of(get_expert(name).send(self._client, self._root))

    def put(
        self,
        name: str,
        tuned: AnySource,
        untuned: AnySource | None = None,
        *,
        protected: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Expert:
        """Load a new expert, or a new generation of one. Without `untuned` it is the model that `tuned` changes, none
        if that is a whole model. Only administrators may give a `protected` expert negative weights."""
        call = put_expert(name, tuned, untuned, protected, wait, timeout)
        return _changed(call.send(self._client, self._root))

    def follow(self, name: str, *, every: float = 0.25) -> Iterator[ExpertGeneration]:
        """The generation that is on its way, at each look at it until it serves. Raises GenerationFailed if it cannot,
        and what served goes on serving. For changes that were not waited for: `put(..., wait=False)`."""
        followed = Followed(name)
        while True:
            yield followed.look(self.get(name))
            if followed.settled:
                return
            time.sleep(every)

    def rollback(self, name: str, *, wait: bool = True, timeout: float | None = None) -> Expert:
        """Give new requests the previous generation again."""
        return _changed(rollback_expert(name, wait, timeout).send(self._client, self._root))

    def delete(self, name: str, *, wait: bool = True, timeout: float | None = None) -> None:
        """Take an expert away."""
        delete_expert(name, wait, timeout).send(self._client, self._root)


class AsyncExperts:
    """`Experts` for asyncio."""

    def __init__(self, client: openai.AsyncOpenAI, root: str) -> None:
        self._client = client
        self._root = root

    async def list(self) -> tuple[Expert, ...]:
        """All of them, by name."""
        return _experts(await list_experts().send(self._client, self._root))

    async def get(self, name: str) -> Expert:
        return Expert.of(await get_expert(name).send(self._client, self._root))

    async def put(
        self,
        name: str,
        tuned: AnySource,
        untuned: AnySource | None = None,
        *,
        protected: bool = False,
        wait: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109  the same as in Experts
    ) -> Expert:
        """Load a new expert, or a new generation of one. Without `untuned` it is the model that `tuned` changes, none
        if that is a whole model. Only administrators may give a `protected` expert negative weights."""
        call = put_expert(name, tuned, untuned, protected, wait, timeout)
        return _changed(await call.send(self._client, self._root))

    async def follow(self, name: str, *, every: float = 0.25) -> AsyncIterator[ExpertGeneration]:
        """The generation that is on its way, at each look at it until it serves. Raises GenerationFailed if it cannot,
        and what served goes on serving. For changes that were not waited for: `put(..., wait=False)`."""
        followed = Followed(name)
        while True:
            yield followed.look(await self.get(name))
            if followed.settled:
                return
            await asyncio.sleep(every)

    async def rollback(
        self,
        name: str,
        *,
        wait: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109  the same as in Experts
    ) -> Expert:
        """Give new requests the previous generation again."""
        return _changed(await rollback_expert(name, wait, timeout).send(self._client, self._root))

    async def delete(
        self,
        name: str,
        *,
        wait: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109  the same as in Experts
    ) -> None:
        """Take an expert away."""
        await delete_expert(name, wait, timeout).send(self._client, self._root)


class Presets:
    """The presets of a server: fusions with names, callable as models."""

    def __init__(self, client: openai.OpenAI, root: str) -> None:
        self._client = client
        self._root = root

    def list(self) -> Mapping[str, Mapping[str, Any]]:
        """The fusion object of each, by name."""
        return _presets(list_presets().send(self._client, self._root))

    def get(self, name: str) -> Mapping[str, Any]:
        """The fusion object."""
        return _fusion(get_preset(name).send(self._client, self._root))

    def put(self, name: str, fusion: Fusion | Mapping[str, Any]) -> None:
        """Save a fusion; an older preset of that name is replaced."""
        put_preset(name, fusion).send(self._client, self._root)

    def delete(self, name: str) -> None:
        delete_preset(name).send(self._client, self._root)


class AsyncPresets:
    """`Presets` for asyncio."""

    def __init__(self, client: openai.AsyncOpenAI, root: str) -> None:
        self._client = client
        self._root = root

    async def list(self) -> Mapping[str, Mapping[str, Any]]:
        """The fusion object of each, by name."""
        return _presets(await list_presets().send(self._client, self._root))

    async def get(self, name: str) -> Mapping[str, Any]:
        """The fusion object."""
        return _fusion(await get_preset(name).send(self._client, self._root))

    async def put(self, name: str, fusion: Fusion | Mapping[str, Any]) -> None:
        """Save a fusion; an older preset of that name is replaced."""
        await put_preset(name, fusion).send(self._client, self._root)

    async def delete(self, name: str) -> None:
        await delete_preset(name).send(self._client, self._root)


def list_experts() -> Call:
    return _look("/experts")


def get_expert(name: str) -> Call:
    return _look(f"/experts/{_in_path(name)}")


def put_expert(
    name: str,
    tuned: AnySource,
    untuned: AnySource | None,
    protected: bool,
    wait: bool,
    timeout: float | None,
) -> Call:
    body: dict[str, Any] = {"tuned": _source(tuned), "protected": protected}
    if untuned is not None:
        body["untuned"] = _source(untuned)
    return _change("put", f"/experts/{_in_path(name)}", body, wait, timeout)


def rollback_expert(name: str, wait: bool, timeout: float | None) -> Call:
    return _change("post", f"/experts/{_in_path(name)}/rollback", None, wait, timeout)


def delete_expert(name: str, wait: bool, timeout: float | None) -> Call:
    return _change("delete", f"/experts/{_in_path(name)}", None, wait, timeout)


def list_presets() -> Call:
    return _look("/presets")


def get_preset(name: str) -> Call:
    return _look(f"/presets/{_in_path(name)}")


def put_preset(name: str, fusion: Fusion | Mapping[str, Any]) -> Call:
    body = fusion.to_dict() if isinstance(fusion, Fusion) else dict(fusion)
    return _change("put", f"/presets/{_in_path(name)}", body)


def delete_preset(name: str) -> Call:
    return _change("delete", f"/presets/{_in_path(name)}")


def drain_server() -> Call:
    return _change("post", "/drain")


def _look(path: str) -> Call:
    return Call("get", f"/admin/v1{path}")


def _change(
    method: str, path: str, body: Any = None, wait: bool = False, timeout: float | None = None
) -> Call:
    return Call(method, f"/admin/v1{path}", body, once=True, wait=wait, timeout=timeout)


def _in_path(name: str) -> str:
    """Raises ValueError for names that would be another path."""
    if name in ("", ".", ".."):
        raise ValueError(f"'{name}' cannot be a name")
    return quote(name, safe="")


def _source(source: AnySource) -> str | dict[str, Any]:
    return source.to_json() if isinstance(source, Source) else fspath(source)


def _experts(answer: Mapping[str, Any]) -> tuple[Expert, ...]:
    return tuple(map(Expert.of, answer["data"]))


def _changed(answer: Mapping[str, Any]) -> Expert:
    """The expert after a change (200), or as it is now that one has begun (202)."""
    return Expert.of(answer.get("status") or answer)


def _presets(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {entry["name"]: entry["fusion"] for entry in answer["data"]}


def _fusion(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    fusion: Mapping[str, Any] = answer["fusion"]
    return fusion
