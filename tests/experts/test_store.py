"""What the store says after a restart equals what was last done, whatever ended the process."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from proxyserve.errors import SwapConflict, UnknownModel
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.experts.store import Restored, StateError, StateStore, StoredExpert, StoredGeneration
from tests.experts.store_twin import Twin, perform, without_specs
from tests.experts.strategies import SPECS

SPEC = ExpertSpec(Source("/experts/qa"))
EMPTY = Restored((), {}, {}, ())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    store = StateStore.open(tmp_path)
    yield store
    store.close()


def published(store: StateStore, name: str = "qa", *, origin: str | None = None) -> StoredGeneration:
    """A new generation of the expert, which serves."""
    generation = store.next_generation(name)
    spec = ExpertSpec(Source(f"/experts/{name}/{generation}"))
    stored = StoredGeneration(name, generation, spec, f"{generation:064x}", 1000.5 + generation)
    store.begin(name, generation, spec)
    store.publish(stored, origin=origin)
    return stored


def reopened(store: StateStore, folder: Path) -> Restored:
    """What a restart finds."""
    store.close()
    again = StateStore.open(folder)
    restored = again.restore()
    again.close()
    return restored


# What is kept ---------------------------------------------------------------------------------------------------


def test_a_new_folder_is_empty(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path / "not" / "there" / "yet")
    assert store.restore() == EMPTY
    store.close()
    assert (tmp_path / "not/there/yet").stat().st_mode & 0o077 == 0


def test_what_serves_and_what_served_before_it_survive(store: StateStore, tmp_path: Path) -> None:
    published(store)
    second, third = published(store), published(store)
    other = published(store, "bio", origin="bio=/experts/bio")
    assert reopened(store, tmp_path).experts == (
        StoredExpert("bio", other, None, "bio=/experts/bio"),
        StoredExpert("qa", third, second, None),
    )


def test_a_rollback_goes_one_step_back_and_not_forth_again(store: StateStore, tmp_path: Path) -> None:
    first, _ = published(store), published(store)
    assert store.roll_back("qa") == StoredExpert("qa", first, None, None)
    with pytest.raises(SwapConflict, match="'qa' cannot be rolled back"):
        store.roll_back("qa")
    assert reopened(store, tmp_path).experts == (StoredExpert("qa", first, None, None),)


def test_a_rollback_of_nothing_is_refused(store: StateStore) -> None:
    with pytest.raises(UnknownModel, match="no expert 'qa'"):
        store.roll_back("qa")


def test_numbers_go_on_after_rollbacks_deletes_failures_and_restarts(tmp_path: Path) -> None:
    store = StateStore.open(tmp_path)
    published(store), published(store)
    store.roll_back("qa")
    assert store.next_generation("qa") == 3
    store.fail("qa", 3, "no such file")
    store.delete("qa")
    assert store.next_generation("qa") == 4
    store.close()
    store = StateStore.open(tmp_path)
    assert published(store).generation == 5
    assert store.next_generation("bio") == 1
    store.close()


def test_a_number_that_was_never_reserved_is_a_defect_of_the_caller(store: StateStore) -> None:
    published(store)
    with pytest.raises(ValueError, match="generation 2 of 'qa' was never reserved"):
        store.begin("qa", 2, SPEC)
    with pytest.raises(ValueError, match="generation 2 of 'qa' was never reserved"):
        store.publish(StoredGeneration("qa", 2, SPEC, "", 0.0))


def test_an_older_generation_is_not_published_over_a_newer_one(store: StateStore, tmp_path: Path) -> None:
    old = store.next_generation("qa")
    new = published(store)
    with pytest.raises(ValueError, match="older than 2, which serves"):
        store.publish(StoredGeneration("qa", old, SPEC, "", 0.0))
    assert reopened(store, tmp_path).experts == (StoredExpert("qa", new, None, None),)


def test_publishing_the_generation_that_serves_leaves_the_previous_one(
    store: StateStore, tmp_path: Path
) -> None:
    first, second = published(store), published(store)
    store.begin("qa", second.generation, second.spec)
    store.publish(second)
    assert reopened(store, tmp_path) == Restored((StoredExpert("qa", second, first, None),), {}, {}, ())


def test_a_load_that_did_not_end_is_reported_once_and_changes_nothing(
    store: StateStore, tmp_path: Path
) -> None:
    first = published(store)
    store.begin("qa", store.next_generation("qa"), ExpertSpec(Source("/experts/new")))
    restored = reopened(store, tmp_path)
    assert restored.experts == (StoredExpert("qa", first, None, None),)
    (message,) = restored.dropped
    assert message.startswith("the load of generation 2 of expert 'qa' was not finished")
    assert "/experts/new" in message
    assert reopened(StateStore.open(tmp_path), tmp_path).dropped == ()


def test_the_last_error_stays_until_a_newer_generation_serves(store: StateStore) -> None:
    published(store)
    generation = store.next_generation("qa")
    store.begin("qa", generation, SPEC)
    store.fail("qa", generation, "NaN on the probe")
    restored = store.restore()
    assert (restored.last_errors, restored.dropped) == ({"qa": "NaN on the probe"}, ())
    published(store)
    assert store.restore().last_errors == {}


def test_a_deleted_expert_of_the_command_line_leaves_its_text(store: StateStore, tmp_path: Path) -> None:
    published(store, "qa", origin="qa=/experts/qa")
    published(store, "bio")
    store.delete("qa")
    store.delete("bio")
    assert reopened(store, tmp_path) == Restored((), {}, {"qa": "qa=/experts/qa"}, ())


def test_the_control_plane_keeps_the_text_of_the_command_line(store: StateStore) -> None:
    published(store, origin="qa=/experts/qa")
    published(store)
    assert store.restore().experts[0].origin == "qa=/experts/qa"
    store.delete("qa")
    published(store)
    assert store.restore().deleted == {}
    assert store.restore().experts[0].origin == "qa=/experts/qa"
    published(store, origin="qa=/experts/other")
    assert store.restore().experts[0].origin == "qa=/experts/other"


def test_presets_come_back_as_they_were_given(store: StateStore, tmp_path: Path) -> None:
    value = {"rule": "proxy", "experts": {"qa": 0.1, "bio": {"weight": 2, "schedule": [[0, 1.0]]}}, "x": None}
    store.put_preset("a", {"rule": "arm"})
    store.put_preset("a", value)
    store.put_preset("gone", {})
    store.delete_preset("gone")
    store.delete_preset("never there")
    restored = reopened(store, tmp_path)
    assert restored.presets == {"a": value}
    assert json.dumps(restored.presets["a"]) == json.dumps(value)


def test_paths_and_errors_that_are_no_unicode_survive(store: StateStore, tmp_path: Path) -> None:
    odd = os.fsdecode(b"/experts/\xff\n\x00'\"")
    generation = store.next_generation("qa")
    stored = StoredGeneration("qa", generation, ExpertSpec(Source(odd)), "", 0.0)
    store.publish(stored, origin=f"qa={odd}")
    store.fail("qa", generation, odd)
    restored = reopened(store, tmp_path)
    assert restored.experts == (StoredExpert("qa", stored, None, f"qa={odd}"),)
    assert restored.last_errors == {"qa": odd}


def test_a_value_that_is_no_json_is_not_stored(store: StateStore) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.put_preset("a", {"weight": float("nan")})
    assert store.restore() == EMPTY


def test_without_a_folder_nothing_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = StateStore.open(None)
    stored = published(store)
    assert store.restore().experts == (StoredExpert("qa", stored, None, None),)
    store.close()
    again = StateStore.open(None)
    assert again.restore() == EMPTY
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_threads_never_get_the_same_number(store: StateStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: store.next_generation("qa"), range(120)))
    assert sorted(numbers) == list(range(1, 121))


# One server per folder ------------------------------------------------------------------------------------------


def test_a_second_server_is_refused_until_the_first_is_gone(store: StateStore, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="in use by another server"):
        StateStore.open(tmp_path)
    code = """
        import sys
        from pathlib import Path
        from proxyserve.experts.store import StateStore
        StateStore.open(Path(sys.argv[1]))
    """
    other = run_python(code, str(tmp_path))
    assert other.returncode == 1
    assert "StateError: The state folder" in other.stderr
    store.close()
    assert run_python(code, str(tmp_path)).returncode == 0


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    first = StateStore.open(tmp_path)
    first.close()
    second = StateStore.open(tmp_path)
    first.close()
    with pytest.raises(StateError, match="in use"):
        StateStore.open(tmp_path)
    second.close()


def test_a_refused_folder_is_not_kept_locked(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_text("no database")
    with pytest.raises(StateError):
        StateStore.open(tmp_path)
    (tmp_path / "state.db").unlink()
    StateStore.open(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"file/state cannot be made: Not a directory"):
        StateStore.open(tmp_path / "file" / "state")


# Damage ---------------------------------------------------------------------------------------------------------


def filled(folder: Path) -> Path:
    """A closed store with experts, a tombstone, an error, and presets over several pages. Its file."""
    store = StateStore.open(folder)
    published(store, origin="qa=/experts/qa"), published(store)
    published(store, "bio")
    published(store, "gone", origin="gone=/experts/gone")
    store.delete("gone")
    store.fail("bio", 1, "no such file")
    for number in range(20):
        store.put_preset(f"preset-{number}", {"rule": "proxy", "note": str(number) * 2000})
    store.close()
    return folder / "state.db"


def change(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def require_refused(folder: Path, match: str) -> None:
    """The restart stops with the name of the file and a remedy, and leaves the file alone."""
    before = (folder / "state.db").read_bytes()
    with pytest.raises(StateError, match=match) as caught:
        StateStore.open(folder).restore()
    assert str(folder / "state.db") in caught.value.message
    assert "to start empty" in caught.value.message
    assert (folder / "state.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}", b"no database " * 1000], ids=["empty", "short", "long"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.db").write_bytes(content)
    require_refused(tmp_path, "damaged")


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    change(tmp_path / "state.db", "CREATE TABLE names (name TEXT)", "PRAGMA user_version = 1")
    require_refused(tmp_path, "it is no state of proxyserve")


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    change(filled(tmp_path), "PRAGMA user_version = 99")
    require_refused(tmp_path, "has format 99, this program reads 1")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = filled(tmp_path)
    os.truncate(file, file.stat().st_size // 2)
    require_refused(tmp_path, "damaged")


def test_a_damaged_page_is_refused(tmp_path: Path) -> None:
    file = filled(tmp_path)
    content = bytearray(file.read_bytes())
    content[4096 * 2 : 4096 * 2 + 64] = b"\xa5" * 64
    file.write_bytes(content)
    require_refused(tmp_path, "damaged")


def test_one_wrong_letter_in_a_name_is_refused(tmp_path: Path) -> None:
    """Names are in a table and in its index."""
    file = filled(tmp_path)
    content = file.read_bytes()
    assert content.count(b"preset-13") > 1
    file.write_bytes(content.replace(b"preset-13", b"preset-1x", 1))
    require_refused(tmp_path, "damaged")


@pytest.mark.parametrize("text", ["'{'", "'7'", "x'00'", "CAST(x'ff' AS TEXT)"])
@pytest.mark.parametrize(
    "column",
    ["generations.spec", "names.origin", "names.error", "presets.value"],
)
def test_a_row_without_its_json_is_refused(tmp_path: Path, column: str, text: str) -> None:
    table, _, name = column.partition(".")
    change(filled(tmp_path), f"UPDATE {table} SET {name} = {text} WHERE {name} IS NOT NULL")
    require_refused(tmp_path, "should hold JSON|decode to UTF-8")


UNKNOWN = '{"tuned":{"path":"/experts/qa","format":"quantum"}}'


@pytest.mark.parametrize("spec", [UNKNOWN, "{}", '{"tuned":7}', '{"tuned":{"path":"x","scale":1e999}}'])
def test_an_expert_whose_spec_means_nothing_is_reported_and_the_others_serve(
    tmp_path: Path, spec: str
) -> None:
    file = filled(tmp_path)
    change(file, f"UPDATE generations SET spec = '{spec}' WHERE expert = 'qa' AND role = 'published'")
    for _ in range(2):  # it stays in the file, for a program that can read it
        store = StateStore.open(tmp_path)
        restored = store.restore()
        assert [expert.name for expert in restored.experts] == ["bio"]
        assert len(restored.presets) == 20
        (message,) = restored.dropped
        assert "published generation 2 of expert 'qa' means nothing to this program" in message
        assert spec in message
        assert "qa" not in restored.deleted
        assert store.next_generation("qa") > 2
        store.close()


def test_a_previous_generation_whose_spec_means_nothing_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    change(filled(tmp_path), f"UPDATE generations SET spec = '{UNKNOWN}' WHERE role = 'previous'")
    store = StateStore.open(tmp_path)
    restored = store.restore()
    qa = restored.experts[1]
    assert (qa.published.generation, qa.previous) == (2, None)
    assert "previous generation 1 of expert 'qa'" in restored.dropped[0]
    with pytest.raises(SwapConflict, match="means nothing to this program"):
        store.roll_back("qa")
    assert store.restore() == restored
    store.close()


def test_a_folder_that_was_not_filled_to_the_end_is_filled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(StateError, match=r"state\.db cannot be made: Input/output error"):
            StateStore.open(tmp_path)
    assert not (tmp_path / "state.db").exists()
    (tmp_path / "state.db.new").write_bytes(b"half of it")
    (tmp_path / "state.db.new-journal").write_bytes(b"a journal of it")
    store = StateStore.open(tmp_path)
    assert store.restore() == EMPTY
    store.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.db", "state.lock"]


def test_a_journal_without_its_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db-journal").write_bytes(b"something")
    with pytest.raises(StateError, match=r"state\.db-journal is there without state\.db"):
        StateStore.open(tmp_path)
    assert not (tmp_path / "state.db").exists()


def test_a_file_moved_away_while_in_use_is_noticed(store: StateStore, tmp_path: Path) -> None:
    stored = published(store)
    (tmp_path / "state.db").rename(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="moved away while in use"):
        store.delete("qa")
    (tmp_path / "elsewhere").rename(tmp_path / "state.db")
    assert reopened(store, tmp_path).experts == (StoredExpert("qa", stored, None, None),)


def test_a_full_disk_refuses_the_change_and_harms_nothing(store: StateStore) -> None:
    stored = published(store)
    ((pages,),) = store._connection.execute("PRAGMA page_count").fetchall()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StateError, match="disk is full"):
        store.put_preset("a", {"note": "x" * 100_000})
    assert store.restore() == Restored((StoredExpert("qa", stored, None, None),), {}, {}, ())
    store._connection.execute("PRAGMA max_page_count = 1000000")
    store.put_preset("a", {"note": "x" * 100_000})
    assert list(store.restore().presets) == ["a"]


def test_a_backup_is_taken_while_the_server_runs(store: StateStore, tmp_path: Path) -> None:
    stored = published(store)
    (tmp_path / "backup").mkdir()
    source, target = sqlite3.connect(tmp_path / "state.db"), sqlite3.connect(tmp_path / "backup/state.db")
    source.backup(target)
    source.close()
    target.close()
    store.delete("qa")
    restored = reopened(StateStore.open(tmp_path / "backup"), tmp_path / "backup")
    assert restored.experts == (StoredExpert("qa", stored, None, None),)


# Power failures -------------------------------------------------------------------------------------------------


def test_a_change_waits_for_the_disk(store: StateStore) -> None:
    """SQLite's own tests are about what these settings hold; EXTRA is 3."""
    assert store._connection.execute("PRAGMA synchronous").fetchall() == [(3,)]
    assert store._connection.execute("PRAGMA journal_mode").fetchall() == [("delete",)]


