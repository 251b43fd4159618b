"""The load generator's figures against values computed by hand; arrivals and lengths against their distributions."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from random import Random
from statistics import fmean, median, quantiles

import pytest

from proxyserve.bench.load.answer import Answer, Failure
from proxyserve.bench.load.arrivals import poisson
from proxyserve.bench.load.chart import save_load_chart
from proxyserve.bench.load.drive import Load, Round
from proxyserve.bench.load.lengths import Lengths
from proxyserve.bench.load.prompts import Prompts
from proxyserve.bench.load.run import LoadResult, LoadSettings
from proxyserve.bench.load.statistics import Figure, quantile, summarize
from proxyserve.errors import ProxyserveError
from tests.bench.load import target, workload
from tests.tiny import TinyFamily

#: Eight tokens in three pieces, of which one has four; and one token.
LONG = Answer("a", 10.0, 11.0, (10.2, 10.3, 10.7), prompt_usage=5, usage=8, ids=8)
SHORT = Answer("b", 10.0, 10.5, (10.5,), prompt_usage=5, usage=None, ids=1, doubts=("no finish_reason",))
FIRST = Round(2.0, (LONG, SHORT), (Failure("a", "refused"),), late=(), lag=(0.001,) * 99 + (0.003,), cpu=0.2)
SECOND = Round(
    1.0,
    (LONG,),
    (Failure("a", "status 429", "full"), Failure("a", "status 429", "fuller")),
    late=(),
    lag=(),
    cpu=0.7,
)


def test_quantiles() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 10.0]
    assert quantile(values, 0.5) == median(values) == 3.0
    assert quantile(values, 0.9) == pytest.approx(7.6)
    deciles = quantiles(values, n=10, method="inclusive")
    assert [quantile(values, share / 10) for share in range(1, 10)] == pytest.approx(deciles)
    assert quantile([7.0], 0.99) == 7.0 and math.isnan(quantile([], 0.5))


def test_a_round_without_anything_to_measure_has_no_say() -> None:
    figure = Figure((3.0, math.nan, 1.0))
    assert (figure.median, figure.low, figure.high) == (2.0, 1.0, 3.0)
    assert figure.as_dict() == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": [3.0, None, 1.0]}
    assert Figure((math.nan,)).as_dict()["median"] is None


def test_figures_of_a_round() -> None:
    summary = summarize(Load(3, clients=2), [FIRST])
    assert summary.tokens_per_second.rounds == (4.5,)  # nine tokens in two seconds
    assert summary.requests_per_second.rounds == (1.0,)  # that were answered
    expected = {
        "ttft": (0.35, 0.47),  # of 0.2 and 0.5
        "gap": (0.25, 0.37),  # of 0.1 and 0.4
        "per_token": (0.5 / 7, 0.5 / 7),  # of the seven tokens after the first; one token has no such time
        "whole": (0.75, 0.95),  # of 1.0 and 0.5
    }
    found = {kind: (times[0.5].median, times[0.9].median) for kind, times in summary.times.items()}
    assert found == {kind: pytest.approx(times) for kind, times in expected.items()}
    assert summary.cpu_share.median == pytest.approx(0.1)
    assert summary.cpu_per_token.median == pytest.approx(0.2 / 9)
    assert summary.lag.median == pytest.approx(0.001 + 0.002 * 0.01)
    assert math.isnan(summary.late.median)
    assert summary.troubles == ["1 x refused", "1 x no finish_reason"]


def test_figures_of_several_rounds() -> None:
    summary = summarize(Load(3, clients=2), [FIRST, SECOND])
    assert summary.tokens_per_second.rounds == (4.5, 8.0)
    assert (summary.tokens_per_second.median, summary.answered) == (6.25, 3)
    assert summary.times["ttft"][0.5].rounds == pytest.approx((0.35, 0.2))
    assert summary.errors == {"refused": 1, "status 429": 2}
    assert summary.messages == {"refused": "", "status 429": "full"}
    assert summary.doubts == {"no finish_reason": 1}


def test_a_generator_that_is_in_its_own_way_says_so() -> None:
    slow = Round(1.0, (LONG,), (), late=(0.0, 0.5), lag=(0.1,), cpu=0.9)
    troubles = summarize(Load(1, rate=1.0), [slow]).troubles
    assert [trouble.split()[:3] for trouble in troubles] == [
        ["the", "generator", "itself"],
        ["the", "generator", "woke"],
        ["arrivals", "were", "sent"],
    ]


def test_tokens_are_those_that_the_server_counts_or_sends_or_else_pieces() -> None:
    pieces = (1.0, 2.0, 3.0)
    assert Answer("a", 0.0, 3.0, pieces, None, usage=8, ids=7).tokens == 8
    assert Answer("a", 0.0, 3.0, pieces, None, usage=None, ids=7).tokens == 7
    assert Answer("a", 0.0, 3.0, pieces, None, usage=None, ids=None).tokens == 3


def test_arrivals() -> None:
    """Gaps are exponential: their mean is 1 / rate and so is their deviation, and a seed draws the same ones."""
    arrivals = poisson(8.0, 5000, seed=3)
    assert arrivals == poisson(8.0, 5000, seed=3) != poisson(8.0, 5000, seed=4)
    assert arrivals == sorted(arrivals)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert fmean([gap**2 for gap in gaps]) == pytest.approx(2 / 64, rel=0.1)
    # How many come in a second has its mean as its variance.
    counts = list(Counter(map(int, arrivals)).values())[:-1]
    mean = fmean(counts)
    assert fmean([(count - mean) ** 2 for count in counts]) == pytest.approx(mean, rel=0.2)


@pytest.mark.parametrize(
    ("text", "most", "lowest", "mean"),
    [
        ("64", 64, 64, 64.0),
        ("16-256", 256, 16, 136.0),
        (" mix:16=3,512=1 ", 512, 16, 140.0),
        ("lognormal:100:0.5:100000", 100_000, 1, 100 * math.exp(0.125)),
    ],
)
def test_lengths(text: str, most: int, lowest: int, mean: float) -> None:
    lengths = Lengths.parse(text)
    random = Random(0)
    drawn = [lengths.draw(random) for _ in range(4000)]
    assert lengths.most == most and lengths.text == text.strip()
    assert lowest <= min(drawn) <= max(drawn) <= most
    assert fmean(drawn) == pytest.approx(mean, rel=0.05)


def test_a_mix_has_no_other_lengths_and_a_long_tail_is_cut() -> None:
    random = Random(0)
    mix, tail = Lengths.parse("mix:16=3,512=1"), Lengths.parse("lognormal:100:1:128")
    counts = Counter(mix.draw(random) for _ in range(4000))
    assert set(counts) == {16, 512} and counts[16] / 4000 == pytest.approx(0.75, abs=0.03)
    drawn = [tail.draw(random) for _ in range(1000)]
    assert median(drawn) == pytest.approx(100, rel=0.1) and max(drawn) == 128


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "1.5", "9-3", "1-2-3", "mix:", "mix:4", "mix:4=0", "mix:4=nan", "lognormal:8:1", "many"],
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ProxyserveError, match="no distribution of lengths; write 64"):
        Lengths.parse(text)


def test_prompts_have_exactly_as_many_tokens(tiny_family: TinyFamily) -> None:
    ids, texts = (Prompts(tiny_family.base, as_text=as_text) for as_text in (False, True))
    random = Random(0)
    for length in (1, 2, 7, 60):
        assert len(ids.draw(length, random)) == length
        text = texts.draw(length, random)
        assert isinstance(text, str) and texts.count(text) == length
    assert 0 not in ids.draw(5000, random)  # the end of the text, which is a special token


def test_a_chart(tiny_family: TinyFamily, tmp_path: Path) -> None:
    """Also where nobody was answered."""
    pytest.importorskip("matplotlib")
    loads = [Load(3, clients=2), Load(3, rate=2.5)]
    nobody = Round(1.0, (), (Failure("a", "refused"),) * 3, (), (), 0.1)
    settings = LoadSettings(target("http://host"), workload(tiny_family.base), loads, rounds=2)
    summaries = (summarize(loads[0], [FIRST, SECOND]), summarize(loads[1], [nobody, nobody]))
    result = LoadResult(settings, "now", summaries)
    save_load_chart(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert [entry["load"]["rate"] for entry in written["loads"]] == [None, 2.5]
