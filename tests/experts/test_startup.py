"""What a server has when it comes up: experts of the command line, those that were published before, and why others are
not there."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxyserve.cli.opening import Opened
from proxyserve.errors import LoadError, SwapConflict
from proxyserve.experts.audit import AUDIT, read_audit
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.experts.store import StateStore
from tests.experts.shelf import Shelf, answer, make_shelf, open_state, put, save_tiny, save_twin


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("made"), "llama")


@pytest.fixture
def root(made: Shelf, tmp_path: Path) -> Path:
    """A copy of the shelf's folders that a test may change."""
    return shutil.copytree(made.root, tmp_path / "root")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def expert(tuned: str | Source, untuned: str | Source | None = None) -> ExpertSpec:
    def source(value: str | Source) -> Source:
        return Source(value) if isinstance(value, str) else value

    return ExpertSpec(source(tuned), None if untuned is None else source(untuned))


def serving(opened: Opened) -> dict[str, int | None]:
    """The generation of each expert that is published."""
    return {
        status.name: status.generation for status in opened.experts.experts() if status.state == "published"
    }


def roll_back(opened: Opened, name: str) -> None:
    asyncio.run(opened.experts.settled(opened.experts.rollback(name, actor="operator")))


# The command line -----------------------------------------------------------------------------------------------


def test_an_expert_of_the_command_line_keeps_its_generation(root: Path, state: Path) -> None:
    line = f"qa={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line) as opened:
        assert serving(opened) == {"qa": 1} and not opened.messages
        (first,) = opened.experts.experts()
        tokens = answer(opened, "qa").tokens
    with open_state(root / "atlas", state, line) as opened:
        assert serving(opened) == {"qa": 1} and not opened.messages
        (again,) = opened.experts.experts()
        assert again.generations[0].content_hash == first.generations[0].content_hash != ""
        assert again.generations[0].created == first.generations[0].created
        assert answer(opened, "qa").tokens == tokens
    (entry,) = read_audit(state / AUDIT)
    assert (entry["actor"], entry["action"], entry["expert"], entry["generation"]) == (
        "start-up",
        "put",
        "qa",
        1,
    )
    assert entry["content_hash"] == first.generations[0].content_hash


@pytest.mark.parametrize(
    ("tuned", "kind"),
    [("lora", "lora"), ("diff-qa", "diff"), ("packed/compressed.safetensors", "compressed")],
)
def test_the_command_line_takes_every_format(
    root: Path, state: Path, made: Shelf, tuned: str, kind: str
) -> None:
    twin = {"lora": "lora-full", "diff": "qa", "compressed": "packed-full"}[kind]
    with open_state(root / "atlas", state, f"a={root}/{tuned},{root}/small") as opened:
        (status,) = opened.experts.experts()
        assert status.generations[0].formats == {"tuned": kind, "untuned": "folder"}
        found = answer(opened, "a")
    with open_state(root / "atlas", None, f"a={root}/{twin},{root}/small") as opened:
        expected = answer(opened, "a")
    assert found.tokens == expected.tokens
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    with open_state(root / "atlas", state, f"a={root}/{tuned},{root}/small") as opened:
        assert serving(opened) == {"a": 1}
        assert answer(opened, "a").tokens == found.tokens


def test_folders_are_shared_by_experts_of_the_command_line(root: Path) -> None:
    lines = [f"{name}={root}/{name},{root}/small" for name in ("qa", "record")]
    with open_state(
        root / "atlas", None, *lines, f"alone={root}/qa", f"over={root}/lora-base,{root}/atlas"
    ) as opened:
        assert {key.name for key in opened.engine.engine.runners} == {
            "atlas",
            "small",
            "qa.tuned",
            "record.tuned",
        }
        for name in ("qa", "record", "over"):
            assert len(answer(opened, name).tokens) == 12


