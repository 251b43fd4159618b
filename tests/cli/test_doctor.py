"""`proxyserve doctor`: its plan beside a real start, and what it says of what is wrong."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from proxyserve.cli import checkup
from proxyserve.cli.findings import Finding, is_fine
from proxyserve.cli.main import app
from proxyserve.cli.opening import open_server
from proxyserve.cli.settings import ServerOptions, make_settings
from proxyserve.demo.family import family_paths
from proxyserve.engine.memory import memory_limit, scoring_bytes
from proxyserve.models.family import ExpertSource
from tests.tiny import TinyFamily


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The state folder of whoever runs the tests has nothing to do with them; speeds are measured for a moment."""
    monkeypatch.setattr(checkup, "_SECONDS", 0.0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-home"))


def doctor(*arguments: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Findings by topic."""
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    report = json.loads(result.stdout)
    assert report["ok"] is (code == 0)
    topics: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        topics.setdefault(finding["topic"], []).append(finding)
    return topics


def named(findings: list[dict[str, Any]], what: str) -> dict[str, Any]:
    (found,) = (finding for finding in findings if finding["what"] == what)
    return found


def test_the_plan_is_that_of_a_start() -> None:
    """Byte for byte, with layers that are packed twice and models that share KV memory."""
    family = family_paths()
    arguments = ["--kv-memory", "32MiB", "--dtype", "float32", "--threads", "1", "--port", "0"]
    for name, tuned in family.experts.items():
        arguments += ["--expert", f"{name}={tuned},{family.untuned}"]
    found = doctor(str(family.base), *arguments)
    given = ServerOptions(kv_memory="32MiB", dtype="float32", threads="1")
    sources = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    settings = make_settings(given)
    with open_server(
        family.base, sources, settings, served_name=None, progress=lambda message: None
    ) as opened:
        engine = opened.engine.engine
        data = named(found["models"], "memory")["data"]
        arenas = engine.residents.arenas.values()
        assert data["weights"] + data["kv"] == engine.residents.bytes
        assert data["kv"] == sum(arena.bytes for arena in arenas)
        assert data["scoring"] == scoring_bytes(engine.models.base, settings.engine)
        assert data["limit"] == memory_limit(engine.models.base.device, None, data["scoring"])
        models = {finding["what"]: finding for finding in found["models"]}
        for model in engine.models.models.values():
            assert models[model.name]["data"]["parameters"] == model.parameters  # type: ignore[union-attr]
            assert models[model.name]["data"]["context"] == model.context_length
        tokens = sorted(
            finding["data"]["kv_tokens"]
            for finding in models.values()
            if "context" in finding.get("data", {})
        )
        assert tokens[-len(arenas) :] == sorted(arena.tokens for arena in arenas)
        for name, expert in engine.models.experts.items():
            assert models[f"expert {name}"]["data"]["shared_tokens"] == len(expert.vocabulary.ids())


def test_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor("--port", "0")
    assert named(found["versions"], "torch")["status"] == "ok"
    for dtype in ("float32", "bfloat16"):
        data = named(found["processors"], f"{dtype} on cpu")["data"]
        assert data["gflops"] > 0 and data["error"] < 0.02
    assert named(found["kernels"], "torch on cpu")["status"] == "ok"
    assert named(found["memory"], "limits")["data"]["limit"] > 0
    shown = CliRunner().invoke(app, ["doctor", "--port", "0"])
    assert shown.exit_code == 0 and "0 problems, " in shown.stdout and "\x1b" not in shown.stdout
    # One that computes nonsense, and a library that is too old.
    monkeypatch.setattr(checkup, "_TOLERANCE", -1.0)
    monkeypatch.setattr(checkup.importlib.metadata, "version", lambda name: "0.0.1")
    wrong = doctor("--port", "0", code=1)
    assert named(wrong["processors"], "float32 on cpu")["status"] == "problem"
    assert "pip install 'torch>=" in named(wrong["versions"], "torch")["advice"]


@pytest.fixture
def only_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what says the same every time."""
    for part in ("versions", "packages", "processors", "kernels"):
        monkeypatch.setattr(checkup, part, lambda: iter(()))


@pytest.mark.usefixtures("only_models")
def test_models_that_cannot_be_served(tiny_family: TinyFamily, tmp_path: Path) -> None:
    base, tuned, small = str(tiny_family.base), tiny_family.experts["qa"], tiny_family.untuned
    other = Path(shutil.copytree(tuned, tmp_path / "other"))
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    torn = Path(shutil.copytree(tuned, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes(b"torn")
    for arguments, words in (
        (["--expert", f"qa={other},{small}"], "different tokenizers"),
        (["--expert", f"qa={torn},{small}"], "incomplete or damaged"),
        (["--expert", f"qa={tmp_path / 'nowhere'},{small}"], "no such folder"),
        (["--expert", f"qa={tuned},{small}", "--memory", "1KiB"], "the weights alone need"),
        (["--kv-memory", "10"], "give --kv-memory at least"),
    ):
        found = doctor(base, *arguments, "--port", "0", code=1)
        assert words in named(found["models"], "plan")["advice"]
    found = doctor(base, "--expert", f"qa={tuned},{small}", "--quantize", "int8", "--port", "0")
    whole = doctor(base, "--expert", f"qa={tuned},{small}", "--port", "0")
    sizes = [named(each["models"], "memory")["data"]["weights"] for each in (found, whole)]
    assert sizes[0] < sizes[1]


@pytest.mark.usefixtures("only_models")
def test_ports_files_and_addresses(tmp_path: Path) -> None:
    keys, state = tmp_path / "keys", tmp_path / "state"
    keys.write_text("a-key-of-somebody\n")
    keys.chmod(0o644)
    state.mkdir(mode=0o755)
    history = tmp_path / "state-home" / "proxyserve" / "chat_history"
    history.parent.mkdir(parents=True)
    history.touch(mode=0o600)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        found = doctor("--port", port, "--api-key-file", str(keys), "--state-dir", str(state))
    assert "is in use" in named(found["network"], "port")["found"]
    assert named(found["files"], "--api-key-file")["advice"] == f"chmod 600 {keys}"
    assert named(found["files"], "--state-dir")["advice"] == f"chmod 700 {state}"
    assert named(found["files"], "chat history")["status"] == "ok"
    open_to_all = doctor("--host", "0.0.0.0", "--port", "0", code=1)
    assert "--api-key-file" in named(open_to_all["network"], "address")["advice"]
    keys.write_text("sha256:nonsense\n")
    broken = doctor("--port", "0", "--api-key-file", str(keys), code=1)
    assert any(finding["status"] == "problem" for finding in broken["files"])


def test_a_warning_is_no_problem() -> None:
    assert is_fine([Finding("a", "b", "c", "warning", "do it")])
    assert not is_fine([Finding("a", "b", "c", "problem", "do it")])


def test_a_base_that_is_divided() -> None:
    """What serve would refuse is refused, and of the base one part is counted."""
    base = str(family_paths().base)
    whole = named(doctor(base, "--port", "0")["models"], "atlas")
    found = doctor(base, "--port", "0", "--tensor-parallel", "2")["models"]
    assert named(found, "atlas")["data"]["weights"] == -(-whole["data"]["weights"] // 2)
    assert "--tensor-parallel" in named(found, "plan")["found"]
    plan = named(doctor(base, "--port", "0", "--tensor-parallel", "7", code=1)["models"], "plan")
    assert "--tensor-parallel 7 does not divide" in plan["advice"]
