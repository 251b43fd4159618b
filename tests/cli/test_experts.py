"""`proxyserve experts` and `proxyserve presets` against the control plane's routes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from proxyserve.cli import experts
from proxyserve.cli.experts import experts_app
from proxyserve.cli.presets import presets_app
from proxyserve.errors import NoRoom, ProxyserveError
from proxyserve.experts.generation import Phase
from proxyserve.experts.source import ExpertSpec, LayerScale, Source
from proxyserve.experts.status import Change, ExpertStatus
from tests.api.admin_fakes import (
    ADMIN_KEY,
    USER_KEY,
    FakeManager,
    admin_app,
    generation_status,
    serve_app,
    with_keys,
)
from tests.cli.output import said

app = typer.Typer()
app.add_typer(experts_app)
app.add_typer(presets_app)

SPEC = ExpertSpec(Source("/experts/qa"), Source("/small"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of whoever runs the tests must not reach the commands; looks come one after the other."""
    for name in list(os.environ):
        if name.startswith("PROXYSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(experts, "_POLL", 0.0)


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
def run(served: tuple[FakeManager, str], manager: FakeManager) -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner(env={"PROXYSERVE_URL": served[1]}).invoke(app, arguments)

    return invoke


def printed(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def failure(result: Result) -> str:
    """The one line of a failure."""
    assert result.exit_code == 1
    assert isinstance(result.exception, ProxyserveError), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


# Load and swap.


def test_load_shows_each_phase_once_and_ends_when_published(manager: FakeManager, run: Any) -> None:
    manager.at_once = False
    manager.steps = [
        (Phase.LOADING, 0.0),
        (Phase.LOADING, 0.5),
        (Phase.VERIFYING, None),
        (Phase.WARMING, 0.5),
        (Phase.PUBLISHED, None),
    ]
    result = run("experts", "load", "qa", "/experts/qa", "/small")
    assert printed(result) == (
        "generation 1 of qa is published: loading 0.50 s, verifying 0.25 s, warming 0.12 s\n"
    )
    phases = ["loading", "verifying", "warming"]
    assert result.stderr.splitlines() == [f"generation 1 of qa: {phase}" for phase in phases]
    assert manager.actions == [("put", "qa", SPEC, "operator")]


def test_load_draws_a_bar_on_a_terminal(
    manager: FakeManager, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    manager.at_once = False
    manager.steps = [(Phase.LOADING, None), (Phase.LOADING, 0.5), (Phase.VERIFYING, 1.0)]
    manager.steps += [(Phase.WARMING, None), (Phase.PUBLISHED, None)]
    result = run("experts", "load", "qa", "/a")
    assert result.exit_code == 0
    for phase in ("loading", "verifying", "warming"):
        assert f"generation 1 of qa: {phase}" in result.stderr
    assert "━" in result.stderr
    assert "\x1b[" in result.stderr


def test_a_load_that_fails_ends_with_its_reason(manager: FakeManager, run: Any) -> None:
    manager.at_once = False
    for serving in ("no generation serves", "generation 2 goes on serving"):
        manager.steps = [(Phase.LOADING, 0.0), (Phase.FAILED, None)]
        command = "load" if serving.startswith("no") else "swap"
        result = run("experts", command, "qa", "/a")
        assert f"failed ({serving}): tokenizers differ at id 7" in failure(result)
        assert result.stdout == ""
        manager.put("qa", SPEC, actor="test")
        manager.publish("qa")


def test_load_and_swap_name_each_other(manager: FakeManager, run: Any) -> None:
    assert "use: proxyserve experts load qa" in failure(run("experts", "swap", "qa", "/a"))
    assert manager.actions == []
    printed(run("experts", "load", "qa", "/a"))
    assert "use: proxyserve experts swap qa" in failure(run("experts", "load", "qa", "/a"))
    assert len(manager.actions) == 1
    printed(run("experts", "swap", "qa", "/b"))
    assert manager.expert("qa").generation == 2


def test_a_name_under_which_nothing_ever_served_can_be_loaded(manager: FakeManager, run: Any) -> None:
    manager.at_once = False
    manager.put("qa", SPEC, actor="test")
    manager.fail("qa", "no such folder")
    manager.at_once = True
    assert "use: proxyserve experts load qa" in failure(run("experts", "swap", "qa", "/a"))
    assert "generation 2 of qa is published" in printed(run("experts", "load", "qa", "/a"))


def test_without_waiting(manager: FakeManager, run: Any) -> None:
    manager.at_once = False
    assert "generation 1 of qa is loading" in printed(run("experts", "load", "qa", "/a", "--no-wait"))
    change = json.loads(printed(run("experts", "load", "arith", "/a", "--no-wait", "--json")))
    assert (change["expert"], change["generation"], change["status"]["state"]) == ("arith", 1, "loading")


def test_a_generation_that_vanishes_while_it_is_followed(
    manager: FakeManager, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.put("qa", SPEC, actor="test")
    monkeypatch.setattr(manager, "put", lambda name, spec, actor: Change(name, 7))
    assert "generation 7 of qa is gone" in failure(run("experts", "swap", "qa", "/a"))


@pytest.mark.parametrize(
    ("arguments", "tuned"),
    [
        (["/a"], Source("/a")),
        (["org/model"], Source("org/model")),
        (["/a", "--format", "lora", "--of", "small", "--scale", "0.5"], Source("/a", "lora", "small", 0.5)),
        (["/a", "--layers", "0.25:1"], Source("/a", layers=LayerScale(0.25, 1.0))),
        (
            ["--of", "small", "--merge", "0.5=/a", "--merge", "-1e0=/b=c"],
            Source(of="small", merge=((0.5, Source("/a")), (-1.0, Source("/b=c")))),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["load", "swap"])
def test_sources(manager: FakeManager, run: Any, command: str, arguments: list[str], tuned: Source) -> None:
    if command == "swap":
        manager.put("qa", SPEC, actor="test")
    printed(run("experts", command, "qa", *arguments))
    assert manager.actions[-1] == ("put", "qa", ExpertSpec(tuned), "operator")


def test_a_swap_keeps_the_protection_unless_told(manager: FakeManager, run: Any) -> None:
    for arguments, protected in (
        (["load", "--protected"], True),
        (["swap"], True),
        (["swap", "--not-protected"], False),
        (["swap"], False),
        (["swap", "--protected"], True),
    ):
        printed(run("experts", arguments[0], "qa", "/a", *arguments[1:]))
        assert manager.expert("qa").protected is protected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qa"], "TUNED"),
        (["qa", "/a", "--merge", "1=/b", "--of", "small"], "TUNED"),
        (["qa", "--merge", "1=/b"], "--of"),
        (["qa", "--merge", "/b", "--of", "small"], "WEIGHT=PATH"),
        (["qa", "--merge", "1=", "--of", "small"], "WEIGHT=PATH"),
        (["qa", "--merge", "much=/b", "--of", "small"], "no number"),
        (["qa", "--merge", "nan=/b", "--of", "small"], "finite"),
        (["qa", "--merge", "1=/b", "--of", "small", "--scale", "2"], "--scale"),
        (["qa", "--merge", "1=/b", "--of", "small", "--format", "diff"], "--format"),
        (["qa", "--merge", "1=/b", "--of", "small", "--layers", "0:1"], "--layers"),
        (["qa", "/a", "--layers", "1"], "FIRST:LAST"),
        (["qa", "/a", "--layers", "1:x"], "no number"),
        (["q.a", "/a"], "cannot be a name"),
        (["", "/a"], "cannot be a name"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_here(
    manager: FakeManager, run: Any, arguments: list[str], words: str
) -> None:
    for command in ("load", "swap"):
        result = run("experts", command, *arguments)
        assert result.exit_code == 2
        assert words in said(result)
    assert manager.actions == []


# The other commands.


@pytest.fixture
def several(manager: FakeManager) -> FakeManager:
    merge = Source(of="small", merge=((0.5, Source("/a")), (0.5, Source("/[red]"))))
    loading = generation_status(3, Phase.VERIFYING, ExpertSpec(merge), progress=0.25, bytes=0)
    serving = generation_status(2, Phase.PUBLISHED, SPEC, requests=5, bytes=2_000_000, content_hash="ab" * 32)
    before = generation_status(
        1,
        Phase.DRAINING,
        ExpertSpec(Source("/l", "lora", "small")),
        requests=2,
        bytes=500_000,
        seconds={"loading": 1.0, "verifying": 0.5},
    )
    failed = generation_status(1, Phase.FAILED, SPEC, error="no folder [bold]", bytes=0)
    manager.show(ExpertStatus("qa", "published", 2, 1, True, (loading, serving, before), None))
    manager.show(ExpertStatus("arith", "failed", None, None, False, (failed,), "no folder [bold]"))
    return manager


def test_list_is_a_table(several: FakeManager, run: Any) -> None:
    lines = [line.rstrip() for line in printed(run("experts", "list")).splitlines()]
    assert lines == [
        "name   state                   serves  before  format     size  running  last error",
        "arith  failed                                  folder  0 bytes        0  no folder [bold]",
        "qa     published, 3 verifying       2       1  folder   2.5 MB        7",
    ]
    names = [expert["name"] for expert in json.loads(printed(run("experts", "list", "--json")))]
    assert names == ["arith", "qa"]


def test_nothing_is_listed(run: Any) -> None:
    assert printed(run("experts", "list")) == "no experts\n"
    assert printed(run("presets", "list")) == "no presets\n"


def test_show(several: FakeManager, run: Any) -> None:
    text = printed(run("experts", "show", "qa"))
    assert text.startswith("expert qa: published, 3 verifying, generation 2, previous 1, protected\n")
    lines = [line.rstrip() for line in text.splitlines() if line]
    assert lines[1:] == [
        "gen  phase          tuned               untuned            size  running    took  content       error",
        "  3  verifying 25%  merge of small                      0 bytes        0  0.00 s",
        "                    0.5 /a",
        "                    0.5 /[red]",
        "  2  published      folder /experts/qa  folder /small    2.0 MB        5  0.00 s  abababababab",
        "  1  draining       lora /l of small                   500.0 kB        2  1.50 s",
    ]
    assert "last error: no folder [bold]\n" in printed(run("experts", "show", "arith"))
    assert json.loads(printed(run("experts", "show", "qa", "--json")))["generation"] == 2
    assert "no expert 'ghost'" in failure(run("experts", "show", "ghost"))


@pytest.mark.parametrize("json_output", [False, True])
def test_rollback(manager: FakeManager, run: Any, json_output: bool) -> None:
    more = ["--json"] if json_output else []
    for _ in range(2):
        manager.put("qa", SPEC, actor="test")
    back = printed(run("experts", "rollback", "qa", *more))
    again = printed(run("experts", "rollback", "qa", "--no-wait", *more))
    if json_output:
        assert json.loads(back)["generation"] == 1
        assert json.loads(again)["generation"] == 2
        assert "status" in json.loads(again)
    else:
        assert back == "expert qa: published, generation 1, previous 2\n"
        assert again == "expert qa is going back to generation 2\n"
    manager.put("new", SPEC, actor="test")
    assert "no earlier generation" in failure(run("experts", "rollback", "new"))


@pytest.mark.parametrize("json_output", [False, True])
def test_unload(manager: FakeManager, run: Any, json_output: bool) -> None:
    more = ["--json"] if json_output else []
    manager.put("qa", SPEC, actor="test")
    gone = printed(run("experts", "unload", "qa", *more))
    manager.put("qa", SPEC, actor="test")
    going = printed(run("experts", "unload", "qa", "--no-wait", *more))
    if json_output:
        assert json.loads(gone) == json.loads(going) == {"expert": "qa", "generation": 1, "status": None}
    else:
        assert (gone, going) == ("expert qa is unloaded\n", "expert qa takes no new requests\n")
    assert "no expert 'qa'" in failure(run("experts", "unload", "qa"))


def test_unload_waits_for_what_runs(manager: FakeManager, run: Any) -> None:
    manager.put("qa", SPEC, actor="test")
    manager.at_once = False

    def retire() -> None:
        while not manager.waiting:
            done.wait(0.005)
        manager.retire("qa")

    done = threading.Event()
    other = threading.Thread(target=retire)
    other.start()
    assert printed(run("experts", "unload", "qa")) == "expert qa is unloaded\n"
    other.join()


def test_presets(manager: FakeManager, run: Any) -> None:
    calm = {"rule": "proxy", "experts": {"qa": 0.5}}
    assert printed(run("presets", "set", "calm", json.dumps(calm))) == "preset calm is saved\n"
    bold = json.loads(printed(run("presets", "set", "bold", "{}", "--json")))
    assert bold == {"object": "preset", "name": "bold", "fusion": {}}
    assert json.loads(printed(run("presets", "show", "calm"))) == calm
    assert json.loads(printed(run("presets", "show", "calm", "--json")))["name"] == "calm"
    table = printed(run("presets", "list"))
    lines = [
        [cell.strip() for cell in line.split(line[0])[1:3]] for line in table.splitlines() if line[0] in "│┃"
    ]
    assert lines == [["name", "fusion"], ["bold", "{}"], ["calm", json.dumps(calm)]]
    assert [entry["name"] for entry in json.loads(printed(run("presets", "list", "--json")))] == [
        "bold",
        "calm",
    ]
    assert printed(run("presets", "delete", "calm")) == "preset calm is deleted\n"
    assert json.loads(printed(run("presets", "delete", "bold", "--json")))["deleted"] is True
    assert "no preset 'calm'" in failure(run("presets", "show", "calm"))
    assert "the rules are" in failure(run("presets", "set", "calm", '{"rule": "dynamite"}'))


@pytest.mark.parametrize(
    ("fusion", "words"), [("{", "not JSON"), ("[]", "JSON object"), ("[" * 5000, "not JSON")]
)
def test_presets_that_are_no_objects(manager: FakeManager, run: Any, fusion: str, words: str) -> None:
    result = run("presets", "set", "calm", fusion)
    assert result.exit_code == 2
    assert words in said(result)


# Servers that refuse, and what is no server.


def test_refusals_are_those_of_the_server(manager: FakeManager, run: Any) -> None:
    manager.refusal = NoRoom("3.0 GiB are needed and 1.0 GiB is left.")
    assert failure(run("experts", "load", "qa", "/a")) == "3.0 GiB are needed and 1.0 GiB is left."
    manager.refusal = None
    assert "'tuned.format'" in failure(run("experts", "load", "qa", "/a", "--format", "gguf"))


COMMANDS = [
    ["experts", "list"],
    ["experts", "show", "qa"],
    ["experts", "load", "qa", "/a"],
    ["experts", "swap", "qa", "/a"],
    ["experts", "rollback", "qa"],
    ["experts", "unload", "qa"],
    ["presets", "list"],
    ["presets", "show", "calm"],
    ["presets", "set", "calm", "{}"],
    ["presets", "delete", "calm"],
]


def test_all_commands_are_tried_here() -> None:
    found = {(group.name, command.name) for group in app.registered_groups for command in sub(group)}
    assert found == {(command[0], command[1]) for command in COMMANDS}


def sub(group: Any) -> Any:
    group.name = group.typer_instance.info.name
    return group.typer_instance.registered_commands


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nobody_answers(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--url", "http://127.0.0.1:9"])
    assert failure(result).startswith("http://127.0.0.1:9 cannot be reached: ")


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "127.0.0.1:8000", "http://", "http://[", "http://127.0.0.1:x"]
)
def test_addresses_that_are_none(url: str) -> None:
    assert "cannot be reached" in failure(CliRunner().invoke(app, ["experts", "list", "--url", url]))


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, b"<html>", "status 200"),
        (200, b"[]", "status 200"),
        (301, b"", "status 301"),
        (404, b'{"detail": "Not Found"}', "status 404"),
        (502, b"Bad gateway", "status 502"),
        (404, b'{"error": {"message": "x", "code": "route_not_found"}}', "has no control plane"),
        (409, b'{"error": {"message": "busy"}}', "busy"),
    ],
)
def test_other_servers(status: int, content: bytes, words: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        result = CliRunner().invoke(app, ["experts", "show", "qa", "--url", url])
        server.shutdown()
    assert words in failure(result)


@pytest.fixture(scope="module")
def with_admin_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_app(admin_app(FakeManager(at_once=True), keys=tmp_path_factory.mktemp("keys"))) as url:
        yield url


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_keys(with_admin_key: str, tmp_path: Path, command: list[str]) -> None:
    with_keys(tmp_path)
    arguments = [*command, "--url", with_admin_key]
    assert "See --admin-key-file" in failure(CliRunner().invoke(app, arguments))
    by_user = CliRunner().invoke(app, [*arguments, "--admin-key-file", str(tmp_path / "keys")])
    assert "administrator" in failure(by_user)
    environment = {"PROXYSERVE_ADMIN_KEY_FILE": str(tmp_path / "admin-keys")}
    by_admin = CliRunner(env=environment).invoke(app, arguments)
    assert by_admin.exit_code == 0 or "There is no" in failure(by_admin)


@pytest.mark.parametrize(
    ("content", "good"),
    [
        (f"# mine\n\n  {ADMIN_KEY} \n{USER_KEY}\n", True),
        (f"sha256:{'0' * 64}\n{ADMIN_KEY}\n", True),
        ("", False),
        (f"sha256:{'0' * 64}\n", False),
        (f"{ADMIN_KEY} twice\n", False),
        ("schlüssel\n", False),
    ],
    ids=repr,
)
def test_key_files(
    with_admin_key: str, tmp_path_factory: pytest.TempPathFactory, content: str, good: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("file")  # not called after what is in the file
    (tmp_path / "key").write_text(content, encoding="utf-8")
    arguments = ["experts", "list", "--url", with_admin_key, "--admin-key-file", str(tmp_path / "key")]
    result = CliRunner().invoke(app, arguments)
    if good:
        printed(result)
    else:
        assert result.exit_code == 2
        assert "a key itself" in said(result)
        assert ADMIN_KEY not in said(result), "what the file holds is not repeated"


def test_the_address_may_end_with_v1(served: tuple[FakeManager, str], manager: FakeManager) -> None:
    for ending in ("/", "/v1", "/v1/"):
        result = CliRunner().invoke(app, ["presets", "list", "--url", served[1] + ending])
        assert printed(result) == "no presets\n"
    assert httpx.get(f"{served[1]}/admin/v1/presets").json()["data"] == []