def test_a_changed_command_line_is_a_new_generation(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, f"a={root}/qa,{root}/small") as opened:
        tokens = answer(opened, "a").tokens
    with open_state(root / "atlas", state, f"a={root}/record,{root}/small") as opened:
        assert serving(opened) == {"a": 2}
        assert answer(opened, "a").tokens != tokens
        assert opened.experts.expert("a").previous == 1
        roll_back(opened, "a")
        assert serving(opened) == {"a": 1}
        assert answer(opened, "a").tokens == tokens


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a={root}/nothing,{root}/small", "nothing"),
        ("a={root}/qa,{root}/nothing", "nothing"),
        ("a={root}/lora", "'of'"),
        ("a={root}/qa,{root}/lora", "untuned"),
        ("a={root}/lora-base,{root}/small", "lora-base"),
        ("atlas={root}/qa,{root}/small", "base"),
        ("a.b={root}/qa,{root}/small", "expert name"),
    ],
)
def test_an_expert_of_the_command_line_that_cannot_be_had_ends_the_start(
    root: Path, state: Path, line: str, said: str
) -> None:
    with (
        pytest.raises(LoadError, match=said) as caught,
        open_state(root / "atlas", state, line.format(root=root)),
    ):
        pass
    assert f"'{line.partition('=')[0]}'" in caught.value.message
    StateStore.open(state).close()  # nobody holds it any more


# What was published while a server ran --------------------------------------------------------------------------


def test_what_was_published_counts_more_than_the_same_command_line(root: Path, state: Path) -> None:
    line = f"a={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line, roots=[root]) as opened:
        put(opened, "a", expert("record", "small"))
        tokens = answer(opened, "a").tokens
    for _ in range(2):
        with open_state(root / "atlas", state, line, roots=[root]) as opened:
            assert serving(opened) == {"a": 2} and not opened.messages
            assert answer(opened, "a").tokens == tokens
    with open_state(root / "atlas", state, roots=[root]) as opened:  # and outlives it
        assert serving(opened) == {"a": 2}


def test_generations_go_on_counting(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert("qa", "small"))
        put(opened, "b", expert("lora", "small"))
        with pytest.raises(LoadError):
            put(opened, "a", expert(Source("lora", of="nobody")))
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert serving(opened) == {"a": 1, "b": 1}
        assert put(opened, "a", expert("record", "small")).generation == 3
        opened.experts.delete("b", actor="operator")
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert serving(opened) == {"a": 3}
        assert put(opened, "b", expert("lora", "small")).generation == 2


@pytest.mark.parametrize(
    "name", ["folder", "lora", "rslora", "scaled", "packed", "soup", "overbase", "cross", "plain"]
)
def test_every_format_comes_back(root: Path, state: Path, made: Shelf, name: str) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "holder", expert("record", "small"))
        status = put(opened, name, made.specs[name])
        before = answer(opened, name)
        opened.experts.delete("holder", actor="operator")
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert serving(opened) == {name: 1} and not opened.messages
        again = opened.experts.expert(name).generations[0]
        assert again.content_hash == status.generations[0].content_hash
        assert again.formats == status.generations[0].formats
        after = answer(opened, name)
    assert after.tokens == before.tokens
    assert [entry.logprob for entry in after.logprobs] == pytest.approx(
        [entry.logprob for entry in before.logprobs], abs=1e-5
    )


def test_experts_come_back_in_whatever_order_they_need_each_other(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "z", expert("qa", "small"))
        put(opened, "a", expert(Source("lora", of="small")))
        put(opened, "b", expert(Source("diff-record.safetensors", of="small")))
        answers = {name: answer(opened, name).tokens for name in ("a", "b", "z")}
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert serving(opened) == {"a": 1, "b": 1, "z": 1} and not opened.messages
        assert {name: answer(opened, name).tokens for name in ("a", "b", "z")} == answers
        assert sum(key.name.startswith("small") for key in opened.engine.engine.runners) == 1


def test_two_folders_of_one_name_are_not_mistaken(root: Path, state: Path) -> None:
    save_tiny(root / "x" / "small", "llama", seed=21)
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "y", expert("qa", "small"))
        put(opened, "x", expert("record", "x/small"))
        put(opened, "over-y", expert(Source("lora", of="small")))
        put(opened, "over-x", expert(Source("lora", of="small-2")))
        names = ("over-x", "over-y", "x", "y")
        answers = {name: answer(opened, name).tokens for name in names}
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert not opened.messages
        assert {name: answer(opened, name).tokens for name in names} == answers


def test_a_rollback_is_remembered(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert("qa", "small"))
        tokens = answer(opened, "a").tokens
        put(opened, "a", expert("record", "small"))
        roll_back(opened, "a")
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert serving(opened) == {"a": 1}
        assert answer(opened, "a").tokens == tokens
        with pytest.raises(SwapConflict):
            opened.experts.rollback("a", actor="operator")


