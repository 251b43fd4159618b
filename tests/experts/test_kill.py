"""kill -9 at any instant: the next start serves what was published last.

The servers are whole ones, processes of their own behind HTTP, killed by SIGKILL. So that many of them take little
time, they are forked from a process that has imported everything (`respawn.py`): a kill while the interpreter still
imports, when no file of ours is open yet, is what is left out. The last start is a fresh interpreter's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.experts.contents import World

#: At random moments. With fifty, every kind of moment comes up for certain; `test_killed_at_the_commit` has those that
#: matter one by one.
KILLS = int(os.environ.get("PROXYSERVE_KILLS", "10"))
#: A start takes a quarter of a second here.
READY_SECONDS = 30.0
NAMES = ("qa", "record", "bio")
PRESETS = ("house", "night")
_UNFINISHED = re.compile(r"generation (\d+) of expert '(\w+)' was not finished")


class Gone(Exception):
    """The server was killed."""


class Forks:
    """The process that servers are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.experts.respawn"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, **order: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Process:
    """Servers on one state folder, one after the other. `doomed`: it is killed, or will be at some moment."""

    def __init__(self, forks: Forks, world: World, folder: Path) -> None:
        with socket.socket() as listener:  # a port that is free now
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.arguments = [
            *("serve", str(world.family.base), "--served-name", "atlas", "--port", str(port)),
            *("--kv-memory", "1MiB", "--threads", "1", "--max-batch", "4"),
            *("--expert-root", str(world.root), "--state-dir", str(folder / "state")),
        ]
        self.log_file = folder / "server.log"
        self.doomed = False
        self.killed = False
        self._forks = forks
        self._pid = 0
        self._timer: threading.Timer | None = None

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def start(self, *fatal: str) -> None:
        """`fatal`: a method of the state store, and whether the server kills itself "before" or "after" it."""
        self.killed, self.doomed = False, bool(fatal)
        self._pid = self._forks.order(start=self.arguments, log=str(self.log_file), fatal=fatal)

    def kill_in(self, seconds: float) -> None:
        """By SIGKILL."""
        self.doomed = True
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.start()

    def _kill(self) -> None:
        self.killed = True  # first: whoever then finds nobody there knows why
        os.kill(self._pid, signal.SIGKILL)

    def reap(self) -> None:
        """Returns when nothing of it is left. It must not have ended by itself."""
        if self._timer is not None:
            self._timer.join()
        assert self._forks.order(kill=self._pid) == -signal.SIGKILL, self.log
        assert "Traceback" not in self.log, self.log


@dataclass(frozen=True)
class State:
    """What should be there: of each expert the content that serves and the one before it, never the same; and the
    presets."""

    experts: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def visible(self) -> tuple[Any, ...]:
        """What the control plane shows of it: not what the earlier generation was."""
        experts = {name: (content, earlier is not None) for name, (content, earlier) in self.experts.items()}
        return experts, self.presets

    def with_expert(self, name: str, serves: tuple[str, str | None] | None) -> State:
        others = {other: self.experts[other] for other in self.experts if other != name}
        return replace(self, experts=others if serves is None else {**others, name: serves})

    def with_preset(self, name: str, value: Mapping[str, Any] | None) -> State:
        others = {other: self.presets[other] for other in self.presets if other != name}
        return replace(self, presets=others if value is None else {**others, name: value})


