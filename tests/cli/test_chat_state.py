"""A conversation without a server: what is asked for after each command, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from proxyserve.cli.chat_session import _pairs, harmless
from proxyserve.cli.chat_state import CommandError, Conversation, parse_value
from proxyserve.cli.connection import lines_of


@pytest.fixture
def talk() -> Conversation:
    return Conversation("atlas", "atlas+qa")


def test_experts_are_a_name_until_there_is_a_rule(talk: Conversation) -> None:
    talk.weigh("guard", -0.25)
    assert talk.title == "atlas+qa+guard:-0.25"
    user = {"role": "user", "content": "hi"}
    assert talk.request("hi") == {"model": "atlas+qa+guard:-0.25", "messages": [user]}
    talk.use_rule("dynamic", {"mode": "ray"})
    talk.system = "be brief"
    talk.sample("top_p", 0.5)
    assert talk.request("hi", explain=1) == {
        "model": "atlas",
        "messages": [{"role": "system", "content": "be brief"}, user],
        "fusion": {"rule": "dynamic", "mode": "ray", "experts": {"qa": 1.0, "guard": -0.25}, "explain": 1},
        "top_p": 0.5,
    }
    talk.use_rule("formula", {"formula": "base + qa"})
    assert talk.request("hi")["fusion"] == {"rule": "formula", "formula": "base + qa"}
    assert talk.title == 'atlas formula formula="base + qa"'
    talk.use_rule("proxy", {})
    talk.weigh("qa", None)
    assert talk.title == "atlas+guard:-0.25" and "fusion" not in talk.request("hi")
    talk.choose("house")
    with pytest.raises(CommandError, match="preset"):
        talk.weigh("qa", 1.0)
    with pytest.raises(CommandError, match="preset"):
        talk.use_rule("dynamic", {})


def test_what_is_decided_elsewhere_cannot_be_set(talk: Conversation) -> None:
    for name in ("model", "messages", "fusion", "stream"):
        with pytest.raises(CommandError, match=name):
            talk.sample(name, 1)
    with pytest.raises(CommandError, match="takes no part"):
        talk.weigh("guard", None)
    with pytest.raises(CommandError, match="Nothing has been said"):
        talk.undo()


def test_saved_and_loaded(talk: Conversation) -> None:
    talk.said("a", "b")
    talk.use_rule("dynamic", {"max_weight": 1.5})
    other = Conversation("atlas", "atlas")
    other.load(talk.as_json())
    assert other == talk
    assert other.undo() == "a" and not other.messages


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user"}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]},
        {"model": 3},
        {"system": []},
        {"sampling": "hot"},
    ],
    ids=str,
)
def test_files_that_are_no_conversation(talk: Conversation, change: dict[str, Any]) -> None:
    before = talk.as_json()
    with pytest.raises(CommandError, match="no conversation that /save has written"):
        talk.load({**before, **change})
    for value in (None, [], "text", {}):
        with pytest.raises(CommandError):
            talk.load(value)
    assert talk.as_json() == before


def test_values_and_pairs() -> None:
    assert [parse_value(text) for text in ("1.5", "true", "ray", '{"a": 1}')] == [1.5, True, "ray", {"a": 1}]
    assert _pairs("formula=base + 0.5*qa max_weight=2") == ["formula=base + 0.5*qa", "max_weight=2"]
    assert _pairs('models={"base": 0.5, "qa.tuned": 0.5} r=0') == [
        'models={"base": 0.5, "qa.tuned": 0.5}',
        "r=0",
    ]


def test_only_line_feeds_end_lines_and_controls_are_taken_out() -> None:
    text = "a\u2028b\x85c 😀\r\nd\n\ne".encode()
    for size in (1, 2, 3, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert [line.decode() for line in lines_of(pieces)] == ["a\u2028b\x85c 😀", "d", "", "e"]
    assert harmless("\u202eabc\u2066") == "\ufffdabc\ufffd"
    assert harmless("a\tb\nc\x1b]0;title\x07\x9b2J\r👩‍🚀") == "a\tb\nc\ufffd]0;title\ufffd\ufffd2J\ufffd👩‍🚀"