def test_a_rollback_after_a_restart_loads_the_previous_one(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert("qa", "small"))
        tokens = answer(opened, "a").tokens
        put(opened, "a", expert("lora", "small"))
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert opened.experts.expert("a").previous == 1
        roll_back(opened, "a")
        assert serving(opened) == {"a": 1}
        assert answer(opened, "a").tokens == tokens


# Deleted, vanished, changed -------------------------------------------------------------------------------------


def test_a_deleted_expert_of_the_command_line_stays_deleted(root: Path, state: Path) -> None:
    line = f"a={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line) as opened:
        opened.experts.delete("a", actor="operator")
        assert serving(opened) == {}
    for _ in range(2):
        with open_state(root / "atlas", state, line) as opened:
            assert serving(opened) == {}
            (message,) = opened.messages
            assert "'a' was deleted" in message
    with open_state(root / "atlas", state, f"a={root}/record,{root}/small") as opened:
        assert serving(opened) == {"a": 2} and not opened.messages


def test_an_expert_that_left_the_command_line_goes(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, f"a={root}/qa,{root}/small"):
        pass
    with open_state(root / "atlas", state) as opened:
        assert serving(opened) == {}
        (message,) = opened.messages
        assert "'a' is no longer on the command line" in message
    with open_state(root / "atlas", state) as opened:
        assert not opened.messages
    assert [entry["action"] for entry in read_audit(state / AUDIT)] == ["put", "delete"]
    with open_state(root / "atlas", state, f"a={root}/qa,{root}/small") as opened:
        assert serving(opened) == {"a": 2}


LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (lambda root: (root / "qa").rename(root / "away"), "no such"),
    "changed": (
        lambda root: save_twin(root / "qa", root / "qa", lambda _, weight: 0.01 * weight),
        "have changed",
    ),
    "changed untuned": (
        lambda root: save_twin(root / "small", root / "small", lambda _, weight: 0.01 * weight),
        "have changed",
    ),
    "broken": (lambda root: (root / "qa" / "model.safetensors").write_bytes(b"broken"), "model.safetensors"),
    "emptied": (lambda root: [file.unlink() for file in (root / "qa").iterdir()], "nothing that can be"),
    "a link out": (
        lambda root: ((root / "qa").rename(root.parent / "qa"), (root / "qa").symlink_to(root.parent / "qa")),
        "outside",
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_a_published_expert_whose_files_are_lost_is_dropped_with_the_reason(
    root: Path, state: Path, how: str
) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert("qa", "small"))
        put(opened, "b", expert("record", "other"))
        before = answer(opened, "a").tokens
    kept = shutil.copytree(root, root.parent / "kept")
    change, said = LOST[how]
    change(root)
    for _ in range(2):
        with open_state(root / "atlas", state, roots=[root]) as opened:
            assert serving(opened) == {"b": 1}
            assert len(answer(opened, "b").tokens) == 12
            (message,) = opened.messages
            assert message.startswith("generation 1 of expert 'a' cannot be loaded: ") and said in message
            assert {key.name for key in opened.engine.engine.runners} == {"atlas", "other", "b.tuned"}
    shutil.rmtree(root)
    kept.rename(root)
    with open_state(root / "atlas", state, roots=[root]) as opened:  # the files are back
        assert serving(opened) == {"a": 1, "b": 1} and not opened.messages
        assert answer(opened, "a").tokens == before


def test_changed_files_of_the_command_line_are_a_new_generation(root: Path, state: Path) -> None:
    line = f"a={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line) as opened:
        tokens = answer(opened, "a").tokens
    save_twin(root / "qa", root / "record", lambda *_: None)
    with open_state(root / "atlas", state, line) as opened:
        assert serving(opened) == {"a": 2}
        assert answer(opened, "a").tokens != tokens
        (message,) = opened.messages
        assert "generation 1 of expert 'a' cannot be loaded" in message and "changed" in message
    with open_state(root / "atlas", state, line) as opened:
        assert serving(opened) == {"a": 2} and not opened.messages


