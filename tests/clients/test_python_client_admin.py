"""The Python client and the control plane's routes: what one sends, the other understands, and back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from proxyserve.errors import NoRoom
from proxyserve.experts.generation import Phase
from proxyserve.experts.source import ExpertSpec, LayerScale
from proxyserve.experts.source import Source as ServedSource
from proxyserve.experts.status import ExpertStatus
from proxyserve_client import (
    AsyncProxyServe,
    Expert,
    ExpertGeneration,
    Fusion,
    GenerationFailed,
    ProxyServe,
    Source,
)
from tests.api.admin_fakes import (
    ADMIN_KEY,
    USER_KEY,
    FakeManager,
    admin_app,
    generation_status,
    serve_app,
)
from tests.api.live import wait_until

SPEC = ExpertSpec(ServedSource("/experts/qa"), ServedSource("/small"))
PUBLISHED_SECONDS = {"loading": 0.5, "verifying": 0.25, "warming": 0.125}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeManager, str]]:
    """One server for the file; `manager` empties it."""
    manager = FakeManager()
    with serve_app(admin_app(manager)) as url:
        yield manager, url


@pytest.fixture
def manager(served: tuple[FakeManager, str]) -> FakeManager:
    found, _ = served
    vars(found).clear()
    vars(found).update(vars(FakeManager(at_once=True)))
    return found


@pytest.fixture
def client(served: tuple[FakeManager, str], manager: FakeManager) -> Iterator[ProxyServe]:
    with ProxyServe(served[1], model="atlas") as client:
        yield client


class Blocking:
    """An async client behind the methods of the other one, so that both go through the same tests."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return Blocking(found, self._loop)
        return lambda *arguments, **named: self._loop.run_until_complete(found(*arguments, **named))


@pytest.fixture(params=["sync", "async"])
def either(
    request: pytest.FixtureRequest, served: tuple[FakeManager, str], manager: FakeManager
) -> Iterator[Any]:
    if request.param == "sync":
        with ProxyServe(served[1], model="atlas") as client:
            yield client
        return
    with asyncio.Runner() as runner:
        target = AsyncProxyServe(served[1], model="atlas")
        yield Blocking(target, runner.get_loop())
        runner.run(target.close())


