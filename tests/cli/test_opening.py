"""From settings to a server: presets that come back, memory, a base on another server, and the command itself."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from proxyserve.api.errors import StartupError
from proxyserve.api.presets import parse_fusion
from proxyserve.cli.opening import Opened
from proxyserve.engine import settling
from proxyserve.errors import InvalidRequest, LoadError, ProxyserveError
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.experts.store import StateError, StateStore
from proxyserve.models.loading import whole_model
from proxyserve.models.upstream import RemoteSource
from proxyserve.text.tokenizer import Tokenizer
from tests.cli.in_process import run_command
from tests.cli.test_startup import shown
from tests.engine.driver import Collected, run, submission
from tests.engine.test_settling import stored_as
from tests.engine.upstream import FakeUpstream, serve_fake
from tests.experts.shelf import Shelf, answer, make_shelf, open_state, put

PROMPT = (5, 17, 200, 33)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("made"), "llama")


@pytest.fixture
def root(made: Shelf, tmp_path: Path) -> Path:
    return shutil.copytree(made.root, tmp_path / "root")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


QA = ExpertSpec(Source("qa"), Source("small"))
RECORD = ExpertSpec(Source("record"), Source("small"))


def put_preset(opened: Opened, name: str, value: Mapping[str, Any]) -> None:
    opened.experts.put_preset(name, value, actor="operator")


def of_preset(opened: Opened, name: str) -> Collected:
    engine = opened.engine.engine
    fusion = engine.catalog.presets[name]
    return run(engine, [submission("r", PROMPT, fusion=fusion, logprobs=0)])["r/0"]


def test_the_dtype_is_that_of_experts_that_come_back_too(
    root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was published in float32 is not cast because base and command line are in bfloat16."""
    line = f"record={root}/record,{root}/small"
    monkeypatch.setattr(settling, "time_dtypes", lambda _, dtypes: {dtypes[0]: 2.0, dtypes[1]: 1.0})
    for name in ("atlas", "small", "record"):
        shutil.move(root / name, root / "before")
        stored_as(root / "before", root / name, torch.bfloat16)
        shutil.rmtree(root / "before")
    with open_state(root / "atlas", state, line, roots=[root], dtype="auto") as opened:
        assert opened.computing.startswith("torch.bfloat16 (bfloat16 measured 2 times as fast as float32), ")
        put(opened, "qa", QA)
    with open_state(root / "atlas", state, line, roots=[root], dtype="auto") as opened:
        assert opened.computing.startswith("torch.float32 (as stored), ")
        assert {"qa", "record"} <= set(opened.engine.engine.models.experts)
    shutil.rmtree(root / "qa")  # what cannot be found does not count
    with open_state(root / "atlas", state, line, roots=[root], dtype="auto") as opened:
        assert opened.computing.startswith("torch.bfloat16 ")


# Presets --------------------------------------------------------------------------------------------------------


def test_presets_come_back(root: Path, state: Path) -> None:
    values = {"half": {"experts": {"qa": 0.5}}, "dynamic": {"rule": "dynamic", "experts": {"qa": 1}}}
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "qa", QA)
        for name, value in values.items():
            put_preset(opened, name, value)
        answers = {name: of_preset(opened, name).tokens for name in values}
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert not opened.messages
        assert opened.experts.presets() == values
        assert {name: of_preset(opened, name).tokens for name in values} == answers
        opened.experts.delete_preset("half", actor="operator")
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert list(opened.experts.presets()) == ["dynamic"]


def test_a_preset_of_the_command_line_wins(root: Path, state: Path) -> None:
    line = f"qa={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line) as opened:
        put_preset(opened, "mine", {"experts": {"qa": 0.5}})
    presets = {"mine": '{"experts": {"qa": 0.25}}'}
    with open_state(root / "atlas", state, line, presets=presets) as opened:
        assert opened.experts.presets() == {"mine": {"experts": {"qa": 0.25}}}
        assert opened.engine.engine.catalog.presets["mine"] == parse_fusion({"experts": {"qa": 0.25}})
    with open_state(root / "atlas", state, line) as opened:
        assert opened.experts.presets() == {"mine": {"experts": {"qa": 0.5}}}


def test_presets_that_cannot_work_are_dropped_with_the_reason(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "qa", QA)
        put(opened, "record", RECORD)
        put(opened, "lone", ExpertSpec(Source("record")))
        put_preset(opened, "good", {"experts": {"record": 0.5}})
        put_preset(opened, "lost", {"experts": {"qa": 0.5, "record": 0.1}})
        put_preset(opened, "lonely", {"rule": "arm", "experts": {"lone": 0.5}})
    shutil.move(root / "qa", root / "away")
    for _ in range(2):
        with open_state(root / "atlas", state, roots=[root]) as opened:
            assert sorted(opened.experts.presets()) == ["good", "lonely"]
            assert len(of_preset(opened, "good").tokens) == 12
            (message,) = [message for message in opened.messages if message.startswith("preset")]
            assert message.startswith("preset 'lost' is dropped: ") and "'qa'" in message
    shutil.move(root / "away", root / "qa")
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert sorted(opened.experts.presets()) == ["good", "lonely", "lost"]