def test_where_the_published_one_is_lost_the_command_line_serves(root: Path, state: Path) -> None:
    line = f"a={root}/qa,{root}/small"
    with open_state(root / "atlas", state, line, roots=[root]) as opened:
        tokens = answer(opened, "a").tokens
        put(opened, "a", expert("record", "small"))
    shutil.rmtree(root / "record")
    with open_state(root / "atlas", state, line, roots=[root]) as opened:
        assert serving(opened) == {"a": 3}
        assert answer(opened, "a").tokens == tokens
        assert len(opened.messages) == 1


def test_other_roots_are_not_read(root: Path, state: Path) -> None:
    """What a request published is checked against the roots that there are now."""
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert(str(root / "qa"), str(root / "small")))
    for roots in ([], [root / "record"]):
        with open_state(root / "atlas", state, roots=roots) as opened:
            assert serving(opened) == {}
            (message,) = opened.messages
            assert "--expert-root" in message


def test_an_unfinished_load_is_told_once(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, f"a={root}/qa,{root}/small"):
        pass
    store = StateStore.open(state)
    number = store.next_generation("b")
    store.begin("b", number, expert("record", "small"))
    store.close()
    with open_state(root / "atlas", state, f"a={root}/qa,{root}/small") as opened:
        assert serving(opened) == {"a": 1}
        (message,) = opened.messages
        assert "generation 1 of expert 'b' was not finished" in message
    with open_state(root / "atlas", state, f"a={root}/qa,{root}/small") as opened:
        assert not opened.messages


def test_a_base_that_takes_an_experts_name_drops_the_expert(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert("qa", "small"))
        put(opened, "b", expert("record", "small"))
    with open_state(root / "atlas", state, roots=[root], served_name="a") as opened:
        assert serving(opened) == {"b": 1}
        (message,) = opened.messages
        assert "'a'" in message and "base" in message
    with open_state(root / "atlas", state, roots=[root]) as opened:
        assert serving(opened) == {"a": 1, "b": 1}


def test_another_base_drops_what_does_not_fit_it(root: Path, state: Path) -> None:
    """An adapter over a base of another shape."""
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert(Source("lora-base", of="base")))
        put(opened, "b", expert("qa", "small"))
    with open_state(root / "other", state, roots=[root], served_name="atlas") as opened:
        assert serving(opened) == {"b": 1}
        (message,) = opened.messages
        assert "expert 'a'" in message


def test_another_base_of_the_same_shape_is_another_model(root: Path, state: Path) -> None:
    """An adapter that was tuned over one base is not served over another that happens to have its shape."""
    save_tiny(root / "titan", "llama", seed=31, hidden=64, layers=3, padding=24)
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert(Source("lora-base", of="base")))
    with open_state(root / "titan", state, roots=[root]) as opened:
        assert serving(opened) == {}
        (message,) = opened.messages
        assert "expert 'a'" in message


def test_more_experts_than_memory_holds_come_back(root: Path, state: Path) -> None:
    """With --evict-idle, more experts may be published than are in memory at once; a restart must not end on them."""
    folders = [f"qa-{number}" for number in range(14)]
    for number, folder in enumerate(folders, start=1):
        save_twin(root / folder, root / "small", lambda _, weight, part=number: 0.01 * part * weight)
    base, small = ((root / folder / "model.safetensors").stat().st_size for folder in ("atlas", "small"))
    memory = base + 5 * small + 2**21
    settings: dict[str, Any] = {"roots": [root], "memory": memory, "evict_idle": True, "kv_memory": 2**20}
    with open_state(root / "atlas", state, **settings) as opened:
        for folder in folders:
            put(opened, folder, expert(folder, "small"))
        states = {status.name: status.state for status in opened.experts.experts()}
        assert "parked" in states.values()
        assert opened.engine.engine.residents.bytes <= memory
    with open_state(root / "atlas", state, **settings) as opened:
        again = {status.name for status in opened.experts.experts()}
        assert again == set(states)
        assert opened.engine.engine.residents.bytes <= memory


def test_a_protected_expert_that_is_lost_does_not_end_the_start(root: Path, state: Path) -> None:
    with open_state(root / "atlas", state, roots=[root]) as opened:
        put(opened, "a", expert("qa", "small"))
    shutil.rmtree(root / "qa")
    with open_state(root / "atlas", state, roots=[root], protect=["a"]) as opened:
        assert serving(opened) == {}
        assert len(opened.messages) == 1
