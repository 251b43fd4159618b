"""Experts that come and go run in one forward with those that are like them."""

from __future__ import annotations

from pathlib import Path

from tests.experts.contents import World
from tests.experts.kinds import proxy_kind
from tests.experts.swapping import Server, begin, check_answer, evict_standing_by, open_world

PROMPT = tuple(range(5, 26))
QA = proxy_kind({"qa": 1.0}, PROMPT)
RECORD = proxy_kind({"record": 1.0}, PROMPT)


def grouped(server: Server) -> set[str]:
    """The models that may run together. All are in one group."""
    members = [runner for runner in server.plain.residents.local if runner.group is not None]
    assert len({runner.group for runner in members}) <= 1
    assert not members or len(members[0].group or ()) == len(members)
    return {str(runner.model.key) for runner in members}


async def test_a_swap_replaces_one_member_between_two_steps(world: World, tmp_path: Path) -> None:
    with open_world(world, state_dir=tmp_path / "state", pairs="together") as server:
        assert grouped(server) == set()
        await server.put("qa", "first")
        assert grouped(server) == {"qa.tuned@1", "small@1"}
        await server.put("record", "lora")  # rows of the untuned model, in the same forward
        running = await begin(server, QA, "running")
        await server.put("qa", "second")
        assert grouped(server) == {"qa.tuned@1", "qa.tuned@2", "small@1"}
        await check_answer(server, QA, 2)
        await check_answer(server, RECORD, 1, "record")
        (answer,) = await running.all()
        expected = server.expected(QA, answer)
        assert len(expected) < len(answer.tokens) and answer.tokens[: len(expected)] == expected
        await evict_standing_by(server)
        assert grouped(server) == {"qa.tuned@2", "small@1"}
        runner = server.plain.runners[next(key for key in server.plain.runners if key.name == "small")]
        assert runner.group is not None and runner.group.forwards > 0  # type: ignore[union-attr]
        await server.delete("qa")
        await server.delete("record")
        await server.quiet()
        assert grouped(server) == set()
        assert server.holdings()["grouped"] == 0
