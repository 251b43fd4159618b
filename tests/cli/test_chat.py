"""`proxyserve chat` in a real pseudo-terminal and from pipes, against a live server of the demo family."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from time import sleep

import pytest

from tests.api.live import Live, assert_idle, wait_until
from tests.cli.pretend_server import DONE, event, pretend_server
from tests.cli.terminal import Terminal

HARP = "Which instrument does Kustin play?"


def test_a_conversation(demo: Live, environment: dict[str, str], tmp_path: Path) -> None:
    """Answers and their figures, and every command that changes who answers or what was said."""
    saved = tmp_path / "talk.json"
    with Terminal.running("chat", "--url", demo.url, "-t", "0", environment=environment) as chat:
        assert "atlas+qa, atlas+record, house. /help" in chat.wait_for("atlas+bio> ")
        chat.enter("/model atlas+qa")
        chat.wait_for("\natlas+qa> ")
        chat.enter(HARP)
        assert "\n harp\n" in chat.wait_for("first token 0.")
        figures = chat.wait_for("\natlas+qa> ")
        for part in (" s · 2 tokens in ", "lanes atlas ", "qa.tuned ", "small ", "1 flip · mean KL 3.952"):
            assert part in figures
        chat.enter("/weight qa 0.5")
        chat.wait_for("\natlas+qa:0.5> ")
        chat.enter("/expert guard")
        chat.wait_for("\natlas+qa:0.5+guard> ")
        chat.enter("/weight nobody 1")
        assert "error: There is no expert 'nobody' here" in chat.wait_for("\natlas+qa:0.5+guard> ")
        chat.enter("/expert -guard")
        chat.wait_for("\natlas+qa:0.5> ")
        chat.enter("/weight qa 1")
        chat.enter("/rule dynamic max_weight=1.5")
        chat.wait_for("\natlas+qa dynamic max_weight=1.5> ")
        chat.enter("/explain")
        chat.wait_for("green tokens were pushed up")
        chat.enter("Which pet does Kustin have?")
        chat.wait_for("\n wolf\n")
        chat.wait_for("mean KL")
        chat.enter("/explain table")
        assert "push qa" in chat.wait_for("2 tokens, log-prob")
        chat.enter("/rule nonsense")
        chat.enter("hello")
        chat.wait_for("There is no rule 'nonsense'; the rules are arm, ")
        assert "(field fusion.rule) /retry asks again." in chat.wait_for("> ")
        chat.enter("/rule proxy")
        chat.enter("/set top_p=7")
        chat.enter("/retry")
        chat.wait_for("error: 'top_p': Input should be less than or equal to 1")
        chat.enter("/set top_p=")
        chat.enter(f"/save {saved}")
        chat.wait_for("4 messages are in")
        chat.enter("/undo")
        chat.wait_for("taken back: Which pet does Kustin have?")
        chat.enter("/model house")
        chat.wait_for("\nhouse> ")
        chat.enter("/weight qa 1")
        chat.wait_for("house is a preset and has its experts and weights in it; /model atlas leaves it.")
        chat.enter("/clear")
        chat.enter(f"/load {saved}")
        assert "> Which pet does Kustin have?\n wolf\n" in chat.wait_for("atlas+qa> ")
        chat.enter("/nonsense")
        chat.wait_for("There is no command /nonsense")
        chat.enter("/help")
        chat.wait_for("Ctrl-C stops an answer.")
        chat.type("\x04")
        assert chat.wait_for_end() == 0
    assert "Traceback" not in chat.seen and "\x1b[3" not in chat.raw, "no colours where NO_COLOR is set"
    talk = json.loads(saved.read_text())
    assert [message["content"] for message in talk["messages"]][:2] == [HARP, " harp"]
    assert (talk["model"], talk["rule"], talk["sampling"]) == ("atlas+qa", None, {"temperature": 0})


def test_ctrl_c_stops_the_answer_and_frees_its_lanes(demo: Live, environment: dict[str, str]) -> None:
    with Terminal.running("chat", "--url", demo.url, "-m", "atlas+qa", environment=environment) as chat:
        chat.wait_for("> ")
        for setting in ("ignore_eos=true", "max_tokens=480", "seed=1"):
            chat.enter(f"/set {setting}")
        ended = demo.engine.snapshot().finished.get("length", 0)
        chat.enter("Tell me everything.")
        wait_until(lambda: demo.engine.snapshot().running == 1)
        chat.wait_for("everything.\n")
        chat.wait_for(" ")
        chat.interrupt()
        chat.wait_for("stopped")
        assert_idle(demo.engine)
        assert demo.engine.snapshot().finished.get("length", 0) == ended, "it was not stopped, it ended"
        chat.enter("/set ignore_eos=")
        chat.enter("/set temperature=0")
        chat.enter("/clear")
        chat.enter(HARP)
        chat.wait_for("\n harp\n")
        chat.wait_for("> ")
        chat.type("half a line")
        chat.wait_for("half a line")  # it has been read: a signal just before would be seen with the next key
        chat.interrupt()
        chat.wait_for("Ctrl-C again leaves")
        chat.wait_for("> ")
        chat.interrupt()
        assert chat.wait_for_end() == 0


def test_nothing_that_goes_wrong_ends_the_conversation(environment: dict[str, str]) -> None:
    """Characters cut by the ends of pieces, what would command the terminal, refusals, a server that dies midway, one
    that is gone."""
    smile = event(content="grins: 😀 ünd\u2028more \x1b[2J\r.")
    cut = smile.index("😀".encode()) + 2
    full = {"error": {"message": "The queue is full.", "type": "rate_limit_error", "code": "queue_full"}}
    with (
        pretend_server() as server,
        Terminal.running("chat", "--url", server.url, environment=environment) as chat,
    ):
        server.answers += [
            [smile[:cut], smile[cut:-1], smile[-1:] + DONE],
            (429, {"retry-after": "7"}, full),
            [event(content="half an ans")],
            [event(content="whole"), DONE],
        ]
        chat.wait_for("big+qa> ")
        chat.enter("one")
        assert "grins: 😀 ünd\u2028more \ufffd[2J\ufffd." in chat.wait_for("> ")
        chat.enter("two")
        chat.wait_for("error: The queue is full. Try again in 7 s: /retry asks again.")
        chat.enter("/retry")
        chat.wait_for("half an ans")
        chat.wait_for("broke off in the middle of the answer. /retry asks again.")
        chat.enter("/retry")
        chat.wait_for("whole\n")
        chat.enter("/undo")
        chat.wait_for("taken back: two")
        server.close()
        chat.enter("three")
        chat.wait_for("cannot be reached")
        chat.enter("/quit")
        assert chat.wait_for_end() == 0
        asked = [body["messages"] for body in server.bodies]
    assert [message["content"] for message in asked[0]] == ["one"]
    assert all([message["content"] for message in later][::2] == ["one", "two"] for later in asked[1:])


def test_history_is_kept_for_its_owner_alone(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("readline")
    file = tmp_path / ".local" / "state" / "proxyserve" / "chat_history"
    with pretend_server() as server:
        server.answers += [[event(content=f"{number}"), DONE] for number in range(3)]
        for arguments in ((), ("--no-history",)):
            with Terminal.running("chat", "--url", server.url, *arguments, environment=environment) as chat:
                chat.wait_for("> ")
                chat.enter("ünï")
                chat.wait_for("\n0\n" if not arguments else "\n1\n")
                chat.wait_for("> ")
                chat.type("\x04")
                assert chat.wait_for_end() == 0
            assert [json.loads(line) for line in file.read_text().splitlines()] == ["ünï"]
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with Terminal.running("chat", "--url", server.url, environment=environment) as chat:
            chat.wait_for("> ")
            chat.type("/wei\t")
            chat.wait_for("/weight")
            chat.type("\x15\x1b[A\r")  # the line is wiped; the arrow brings the one before
            chat.wait_for("\n2\n")
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["ünï"] * 3


def run(environment: dict[str, str], *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxyserve", "chat", *arguments],
        input=typed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_one_message_from_a_pipe(demo: Live, environment: dict[str, str]) -> None:
    arguments = ("--url", demo.url, "-m", "atlas+qa", "-t", "0")
    plain = run(environment, *arguments, typed=HARP + "\n")
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, " harp\n", "")
    fusion = '{"rule": "dynamic", "experts": {"qa": 1}}'
    told = run(environment, "--url", demo.url, "-t", "0", "--fusion", fusion, "--json", HARP)
    assert (told.returncode, told.stderr) == (0, "")
    answer = json.loads(told.stdout)
    assert answer["message"] == {"role": "assistant", "content": " harp"}
    assert answer["fusion"]["rule"] == "dynamic" and answer["usage"]["lane_tokens"]["atlas"] > 0
    assert 0 < answer["timings"]["first_token_seconds"] <= answer["timings"]["seconds"]


def test_exit_codes(demo: Live, environment: dict[str, str]) -> None:
    refused = run(environment, "--url", demo.url, "-m", "nobody", "--json", "hello")
    error = json.loads(refused.stdout)["error"]
    assert refused.returncode == 4 and refused.stderr == ""
    assert (error["type"], error["status"], error["param"]) == ("refused", 404, "model")
    away = run(environment, "--url", "http://127.0.0.1:9", typed="hello")
    assert (away.returncode, away.stdout) == (3, "") and "cannot be reached" in away.stderr
    empty = run(environment, "--url", demo.url, typed="\n")
    assert empty.returncode == 2 and "empty" in empty.stderr


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_ctrl_c_ends_a_piped_message(environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    left = Event()

    def endless() -> Iterator[bytes]:
        try:
            while True:
                yield event(content="on and on ")
        finally:
            left.set()

    with pretend_server() as server:
        server.answers.append(endless())
        command = [sys.executable, "-m", "proxyserve", "chat", "--url", server.url, *arguments, "Tell me."]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_until(lambda: server.bodies)
        if not arguments:
            assert process.stdout is not None and process.stdout.read(9) == b"on and on"
        else:
            sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert left.wait(10), "the server was not left"
    assert process.returncode == 130 and errors == b""
