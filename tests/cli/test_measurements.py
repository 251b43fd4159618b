"""`eval` and `bench`: what they print and write, and how the cost of solving weights is measured."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from proxyserve.bench.peaked import Peaks, make_peaked
from proxyserve.bench.run import BenchResult, BenchRow, BenchSettings
from proxyserve.bench.solving import SolvingResult, SolvingRow, measure_solving
from proxyserve.cli import evaluate
from proxyserve.cli.bench import bench_table, solving_table
from proxyserve.cli.main import app
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.evaluation.evaluate import FamilyResult, Score, SkillResult
from proxyserve.evaluation.report import from_json
from proxyserve.models.model_set import ModelSet
from tests.tiny import config_of


def test_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = (
        Score(0.0),
        Score(0.0),
        Score(0.1),
        Score(1.0),
        {"proxy": Score(0.5)},
        {"dynamic, ray": Score(0.25)},
    )
    result = FamilyResult("shipped", 0.5, (SkillResult("qa", 4, *scores),))
    asked: list[object] = []

    def answer(*arguments: object, **options: object) -> FamilyResult:
        asked.extend((arguments, options))
        return result

    monkeypatch.setattr(evaluate, "evaluate_family", answer)
    found, chart = tmp_path / "found.json", tmp_path / "chart.png"
    shown = CliRunner().invoke(
        app, ["eval", "--people", "3", "--markdown", "--json", str(found), "--chart", str(chart)]
    )
    assert shown.exit_code == 0, shown.output
    assert "| qa | shipped | 4 | 0.000 | 0.000 | 0.100 | 0.500 (50%) | 1.000 |" in shown.stdout
    assert "| qa | shipped | 4 | 0.000 | 0.250 | 0.500 |" in shown.stdout
    assert from_json(found.read_text()) == [result]
    assert chart.stat().st_size > 1000
    (_, people, _), options = asked
    assert len(people) == 3 and options["weight"] == 1.0  # type: ignore[arg-type, index]


def test_bench_tables() -> None:
    row = SolvingRow("exact, both", step=0.021, proxy_step=0.02, mean_weight=0.75)
    assert row.overhead == pytest.approx(0.05)
    result = BenchResult(
        BenchSettings(),
        {"device": "cpu"},
        (BenchRow(8, fused=30.0, base=60.0, loop_fused=20.0, loop_base=50.0, single_fused=10.0),),
        (SolvingResult("laws of about 2.5 nats", 8, (row,)),),
    )
    written = json.loads(json.dumps(result.as_dict()))
    assert written["rows"][0]["ratios"]["fused / loop"] == 1.5
    assert written["solving"][0]["rows"][0]["overhead"] == pytest.approx(0.05)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(bench_table(result))
    console.print(solving_table(result.solving[0]))
    text = console.export_text()
    assert "1.50x" in text and "+5.0%" in text and "2.5 nats" in text


def test_what_solving_costs_is_measured_with_the_same_lanes(tiny_models: ModelSet) -> None:
    engine = Engine(tiny_models, EngineConfig(max_batch=8, kv_memory=4 * 2**20, prefix_cache=False))
    result = measure_solving(engine, "qa", "record", laws="any", prompt=5, turns=2, steps=3)
    assert not engine.has_work
    engine.check()
    rows = {row.law: row for row in result.rows}
    assert len(rows) == 4 and all(row.step > 0.0 and math.isfinite(row.overhead) for row in rows.values())
    assert all(0.0 <= row.mean_weight <= 2.0 for row in rows.values())
    one, two = rows["exact, both, one expert"], rows["ray, both, two experts"]
    assert one.proxy_step == rows["paper, one expert"].proxy_step != two.proxy_step


def test_peaked_models() -> None:
    """On text that the models were not fitted on."""
    torch.manual_seed(0)
    base, untuned, tuned = (
        AutoModelForCausalLM.from_config(config_of("llama", 384, hidden=32, layers=2)) for _ in range(3)
    )
    make_peaked(base, untuned, [tuned], Peaks(entropy=2.0, kl=0.5))
    text = torch.randint(1, 384, (8, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        laws = [model(text).logits.log_softmax(-1) for model in (base, untuned, tuned)]
    for law in laws[:2]:
        assert float(-(law.exp() * law).sum(-1).mean()) == pytest.approx(2.0, rel=0.2)
    assert float((laws[2].exp() * (laws[2] - laws[1])).sum(-1).mean()) == pytest.approx(0.5, rel=0.4)
