"""Calibration: the curve against plain Hugging Face forwards, the rule that picks a weight, the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxyserve.errors import InvalidRequest, LoadError
from proxyserve.evaluation.calibrate import Scored, calibrate, weight_steps, windows
from proxyserve.evaluation.likelihood import Likelihood
from proxyserve.fusion.calibration import Calibration, CalibrationPoint, read_calibrations, write_calibrations
from proxyserve.fusion.catalog import Catalog
from proxyserve.models.family import ExpertSource, load_family
from tests.tiny import TinyFamily


@pytest.fixture(scope="module")
def likelihood(tiny_family: TinyFamily) -> Likelihood:
    source = ExpertSource("qa", tiny_family.experts["qa"], tiny_family.untuned)
    return Likelihood(Catalog(load_family(tiny_family.base, [source], base_name="atlas")))


@torch.inference_mode()
def plain_loss(family: TinyFamily, texts: list[Scored], weight: float, width: int) -> float:
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in (family.base, family.experts["qa"], family.untuned)
    ]
    total, count = 0.0, 0
    for scored in texts:
        ids = torch.tensor([[*scored.prompt, *scored.text]])
        base, tuned, untuned = (
            torch.log_softmax(model(ids).logits[0, len(scored.prompt) - 1 : -1, :width].double(), dim=-1)
            for model in models
        )
        law = torch.log_softmax(base + weight * (tuned - untuned), dim=-1)
        total -= float(law.gather(1, torch.tensor(scored.text)[:, None]).sum())
        count += len(scored.text)
    return total / count


def test_the_curve_is_the_loss(likelihood: Likelihood, tiny_family: TinyFamily) -> None:
    task = [Scored((5, 6), (7, 8, 9)), Scored((10,), (11, 12, 13, 14))]
    general = [Scored((3,), tuple(range(20, 60)))]
    said: list[str] = []
    found = calibrate(likelihood, "qa", task, general, [0.0, 0.5, 3.0], said.append)
    width = likelihood.catalog.models.base.vocabulary.size
    for point in found.points:
        assert point.task_loss == pytest.approx(plain_loss(tiny_family, task, point.weight, width), abs=1e-5)
        assert point.general_loss == pytest.approx(
            plain_loss(tiny_family, general, point.weight, width), abs=1e-5
        )
    assert said[0] == "qa: task, 1 of 2" and said[-1] == "qa: general text, 1 of 1"


def curve(*points: tuple[float, float, float]) -> Calibration:
    return Calibration("qa", tuple(CalibrationPoint(*point) for point in points))


def test_which_weight_is_taken() -> None:
    found = curve((0.0, 4.0, 2.0), (0.5, 2.0, 1.9), (1.0, 1.0, 2.1), (1.5, 1.2, 2.15), (2.0, 0.9, 2.4))
    assert found.best_within(0.1) == 1.0, "not the largest allowed, the one with the least task loss"
    assert found.largest_within(0.1) == 1.5
    assert found.best_within(0.0) == found.largest_within(0.0) == 0.5
    assert found.best_within(1.0) == 2.0
    bad = curve((0.0, 4.0, 2.0), (0.5, 5.0, 3.0))
    assert bad.best_within(0.1) == bad.largest_within(0.1) == 0.0, "an expert that only hurts"


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    found = {"qa": curve((0.0, 4.0, 2.0), (0.5, 2.0, 1.9))}
    write_calibrations(path, found)
    assert read_calibrations(path) == found
    for text in ("{", "{}", '{"calibrations": {"qa": [{"weight": 1}]}}', '{"calibrations": {"qa": []}}'):
        path.write_text(text)
        with pytest.raises(LoadError, match="no file of calibrations"):
            read_calibrations(path)


def test_pieces_of_a_long_text() -> None:
    ids = list(range(100, 110))
    pieces = list(windows(ids, 1, 4))
    assert [piece.prompt for piece in pieces] == [(1,), (103,), (107,)]
    assert [token for piece in pieces for token in piece.text] == ids


def test_steps() -> None:
    assert weight_steps(0.3, 0.1) == [0.0, 0.1, 0.2, 0.3]
    assert len(weight_steps(2.0, 0.1)) == 21
    for largest, step in ((1.0, 0.0), (0.0, 0.1), (1.0, 2.0)):
        with pytest.raises(InvalidRequest, match="step"):
            weight_steps(largest, step)


def test_nothing_to_score(likelihood: Likelihood) -> None:
    with pytest.raises(InvalidRequest, match="general text"):
        calibrate(likelihood, "qa", [Scored((5,), (6,))], [], [0.0])
    with pytest.raises(InvalidRequest, match="no expert 'ghost'"):
        calibrate(likelihood, "ghost", [Scored((5,), (6,))], [Scored((5,), (6,))], [0.0])