@contextmanager
def meanwhile(manager: FakeManager, change: Callable[[], None]) -> Iterator[None]:
    """Runs `change` on another thread as soon as a request waits for one."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            wait_until(lambda: manager.waiting)
            change()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not failures


def test_put_returns_what_serves(manager: FakeManager, either: Any) -> None:
    manager.at_once = False
    with meanwhile(manager, lambda: manager.publish("qa")):
        expert = either.experts.put("qa", "/experts/qa", Path("/small"))
    assert expert == Expert(
        "qa",
        "published",
        1,
        generations=(
            ExpertGeneration(
                1,
                "published",
                {"tuned": "folder", "untuned": "folder"},
                {"tuned": {"path": "/experts/qa"}, "untuned": {"path": "/small"}},
                3 * 2**20,
                content_hash="ab" * 32,
                created=1_700_000_000.5,
                seconds=PUBLISHED_SECONDS,
            ),
        ),
    )
    assert expert.newest.generation == 1
    assert manager.actions == [("put", "qa", SPEC, "operator")]


def test_put_that_fails_says_why(manager: FakeManager, either: Any) -> None:
    manager.put("qa", SPEC, actor="test")
    manager.at_once = False
    with (
        pytest.raises(openai.BadRequestError, match="NaN on the probe") as caught,
        meanwhile(manager, lambda: manager.fail("qa", "NaN on the probe")),
    ):
        either.experts.put("qa", "/broken")
    assert caught.value.code == "load_failed"
    expert = either.experts.get("qa")
    assert (expert.generation, expert.last_error) == (1, "NaN on the probe")
    assert (expert.newest.phase, expert.newest.error) == ("failed", "NaN on the probe")


def test_a_change_is_followed(manager: FakeManager, client: ProxyServe) -> None:
    manager.at_once = False
    client.experts.put("qa", "/a", wait=False)
    following = client.experts.follow("qa", every=0.001)
    assert next(following).phase == "loading"
    manager.advance("qa", Phase.VERIFYING, 0.5)
    assert next(following).progress == 0.5
    manager.publish("qa")
    assert [generation.phase for generation in following] == ["published"]


async def test_a_change_that_fails_is_followed(manager: FakeManager, served: tuple[FakeManager, str]) -> None:
    manager.at_once = False
    async with AsyncProxyServe(served[1], model="atlas") as client:
        await client.experts.put("qa", "/a", wait=False)
        following = client.experts.follow("qa", every=0.001)
        assert (await anext(following)).phase == "loading"
        manager.fail("qa", "NaN on the probe")
        with pytest.raises(GenerationFailed, match="generation 1 of expert 'qa' failed: NaN on the probe"):
            await anext(following)


def test_put_that_is_not_waited_for(manager: FakeManager, either: Any) -> None:
    manager.at_once = False
    assert either.experts.put("qa", "/a", wait=False).state == "loading"
    manager.advance("qa", Phase.VERIFYING, 0.5)
    newest = either.experts.get("qa").newest
    assert (newest.phase, newest.progress) == ("verifying", 0.5)


@pytest.mark.parametrize(
    ("source", "spec"),
    [
        (Source("/a"), ServedSource("/a")),
        (
            Source("/a", format="lora", of="small", scale=0.5),
            ServedSource("/a", "lora", "small", 0.5),
        ),
        (Source("/a", layers=(0.25, 1.0)), ServedSource("/a", layers=LayerScale(0.25, 1.0))),
        (Source(of="small"), ServedSource(of="small")),
        (
            Source.merged({"/a": 0.5, "/b": -1.0}, of="small"),
            ServedSource(of="small", merge=((0.5, ServedSource("/a")), (-1.0, ServedSource("/b")))),
        ),
        (
            Source(merge=((1.0, Source("/a", "diff", scale=2.0)),)),
            ServedSource(merge=((1.0, ServedSource("/a", "diff", scale=2.0)),)),
        ),
    ],
    ids=str,
)
def test_sources(manager: FakeManager, client: ProxyServe, source: Source, spec: ServedSource) -> None:
    client.experts.put("qa", source, protected=True)
    assert manager.actions == [("put", "qa", ExpertSpec(spec, None, True), "operator")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "needs a path"),
        ({"path": "/a", "merge": ((1.0, Source("/b")),)}, "not both"),
        ({"path": "/a", "scale": float("nan")}, "finite"),
        ({"path": "/a", "layers": (0.0, float("inf"))}, "finite"),
        ({"merge": ((float("nan"), Source("/b")),)}, "finite"),
    ],
    ids=str,
)
def test_sources_that_cannot_be_meant(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Source(**fields)


def test_list_rollback_and_delete(manager: FakeManager, either: Any) -> None:
    assert either.experts.list() == ()
    for name in ("record", "qa", "qa"):
        either.experts.put(name, "/a")
    assert [expert.name for expert in either.experts.list()] == ["qa", "record"]
    assert (either.experts.rollback("qa").generation, either.experts.get("qa").previous) == (1, 2)
    assert either.experts.rollback("qa", wait=False).generation == 2
    manager.at_once = False
    with meanwhile(manager, lambda: manager.retire("qa")):
        assert either.experts.delete("qa") is None
    assert either.experts.delete("record", wait=False) is None
    assert [expert.name for expert in either.experts.list()] == ["record"]


def test_a_wait_that_ends_early_leaves_the_change_alone(manager: FakeManager, either: Any) -> None:
    manager.at_once = False
    with pytest.raises(openai.APITimeoutError):
        either.experts.put("qa", "/a", timeout=0.5)
    wait_until(lambda: not manager.waiting)
    manager.publish("qa")
    assert either.experts.get("qa").generation == 1
    assert len(manager.actions) == 1, "a change is never sent twice"


def test_conflicts_are_not_tried_again(manager: FakeManager, either: Any) -> None:
    manager.at_once = False
    calls: list[str] = []
    put = manager.put

    def counted(name: str, spec: ExpertSpec, *, actor: str) -> Any:
        calls.append(name)
        return put(name, spec, actor=actor)

    manager.put = counted  # type: ignore[method-assign]
    either.experts.put("qa", "/a", wait=False)
    with pytest.raises(openai.ConflictError) as caught:
        either.experts.put("qa", "/a")
    assert (caught.value.code, len(calls)) == ("swap_conflict", 2)
    manager.refusal = NoRoom("3.0 GiB are needed and 1.0 GiB is left.")
    with pytest.raises(openai.ConflictError, match=r"3\.0 GiB") as caught:
        either.experts.put("arith", "/a")
    assert (caught.value.code, len(calls)) == ("insufficient_memory", 3)


def test_presets(manager: FakeManager, either: Any) -> None:
    either.presets.put("calm", Fusion.proxy(qa=0.5))
    either.presets.put("bold", {"rule": "dynamic", "experts": {"qa": 1}})
    calm = {"rule": "proxy", "experts": {"qa": 0.5}}
    assert either.presets.list() == {"calm": calm, "bold": {"rule": "dynamic", "experts": {"qa": 1}}}
    assert either.presets.get("calm") == calm
    either.presets.delete("calm")
    with pytest.raises(openai.NotFoundError):
        either.presets.get("calm")
    with pytest.raises(openai.BadRequestError) as caught:
        either.presets.put("calm", {"rule": "dynamite"})
    assert caught.value.param == "fusion.rule"


def test_drain(manager: FakeManager, either: Any) -> None:
    assert either.drain() is None
    assert manager.drained


def test_refusals_name_the_field(client: ProxyServe) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.experts.put("qa", Source("/a", format="zip"))  # type: ignore[arg-type]
    assert caught.value.param == "tuned.format"
    with pytest.raises(openai.NotFoundError) as missing:
        client.experts.get("ghost")
    assert missing.value.param == "name"
    for name in ("a/b", "q.a", "ü", "a?wait=true"):
        with pytest.raises(openai.APIStatusError):
            client.experts.delete(name)
    for name in ("", ".", ".."):
        with pytest.raises(ValueError, match="cannot be a name"):
            client.experts.delete(name)


def test_what_a_newer_server_says_beside_is_left_out() -> None:
    body = {
        "object": "expert",
        "name": "qa",
        "state": "published",
        "mood": "good",
        "generations": [{"generation": 1, "phase": "published", "colour": "red"}],
    }
    assert Expert.of(body) == Expert("qa", "published", generations=(ExpertGeneration(1, "published"),))


def test_every_field_arrives(manager: FakeManager, client: ProxyServe) -> None:
    generation = generation_status(
        4,
        Phase.DRAINING,
        SPEC,
        requests=3,
        progress=0.5,
        content_hash="c",
        error="e",
        seconds={"loading": 1.0},
    )
    manager.show(ExpertStatus("qa", "parked", 5, 4, True, (generation,), "last"))
    body = client.experts.get("qa")
    assert (body.state, body.generation, body.previous, body.protected, body.last_error) == (
        "parked",
        5,
        4,
        True,
        "last",
    )
    assert body.newest == ExpertGeneration(
        4,
        "draining",
        {"tuned": "folder", "untuned": "folder"},
        {"tuned": {"path": "/experts/qa"}, "untuned": {"path": "/small"}},
        3 * 2**20,
        3,
        0.5,
        "c",
        1_700_000_000.5,
        "e",
        {"loading": 1.0},
    )


def test_keys(tmp_path: Path) -> None:
    manager = FakeManager(at_once=True)
    with serve_app(admin_app(manager, keys=tmp_path)) as url:
        for key, kind in (("sk-other", openai.AuthenticationError), (USER_KEY, openai.PermissionDeniedError)):
            with ProxyServe(url, api_key=key) as client, pytest.raises(kind):
                client.experts.list()
        with ProxyServe(url, api_key=ADMIN_KEY) as client:
            assert client.experts.put("qa", "/a").generation == 1