def test_half_a_change_in_the_file_is_taken_back(tmp_path: Path) -> None:
    """With a cache too small for it, a transaction reaches the file before it is committed."""
    file = filled(tmp_path)
    whole = file.read_bytes()
    expected = reopened(StateStore.open(tmp_path), tmp_path)
    code = """
        import os, signal, sqlite3, sys
        connection = sqlite3.connect(sys.argv[1])
        connection.execute("PRAGMA cache_size = 2")
        connection.execute("UPDATE presets SET value = upper(value)")
        connection.execute("UPDATE generations SET generation = generation + 100")
        connection.execute("UPDATE presets SET value = '{}'")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, str(file)).returncode == -signal.SIGKILL
    assert file.with_name("state.db-journal").exists()
    assert file.read_bytes() != whole
    assert reopened(StateStore.open(tmp_path), tmp_path) == expected


# kill -9 --------------------------------------------------------------------------------------------------------


class Restless:
    """The process of restless.py, and what it said."""

    def __init__(self, folder: Path, seed: int, repository: Path) -> None:
        command = [sys.executable, str(repository / "tests/experts/restless.py"), str(folder), str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)

    def killed(self, lines: int, seconds: float) -> list[dict[str, Any]]:
        """All that it said until it was killed, `seconds` after so many lines."""
        assert self.process.stdout is not None
        said = [self.process.stdout.readline() for _ in range(lines)]
        time.sleep(seconds)  # what is under way then is what the test is about
        self.process.kill()
        rest = self.process.communicate()[0].splitlines(keepends=True)
        assert self.process.returncode == -signal.SIGKILL
        return [json.loads(line) for line in [*said, *rest] if line.endswith(b"\n")]


@pytest.mark.slow
def test_killed_at_any_moment_the_store_is_that_before_or_after_the_change_under_way(
    tmp_path: Path, repository: Path
) -> None:
    random = Random(5)
    folder = tmp_path / "state"
    twin = Twin()
    under_way_when_killed = 0
    for seed in range(50):
        lines = random.randrange(1, 60)
        if seed % 5 == 0:  # killed while the folder is filled
            shutil.rmtree(folder, ignore_errors=True)
            twin = Twin()
            lines = 1
        said = Restless(folder, seed, repository).killed(lines, random.uniform(0, 0.003))
        under_way = None
        for line in said[1:]:
            if "do" in line:
                under_way = (line["do"], line["with"])
                continue
            method, arguments = under_way or ("", {})
            under_way = None
            if method == "next_generation":
                # One that nobody was told of, since the process was killed, is lost.
                assert line["done"] > twin.last.get(arguments["expert"], 0)
                twin.last[arguments["expert"]] = line["done"]
            else:
                assert perform(twin, method, arguments) == line["done"]
        outcomes = [twin]
        if under_way is not None:
            under_way_when_killed += 1
            outcomes.append(copy.deepcopy(twin))
            perform(outcomes[1], *under_way)
        found = without_specs(reopened(StateStore.open(folder), folder))
        allowed = [outcome.restore() for outcome in outcomes]
        assert found in allowed, f"seed {seed}, killed in {under_way}"
        twin = outcomes[allowed.index(found)]
    assert under_way_when_killed > 0


# Against plain dicts --------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["qa", "bio", "Record-2"])
GENERATIONS = st.integers(0, 6)
VALUES = st.dictionaries(
    st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text(max_size=3), max_size=2
)


class StoreAndTwin(RuleBasedStateMachine):
    """Whatever is called, in whatever order, both do and say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = StateStore.open(self.folder)
        self.twin = Twin()

    def teardown(self) -> None:
        self.restart()
        self.store.close()
        shutil.rmtree(self.folder)

    def both(self, method: str, **arguments: Any) -> Any:
        result = perform(self.store, method, arguments)
        assert result == perform(self.twin, method, arguments)
        return result

    @rule(expert=NAMES, spec=SPECS, created=st.floats(0, 1e10), origin=st.none() | st.text(max_size=4))
    def swap(self, expert: str, spec: ExpertSpec, created: float, origin: str | None) -> None:
        generation = self.both("next_generation", expert=expert)
        self.begin(expert, generation, spec)
        self.publish(expert, generation, spec, created, origin)

    @rule(expert=NAMES)
    def reserve(self, expert: str) -> None:
        self.both("next_generation", expert=expert)

    @rule(expert=NAMES, generation=GENERATIONS, spec=SPECS)
    def begin(self, expert: str, generation: int, spec: ExpertSpec) -> None:
        self.both("begin", expert=expert, generation=generation, spec=spec.as_json())

    @rule(expert=NAMES, generation=GENERATIONS, error=st.text(max_size=4))
    def fail(self, expert: str, generation: int, error: str) -> None:
        self.both("fail", expert=expert, generation=generation, error=error)

    @rule(
        expert=NAMES,
        generation=GENERATIONS,
        spec=SPECS,
        created=st.floats(0, 1e10),
        origin=st.none() | st.text(max_size=4),
    )
    def publish(
        self, expert: str, generation: int, spec: ExpertSpec, created: float, origin: str | None
    ) -> None:
        self.both(
            "publish",
            expert=expert,
            generation=generation,
            spec=spec.as_json(),
            content_hash=f"{generation:064x}",
            created=created,
            origin=origin,
        )

    @rule(expert=NAMES)
    def roll_back(self, expert: str) -> None:
        self.both("roll_back", expert=expert)

    @rule(expert=NAMES)
    def delete(self, expert: str) -> None:
        self.both("delete", expert=expert)

    @rule(name=NAMES, value=VALUES)
    def put_preset(self, name: str, value: Mapping[str, Any]) -> None:
        self.both("put_preset", name=name, value=value)

    @rule(name=NAMES)
    def delete_preset(self, name: str) -> None:
        self.both("delete_preset", name=name)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = StateStore.open(self.folder)
        assert without_specs(self.store.restore()) == self.twin.restore()


TestStoreAndTwin = StoreAndTwin.TestCase
TestStoreAndTwin.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=root
    )
