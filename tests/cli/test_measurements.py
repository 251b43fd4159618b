"""`eval` and `bench`: what they print and write, and how solving, swaps and adapters are measured."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from proxyserve.bench.adapters import AdapterResult, AdapterRow, measure_adapters
from proxyserve.bench.memory import MemoryRow, measure_memory, packed_copies
from proxyserve.bench.mixed import KINDS, MIXED, MixedRow, measure_mixed
from proxyserve.bench.models import VOCABULARY, BenchFamily, ModelShape
from proxyserve.bench.pairs import PairRow, measure_pairs
from proxyserve.bench.peaked import Peaks, make_peaked
from proxyserve.bench.run import BenchResult, BenchRow, BenchSettings, Part, Sampling
from proxyserve.bench.solving import SolvingResult, SolvingRow, measure_solving
from proxyserve.bench.stalls import StallRow
from proxyserve.bench.swaps import SwapRow, measure_swaps
from proxyserve.bench.variants import write_adapter, write_variant
from proxyserve.cli.bench import bench_tables
from proxyserve.cli.main import app
from proxyserve.config import EngineConfig
from proxyserve.engine.cpu_linear import pack_linears
from proxyserve.engine.engine import Engine
from proxyserve.evaluation.evaluate import FamilyResult, Score, SkillResult
from proxyserve.evaluation.report import from_json
from proxyserve.models.formats.lora import read_lora
from proxyserve.models.loading import Placement
from proxyserve.models.model_set import ModelSet
from tests.tiny import TinyFamily, config_of


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

    monkeypatch.setattr("proxyserve.evaluation.evaluate.evaluate_family", answer)
    found, chart = tmp_path / "found.json", tmp_path / "chart.png"
    shown = CliRunner().invoke(
        app, ["eval", "--people", "3", "--markdown", "--save", str(found), "--chart", str(chart)]
    )
    assert shown.exit_code == 0, shown.output
    assert "| qa | shipped | 4 | 0.000 | 0.000 | 0.100 | 0.500 (50%) | 1.000 |" in shown.stdout
    assert "| qa | shipped | 4 | 0.000 | 0.250 | 0.500 |" in shown.stdout
    assert from_json(found.read_text()) == [result]
    assert chart.stat().st_size > 1000
    (_, people, _), options = asked
    assert len(people) == 3 and options["weight"] == 1.0  # type: ignore[arg-type, index]


def bench_result() -> BenchResult:
    """One that has every part."""
    solving = SolvingRow("exact, both", step=0.021, proxy_step=0.02, mean_weight=0.75)
    swaps = SwapRow(
        8,
        published=(0.3, 0.5, 0.4),
        phases={"loading": 0.2, "verifying": 0.1, "warming": 0.05},
        usual=(0.04, 0.04, 0.05),
        worst=(0.06, 0.05, 0.10),
        quiet_worst=(0.05, 0.044, 0.055),
    )
    adapters = AdapterResult(
        4,
        8,
        one=AdapterRow("one full expert", 1, step=0.02, bytes=64 * 2**20, resident_bytes=96 * 2**20),
        adapters=AdapterRow("4 adapters", 4, step=0.025, bytes=4 * 2**20, resident_bytes=5 * 2**20),
        full=AdapterRow("4 full experts", 4, step=0.05, bytes=256 * 2**20, resident_bytes=384 * 2**20),
    )
    sizes = {"bare": 400, "loading": 700, "starting": 900, "serving": 910, "after": 905}
    memory = MemoryRow(
        "base, tuned",
        32,
        512,
        "float32",
        **{name: size * 2**20 for name, size in {**sizes, "weights": 300, "kv": 100, "copies": 50}.items()},
    )
    return BenchResult(
        BenchSettings(),
        {"device": "cpu"},
        (BenchRow(8, fused=30.0, base=60.0, loop_fused=20.0, loop_base=50.0, single_fused=10.0),),
        (SolvingResult("laws of about 2.5 nats", 8, (solving,)),),
        (swaps,),
        adapters,
        pairs=(PairRow("5M", 2, 8, apart=0.006, together=0.005),),
        stalls=(StallRow(8, portions=True, usual=0.03, worst=0.075, first=3.0),),
        mixed=(
            MixedRow("off", 6, dict(zip((*KINDS, MIXED), ([0.01], [0.02], [0.03], [0.025]), strict=True))),
        ),
        memory=(memory,),
    )


def test_bench_tables() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in bench_tables(bench_result()):
        console.print(table)
    text = console.export_text()
    assert "1.50x" in text and "+5.0%" in text and "2.5 nats" in text
    # Swaps: put to published, and the ratios of the longest gaps, of the median swap and of the worst.
    assert "│ 8 │ 3 │ 400 │ 500 │ 200 │ 100 │ 50 │" in " ".join(text.split())
    assert "│ 8 │ 40 │ 60 │ 50 │ 1.50x │ 2.00x │ 1.10x │ 1.25x │" in " ".join(text.split())
    # 4 requests per step; 64 MiB for a full expert and 1 MiB for an adapter.
    assert "│ 4 adapters │ 160 │ 4.0 │ 1.0 │ 5.0 │" in " ".join(text.split())
    assert "│ 2 of 5M │ 8 │ 6.00 │ 5.00 │ 1.20x │" in " ".join(text.split())
    assert "│ 8 │ yes │ 30 │ 75 │ 2.5x │ 3.0 │" in " ".join(text.split())
    assert "│ off │ 6 │ 100 │ 50 │ 33 │ 40 │ 0.80x (0.80-0.80) │" in " ".join(text.split())
    assert "│ 400 │ 300 │ 100 │ 50 │ 300 │ 500 │ 510 │ 1.27x │ 1.27x │" in " ".join(text.split())
    assert "adapters / full 2.00x" in text and "adapters / one 0.80x" in text and "per adapter 64.00x" in text


def test_a_part_that_was_not_measured_has_no_table() -> None:
    assert bench_tables(BenchResult(BenchSettings(), {"device": "cpu"})) == []


def test_bench_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[BenchSettings] = []

    def answer(settings: BenchSettings, **options: object) -> BenchResult:
        asked.append(settings)
        return replace(bench_result(), settings=settings)

    monkeypatch.setattr("proxyserve.bench.run.run_bench", answer)
    found = tmp_path / "found.json"
    arguments = [
        "bench",
        "--only",
        "swaps",
        "--only",
        "adapters",
        "--sampling",
        "top-p",
        "--save",
        str(found),
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert asked[0].parts == (Part.SWAPS, Part.ADAPTERS)
    assert asked[0].samplings == (Sampling.TOP_P,)
    written = json.loads(found.read_text())
    assert written["settings"]["parts"] == ["swaps", "adapters"]
    assert written["rows"][0]["ratios"]["fused / loop"] == 1.5
    assert written["stalls"][0]["ratio"] == pytest.approx(2.5)
    assert written["solving"][0]["rows"][0]["overhead"] == pytest.approx(0.05)
    assert written["swaps"][0]["ratios"]["worst swap"] == pytest.approx(2.0)
    assert written["adapters"]["ratios"]["adapters / full"] == pytest.approx(2.0)
    assert written["pairs"][0]["ratios"]["together / apart"] == pytest.approx(1.2)
    assert written["memory"][0]["ratios"]["serving / given"] == pytest.approx(510 / 400)
    assert written["mixed"][0]["ratio"] == pytest.approx(0.8)
    CliRunner().invoke(app, ["bench"])
    assert asked[1].parts == tuple(Part) and asked[1].mixed == (24,)


CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture
def bench_family(tiny_family: TinyFamily) -> BenchFamily:
    tuned, second = tiny_family.experts.values()
    return BenchFamily(tiny_family.base, tuned, tiny_family.untuned, second)


def test_swaps_are_measured_while_streams_run(bench_family: BenchFamily) -> None:
    (row,) = measure_swaps(bench_family, CPU, streams=(3,), swaps=2)
    assert row.streams == 3
    assert len(row.published) == len(row.usual) == len(row.worst) == 2
    assert list(row.phases) == ["loading", "verifying", "warming"]
    # Every swap had weights to load, verify and warm; phases are part of the time from put to published.
    assert all(seconds > 0.0 for seconds in row.phases.values())
    assert max(row.phases.values()) < max(row.published)
    assert all(0.0 < usual <= worst for usual, worst in zip(row.usual, row.quiet_worst, strict=True))
    assert all(math.isfinite(ratio) for ratio in row.ratios.values())


def test_many_experts_are_measured_as_adapters_and_as_full_models(bench_family: BenchFamily) -> None:
    result = measure_adapters(bench_family, CPU, experts=3, rank=2, prompt=5, turns=2, steps=2)
    assert [row.number for row in result.rows] == [1, 3, 3]
    assert all(row.step > 0.0 for row in result.rows)
    assert result.full.bytes == 3 * result.one.bytes
    assert 0 < result.adapters.bytes < result.full.bytes
    assert all(math.isfinite(ratio) for ratio in result.ratios.values())


def test_pairs_are_measured_together_and_apart() -> None:
    shape = ModelShape(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16, tied=True)
    rows = measure_pairs(CPU, shapes={"tiny": shape}, turns=1)
    assert {row.models for row in rows} == {2, 8} and all(row.size == "tiny" for row in rows)
    assert all(row.apart > 0.0 and row.together > 0.0 for row in rows)


def test_requests_are_measured_mixed_and_apart() -> None:
    shape = ModelShape(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16, tied=True)
    rows = measure_mixed(CPU, base=shape, expert=shape, batches=(4,), prompt=4, new=3, rounds=1)
    assert [row.speculate for row in rows] == ["off", "auto"]
    for row in rows:
        assert list(row.shares.values()) == [0.5, 0.25, 0.25]
        assert all(len(seconds) == 1 and seconds[0] > 0.0 for seconds in row.seconds.values())
        plain, one, three, mixed = (seconds[0] for seconds in row.seconds.values())
        assert row.ratio == pytest.approx((0.5 * plain + 0.25 * one + 0.25 * three) / mixed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc")
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    shape = ModelShape(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16, tied=True)
    (row,) = measure_memory(CPU, base=shape, expert=shape, batch=3, prompt=20, kv_memory=2**20)
    assert row.models == "base, tuned.tuned, untuned, second.tuned"
    assert 0 < row.bare <= row.loading and 0 < row.after <= row.serving
    assert 0 < row.kv <= 2**20
    # The heads, which are tied and large enough to be packed; no other layer is.
    assert row.copies == 4 * VOCABULARY * 16 * 4 < row.weights


def test_packed_layers_that_are_there_twice_are_counted() -> None:
    layers = {
        "packed": torch.nn.Linear(1024, 512, bias=False),
        "twice": torch.nn.Linear(512, 512, bias=False),
    }
    module = torch.nn.ModuleDict(layers).requires_grad_(False)
    weights = sum(parameter.numel() * 4 for parameter in module.parameters())
    assert packed_copies(module, weights, 4) == 0
    if pack_linears(module):
        assert packed_copies(module, weights, 4) == 512 * 512 * 4


def test_a_variant_is_another_model_of_the_same_shape(bench_family: BenchFamily, tmp_path: Path) -> None:
    like = load_file(bench_family.tuned / "model.safetensors")
    written = [
        load_file(write_variant(bench_family.tuned, tmp_path / str(seed), seed) / "model.safetensors")
        for seed in range(2)
    ]
    for state in written:
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in like.items()
        }
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(written[0][embedding], like[embedding])
    assert not torch.equal(written[0][embedding], written[1][embedding])


def test_an_adapter_changes_all_linear_layers_but_the_head(bench_family: BenchFamily, tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(bench_family.untuned)
    folder = write_adapter(bench_family.untuned, tmp_path / "adapter", 0, rank=2)
    adapter = read_lora(folder, module, dtype=torch.float32, device=torch.device("cpu"))
    linear = {name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert set(adapter.modules) == linear - {"lm_head"}
    assert adapter.rank == 2 and all(bool(change.b.any()) for change in adapter.modules.values())


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