class Client:
    """Changes experts and presets, and knows what must be there: `state`, or what the change under way makes of it.
    `done` counts what happened."""

    def __init__(self, world: World, server: Process) -> None:
        self.state = State()
        self.done: Counter[str] = Counter()
        self.seconds_to_start = 0.3  # the last one
        self.seconds_to_change = 0.1  # a running mean
        self._under_way: State | None = None
        self._accepted: tuple[str, int] | None = None  # a generation that nobody knows yet what became of
        self._http = httpx.Client(base_url=server.url, timeout=20)
        self._world = world
        self._server = server
        self._random = Random(1)
        self._contents = {
            json.dumps(content.spec.tuned.as_json()): name for name, content in world.contents.items()
        }
        self._texts: dict[str, str] = {}
        self._published: set[tuple[str, int]] = set()

    def live(self, changes: int, then: Callable[[], None]) -> None:
        """One life of the server, as far as it goes. Ends with Gone when the server was killed. `then` is called after
        so many changes, which go on."""
        begun = time.monotonic()
        self.wait_until_ready()
        self.seconds_to_start = time.monotonic() - begun
        try:
            self.observe()
        except Gone:
            # This life has said what became of it, and nobody could ask what it published.
            self._accepted = None
            raise
        for number in count():
            if number == changes:
                then()
            begun = time.monotonic()
            self.change()
            self.seconds_to_change += 0.1 * (time.monotonic() - begun - self.seconds_to_change)

    # What is there

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._server.killed:
            assert time.monotonic() < deadline, "the server does not come up"
            try:
                if self._http.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.005)
        self.done["killed before it was ready"] += 1
        self._accepted = None  # this start may have said what became of it, and was killed before it served
        raise Gone

    def observe(self) -> None:
        """Compare what is there with what should be; from now on that is known."""
        seen = self._seen()
        states = [self.state] if self._under_way is None else [self.state, self._under_way]
        found = [state for state in states if state.visible == seen]
        assert len(found) == 1, (seen, [state.visible for state in states], self._server.log)
        if self._under_way is not None:
            self.done["finished" if found[0] is self._under_way else "dropped"] += 1
        self.state, self._under_way = found[0], None
        self._check_messages()
        for name, (content, _) in self.state.experts.items():
            text = self._complete(f"atlas+{name}")
            assert self._texts.setdefault(content, text) == text, "another expert answers"
        for name in ("atlas", *self.state.presets):
            self._complete(name)

    def _seen(self) -> tuple[Any, ...]:
        experts = {}
        for expert in self._send("GET", "/admin/v1/experts").json()["data"]:
            serving = expert["generation"]
            assert expert["state"] == "published", expert
            self._published.add((expert["name"], serving))
            (source,) = (one["sources"] for one in expert["generations"] if one["generation"] == serving)
            content = self._contents[json.dumps(source["tuned"])]
            experts[expert["name"]] = (content, expert["previous"] is not None)
        presets = self._send("GET", "/admin/v1/presets").json()["data"]
        return experts, {preset["name"]: preset["fusion"] for preset in presets}

    def _check_messages(self) -> None:
        """What was dropped is said, and nothing else."""
        log = re.sub(r"\s+", " ", self._server.log)
        unfinished = {(name, int(number)) for number, name in _UNFINISHED.findall(log)}
        assert not unfinished & self._published, unfinished
        if self._accepted is not None:
            assert self._accepted in unfinished | self._published, (self._accepted, log)
            self._accepted = None
        self.done["said to be unfinished"] += len(unfinished)

    def _complete(self, model: str) -> str:
        body = {"model": model, "prompt": "The quick", "max_tokens": 4, "temperature": 0}
        answer = self._send("POST", "/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.TransportError:
            assert self._server.doomed, self._server.log
            raise Gone from None

    # What changes

    def change(self, kind: str | None = None, name: str | None = None) -> None:
        """A random one, or one of this kind of this expert."""
        name = name or self._random.choice(NAMES)
        kind = kind or self._random.choice(
            ["put"] * 4 + ["rollback"] * 2 + ["preset"] * 2 + ["delete", "broken"]
        )
        serves = self.state.experts.get(name)
        if kind == "put":
            self._put(name, serves)
        elif kind == "broken":
            spec = self._random.choice(list(self._world.broken.values()))
            self._make(kind, None, "PUT", f"/admin/v1/experts/{name}?wait=true", spec.as_json())
        elif kind == "rollback":
            after = None
            if serves is not None and serves[1] is not None:
                after = self.state.with_expert(name, (serves[1], None))
            self._make(kind, after, "POST", f"/admin/v1/experts/{name}/rollback?wait=true")
        elif kind == "delete":
            self._make(
                kind, self.state.with_expert(name, None), "DELETE", f"/admin/v1/experts/{name}?wait=true"
            )
        else:
            self._preset(name)

    def _put(self, name: str, serves: tuple[str, str | None] | None) -> None:
        earlier = None if serves is None else serves[0]
        content = self._random.choice([known for known in self._world.contents if known != earlier])
        after = self.state.with_expert(name, (content, earlier))
        spec = self._world.contents[content].spec.as_json()
        if self._random.random() < 0.5:
            self._make("put", after, "PUT", f"/admin/v1/experts/{name}?wait=true", spec)
            return
        self._under_way = after
        begun = self._send("PUT", f"/admin/v1/experts/{name}", spec)
        assert begun.status_code == 202, begun.text
        self._accepted = name, begun.json()["generation"]
        while self._send("GET", f"/admin/v1/experts/{name}").json()["generation"] != self._accepted[1]:
            pass
        self.state, self._under_way, self._accepted = after, None, None
        self.done["put"] += 1

    def _preset(self, expert: str) -> None:
        name = self._random.choice(PRESETS)
        if self._random.random() < 0.7:
            value = {"experts": {expert: round(self._random.random(), 3)}}
            after = self.state.with_preset(name, value)
            self._make("put preset", after, "PUT", f"/admin/v1/presets/{name}", value)
        else:
            after = self.state.with_preset(name, None)
            self._make("delete preset", after, "DELETE", f"/admin/v1/presets/{name}")

    def _make(self, kind: str, after: State | None, method: str, path: str, body: Any = None) -> None:
        """A change, waited for; `after` None if it cannot be made."""
        self._under_way = after
        answer = self._send(method, path, body)
        if answer.status_code == 200:
            assert after is not None, answer.text
            self.state = after
            self.done[kind] += 1
        else:
            assert answer.status_code in (400, 404, 409), answer.text
            self.done[f"{kind} refused"] += 1
        self._under_way = None


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def server(forks: Forks, world: World, tmp_path: Path) -> Process:
    return Process(forks, world, tmp_path)


@pytest.fixture
def client(world: World, server: Process) -> Iterator[Client]:
    client = Client(world, server)
    yield client
    client.close()


@pytest.mark.slow
def test_every_restart_serves_what_was_published_last(server: Process, client: Client) -> None:
    random = Random(2)
    for number in range(KILLS):
        server.start()
        in_start = number % 3 == 0
        if in_start:  # or just after it
            server.kill_in(random.uniform(0.0, 1.2 * client.seconds_to_start))

        def kill(in_start: bool = in_start) -> None:
            if not in_start:
                server.kill_in(random.uniform(0.0, 2.0 * client.seconds_to_change))

        with pytest.raises(Gone):
            client.live(random.randrange(8), kill)
        server.reap()
    done = client.done
    assert 1 <= done["killed before it was ready"] <= KILLS / 3 + 1
    assert done["dropped"] >= 1 and done["put"] >= 1, done
    if KILLS >= 50:
        assert done["said to be unfinished"] >= 1, done
        assert all(done[kind] > 0 for kind in ("rollback", "delete", "put preset", "delete preset")), done

    command = [sys.executable, "-m", "proxyserve", *server.arguments]
    with server.log_file.open("w") as log, subprocess.Popen(command, stderr=log) as fresh:
        try:
            server.killed = server.doomed = False
            client.wait_until_ready()
            client.observe()
            fresh.terminate()
            assert fresh.wait(20) == 0
        finally:
            fresh.kill()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("begin", "put"),
        ("publish", "put"),
        ("roll_back", "rollback"),
        ("delete", "delete"),
        ("put_preset", "preset"),
    ],
)
def test_killed_at_the_commit(client: Client, server: Process, method: str, kind: str, moment: str) -> None:
    """A change is made or not made, by whether it is on the disk."""
    server.start()
    client.wait_until_ready()
    client.change("put", "qa")
    client.change("put", "qa")
    server.kill_in(0.0)
    server.reap()

    server.start(method, moment)
    client.wait_until_ready()
    client.observe()
    with pytest.raises(Gone):
        while True:  # some presets are deleted
            client.change(kind, "qa")
    server.reap()

    server.start()
    client.wait_until_ready()
    client.observe()
    made = moment == "after" and method != "begin"
    assert client.done["finished" if made else "dropped"] == 1
    assert client.done["said to be unfinished"] == (
        kind == "put" and not made and (method, moment) != ("begin", "before")
    )
    server.kill_in(0.0)
    server.reap()