def test_a_preset_that_other_weights_rule_out_is_dropped(root: Path, state: Path) -> None:
    """Where the files of an expert are others now, without an untuned model."""
    line = f"qa={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line) as opened:
        put_preset(opened, "mine", {"experts": {"qa": 0.5}})
    with open_state(root / "atlas", state, f"qa={root}/qa") as opened:
        assert opened.experts.presets() == {}
        (message,) = opened.messages
        assert "'mine' is dropped" in message and "untuned" in message


def test_a_preset_whose_name_is_taken_is_dropped(root: Path, state: Path) -> None:
    line = f"qa={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line) as opened:
        put_preset(opened, "mine", {"experts": {"qa": 0.5}})
        put_preset(opened, "titan", {"experts": {"qa": 0.5}})
    mine = f"mine={root}/record,{root}/small"
    with open_state(root / "atlas", state, line, mine, served_name="titan") as opened:
        assert opened.experts.presets() == {}
        assert sorted(message.partition(":")[0] for message in opened.messages) == [
            "preset 'mine' is dropped",
            "preset 'titan' is dropped",
        ]


def test_a_preset_of_a_parked_expert_is_kept(root: Path, state: Path) -> None:
    """Its expert is loaded when it is called."""
    with open_state(root / "atlas", None, roots=[root], max_batch=1, kv_memory=2**18) as opened:
        put(opened, "qa", QA)
        memory = opened.engine.engine.residents.bytes + 1000
    settings: dict[str, Any] = {"roots": [root], "max_batch": 1, "kv_memory": 2**18}
    settings |= {"memory": memory, "evict_idle": True}
    with open_state(root / "atlas", state, **settings) as opened:
        put(opened, "qa", QA)
        put_preset(opened, "mine", {"experts": {"qa": 0.5}})
        put(opened, "record", RECORD)
        assert opened.experts.expert("qa").state == "parked"
    with open_state(root / "atlas", state, **settings) as opened:
        assert {status.name for status in opened.experts.experts()} == {"qa", "record"}
        assert list(opened.experts.presets()) == ["mine"]
        asyncio.run(opened.experts.wake("qa", 20.0))
        assert len(of_preset(opened, "mine").tokens) == 12


# Memory and other settings --------------------------------------------------------------------------------------


def test_memory_that_does_not_hold_the_command_line_ends_the_start(root: Path, state: Path) -> None:
    line = f"qa={root}/qa,{root}/small"
    with (
        pytest.raises((StartupError, LoadError), match=r"--memory|--kv-memory"),
        open_state(root / "atlas", state, line, memory=1_000_000, kv_memory=2**19),
    ):
        pass
    StateStore.open(state).close()


def test_a_state_folder_is_for_one_server(root: Path, state: Path) -> None:
    with (
        open_state(root / "atlas", state),
        pytest.raises(StateError, match="in use by another server"),
        open_state(root / "atlas", state),
    ):
        pass
    with open_state(root / "atlas", state):
        pass


def test_without_a_state_folder_nothing_survives(root: Path) -> None:
    for _ in range(2):
        with open_state(root / "atlas", None, roots=[root]) as opened:
            assert opened.experts.experts() == []
            assert put(opened, "qa", QA).generation == 1


def test_protection_of_an_unknown_expert_ends_the_start(root: Path) -> None:
    line = f"qa={root}/qa,{root}/small"
    with (
        pytest.raises(StartupError, match="--protect nobody"),
        open_state(root / "atlas", None, line, protect=["nobody"]),
    ):
        pass


def test_protection_of_the_command_line_outlives_swaps(root: Path, state: Path) -> None:
    line = f"qa={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line, roots=[root], protect=["qa"]) as opened:
        assert "qa" in opened.engine.engine.policy.protected
        put(opened, "qa", RECORD)
        assert "qa" in opened.engine.engine.policy.protected
        put(opened, "other", ExpertSpec(Source("lora"), Source("small"), protected=True))
        assert opened.engine.engine.policy.protected == {"qa", "other"}
        opened.experts.delete("other", actor="operator")
        assert opened.engine.engine.policy.protected == {"qa"}
    with open_state(root / "atlas", state, line, roots=[root]) as opened:
        assert opened.engine.engine.policy.protected == set()


