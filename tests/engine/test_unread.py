"""Events that nobody reads in time: joined without loss, and given up when there are too many."""

from __future__ import annotations

import asyncio
import random

import pytest

from proxyserve.engine.unread import ReaderTooSlow, Unread, joined
from proxyserve.types import FinishReason, LaneView, OutputEvent, TokenExplanation, TokenLogprob, Usage


def event(choice: int, token: int, *, last: bool = False) -> OutputEvent:
    return OutputEvent(
        "r",
        choice,
        (token,),
        f"<{token}>",
        (TokenLogprob(token, -1.0),),
        finish_reason=FinishReason.STOP if last else None,
        usage=Usage(1, token, 0, {}) if last else None,
    )


async def test_a_reader_that_keeps_up_sees_each_event() -> None:
    unread = Unread(1000)
    for number in range(500):
        sent = event(0, number)
        assert unread.put(sent)
        assert await unread.get() is sent


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_lost_by_joining(seed: int) -> None:
    rng, unread = random.Random(seed), Unread(10_000)
    sent: dict[int, list[OutputEvent]] = {}
    for number in range(2000):
        sent.setdefault(choice := rng.randrange(5), []).append(event(choice, number))
        assert unread.put(sent[choice][-1])
    for choice in sent:
        sent[choice].append(event(choice, 3000, last=True))
        unread.put(sent[choice][-1])
    assert len(unread) <= 64 + 5
    read: dict[int, list[OutputEvent]] = {}
    while len(unread):
        got = await unread.get()
        read.setdefault(got.index, []).append(got)
    assert {choice: joined(events) for choice, events in read.items()} == {
        choice: joined(events) for choice, events in sent.items()
    }
    assert [events[-1].finish_reason for events in read.values()] == [FinishReason.STOP] * 5


def test_what_was_found_out_about_the_prompt_is_kept() -> None:
    why = TokenExplanation(1, LaneView(-1.0, ()), {}, {}, {}, None, None)
    first = OutputEvent(
        "r", 0, prompt_logprobs=(None, TokenLogprob(1, -1.0)), prompt_explanations=(None, why)
    )
    for events in ([first, event(0, 1)], [event(0, 1), first, event(0, 2, last=True)]):
        both = joined(events)
        assert (both.prompt_logprobs, both.prompt_explanations) == (
            first.prompt_logprobs,
            first.prompt_explanations,
        )


async def test_too_much_is_given_up() -> None:
    unread = Unread(100)
    taken = [unread.put(event(0, number)) for number in range(150)]
    assert taken.count(False) == 1 and not taken[100]
    assert len(unread) == 0, "what is given up is not kept"
    with pytest.raises(ReaderTooSlow):
        await unread.get()


async def test_whoever_waits_is_told() -> None:
    unread = Unread(100)
    reading = asyncio.ensure_future(unread.get())
    await asyncio.sleep(0)
    unread.put(event(0, 1))
    assert (await reading).token_ids == (1,)
