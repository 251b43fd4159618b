"""The GPU benchmark of decoding, at tiny sizes on a device that pretends to record; what it says of floors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from proxyserve.bench.gpu.__main__ import main
from proxyserve.bench.gpu.floor import OPERATIONS, Floor, Reads, expected_tokens
from proxyserve.bench.gpu.models import EXPERT, PAIRS, TINY, make_models, parameters
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement
from tests.engine.pretend_graphs import PretendGraphDevice


def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way of decoding has its row beside its floor, drafts stand, and replayed texts are those of others."""
    device = PretendGraphDevice()
    assert main(["--device", "cpu", "--out", str(tmp_path)], graph_device=device) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    result = json.loads((tmp_path / "decoding-dry.json").read_text())
    assert not result["failed"]
    for batch, drafts in ((1, 4), (2, 2)):
        rows = result["sections"][f"tiny, {batch} requests of 12 tokens"]["rows"]
        speeds = {row["decoding"]: row for row in rows}
        assert list(speeds) == [
            "base alone",
            "fused",
            "base alone, recorded",
            "fused, recorded",
            "fused, recorded, drafts",
        ]
        assert speeds["fused, recorded"]["tokens per step"] == 1.0
        assert speeds["fused, recorded, drafts"]["tokens per step"] > drafts / 2
        assert all(row["step ms"] > 0 and row["floor ms"] > 0 for row in rows)
    assert sum(device.replays) > 50
    assert [row["by"] for row in result["sections"]["attention"]["rows"]] == ["triton", "gather"] * 2
    goals = [row["what"] for row in result["sections"]["summary"]["rows"]]
    assert "tiny, 1 requests: fused step / floor" in goals
    assert "tiny, 2 requests: 2 drafts, if 0.8 of them stood, / base alone" in goals


def test_it_ends_in_time(tmp_path: Path) -> None:
    """What there was no time for is said, and is no wrong result."""
    assert main(["--device", "cpu", "--out", str(tmp_path), "--limit", "0"]) == 0
    assert "no time left" in json.loads((tmp_path / "decoding-dry.json").read_text())["failed"][0]


def test_parameters_are_those_of_the_models() -> None:
    """Of what is made, and of the sizes that are named."""
    models = make_models(TINY["tiny"], Placement(torch.device("cpu"), torch.float32), 64)
    base = models.base
    assert isinstance(base, LoadedModel)
    norms = TINY["tiny"].base.hidden * (2 * TINY["tiny"].base.layers + 1)
    assert base.parameters == parameters(TINY["tiny"].base, TINY["tiny"].vocabulary) + norms
    assert models.experts[EXPERT].tuned.parameters > 0
    billions = {name: parameters(pair.base, pair.vocabulary) / 1e9 for name, pair in PAIRS.items()}
    assert billions == pytest.approx({"7B + 2 x 0.5B": 7.6, "32B + 2 x 1.5B": 32.8}, rel=0.02)


def test_floors() -> None:
    """Weights once per forward and KV once per lane, until arithmetic takes longer; an embedding is not read."""
    models = make_models(TINY["tiny"], Placement(torch.device("cpu"), torch.float32), 64)
    assert isinstance(models.base, LoadedModel)
    reads = Reads.of(models.base)
    assert models.base.bytes - reads.weights == 320 * 64 * 4
    assert reads.kv == 2 * 2 * 2 * 16 * 4
    small = Reads(weights=10**9, kv=10**5, parameters=5 * 10**8)
    assert small.seconds(4, 1, 1000, 1e12) == pytest.approx((10**9 + 4 * 1000 * 10**5) / 1e12)
    assert small.seconds(10**4, 1, 0, 1e12) == pytest.approx(2 * 5e8 * 1e4 / OPERATIONS)
    floor = Floor(Reads(10**10, 0, 0), Reads(10**9, 0, 0), Reads(10**9, 0, 0))
    assert floor.alone(1, 0, 1e12) == pytest.approx(0.010)
    assert floor.fused(1, 0, 1e12) == pytest.approx(0.012)
    assert floor.drafted(1, 0, 1e12, 4) == pytest.approx(0.016)


def test_expected_tokens() -> None:
    assert expected_tokens(0.0, 4) == 1.0
    assert expected_tokens(1.0, 4) == 5.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)