def test_without_roots_nothing_can_be_loaded(root: Path) -> None:
    with open_state(root / "atlas", None) as opened:
        for text in ("qa", str(root / "qa"), "org/name"):
            with pytest.raises(InvalidRequest, match="--expert-root"):
                opened.experts.put("qa", ExpertSpec(Source(text)), actor="operator")
        with pytest.raises(ProxyserveError):  # what is here can still be named
            put(opened, "qa", ExpertSpec(Source(of="nobody")))


# A base on another server ---------------------------------------------------------------------------------------


class Laws:
    """Of a folder's model in float64."""

    def __init__(self, folder: Path, width: int) -> None:
        self._model = whole_model(AutoModelForCausalLM, folder, str(folder), dtype=torch.float64).eval()
        self._width = width

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> Tensor:
        logits = self._model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1, : self._width]
        return torch.log_softmax(logits, dim=0)


@pytest.fixture
def remote(root: Path) -> Iterator[RemoteSource]:
    """The tiny base behind HTTP; every law is returned whole."""
    tokenizer = Tokenizer.load(root / "atlas")
    law = Laws(root / "atlas", tokenizer.vocabulary_size)
    with serve_fake(FakeUpstream(law, tokenizer)) as upstream:
        yield RemoteSource(upstream.url, root / "atlas", top_k=1000)


def fused_law(root: Path, tuned: str, untuned: str, weight: float, ids: Sequence[int]) -> Tensor:
    width = Tokenizer.load(root / "atlas").vocabulary_size
    base, ours, theirs = (Laws(root / name, width)(ids) for name in ("atlas", tuned, untuned))
    return torch.log_softmax(base + weight * (ours - theirs), dim=0)


def test_experts_over_a_remote_base_are_swapped(root: Path, state: Path, remote: RemoteSource) -> None:
    """In every format, with answers that are those of the fused law over the whole base."""
    twins = {
        "folder": (QA, "qa"),
        "adapter": (ExpertSpec(Source("lora"), Source("small")), "lora-full"),
        "diff": (ExpertSpec(Source("diff-qa", of="small")), "qa"),
        "compressed": (ExpertSpec(Source("packed", of="small")), "packed-full"),
        "merge": (
            ExpertSpec(Source(of="small", merge=((0.6, Source("qa")), (-0.4, Source("record"))))),
            "soup-full",
        ),
    }
    with open_state(remote, state, roots=[root]) as opened:
        assert opened.experts.experts() == []
        for generation, (spec, twin) in enumerate(twins.values(), start=1):
            assert put(opened, "a", spec).generation == generation
            result = answer(opened, "a", prompt=PROMPT)
            assert result.last and result.last.fusion
            assert result.last.fusion.generations == {"a": generation}
            law = fused_law(root, twin, "small", 1.0, [*PROMPT, *result.tokens[:-1]])
            assert result.logprobs[-1].logprob == pytest.approx(law[result.tokens[-1]].item(), abs=1e-4)
            assert result.tokens[-1] == int(law.argmax())
        before = result.tokens
    with open_state(remote, state, roots=[root]) as opened:
        assert opened.experts.expert("a").generation == len(twins) and not opened.messages
        assert answer(opened, "a", prompt=PROMPT).tokens == before
        opened.experts.delete("a", actor="operator")
        assert {key.name for key in opened.engine.engine.runners} == {opened.engine.engine.models.base.name}


def test_nothing_runs_over_a_remote_base(root: Path, remote: RemoteSource) -> None:
    with open_state(remote, None, roots=[root]) as opened:
        assert "no drafts: over a remote base there are none" in shown(opened.engine.engine)
        for of in ("base", opened.engine.engine.models.base.name):
            with pytest.raises(LoadError, match="no loaded model"):
                put(opened, "a", ExpertSpec(Source("lora-base", of=of)))
            with pytest.raises(LoadError, match="no loaded model"):
                put(opened, "a", ExpertSpec(Source("qa"), Source(of=of)))
        assert [key.name for key in opened.engine.engine.runners] == [opened.engine.engine.models.base.name]


# The command ----------------------------------------------------------------------------------------------------


def test_errors_of_the_command_line_are_one_line(root: Path, tmp_path: Path) -> None:
    def serve(*arguments: str) -> tuple[int, str]:
        done = run_command("serve", str(root / "atlas"), "--port", "1", *arguments)
        return done.returncode, done.stderr.strip().splitlines()[-1]

    (root / "bad" / "adapter").mkdir(parents=True)
    (root / "bad" / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    state = tmp_path / "state"
    state.mkdir()
    (state / "state.db").write_text("no database")
    for arguments, said in (
        (("--expert", f"a={root}/bad/adapter,{root}/small"), "expert 'a': "),
        (("--expert", f"a={root}/lora"), "expert 'a': "),
        (("--state-dir", str(state)), "state.db"),
    ):
        code, line = serve(*arguments)
        assert code == 1, line
        assert line.startswith("error: ") and said in line
