"""A lean decoder computes what the class of transformers does, in fewer operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from proxyserve.engine.attention import Features
from proxyserve.engine.lean.layer import LeanLayer
from proxyserve.engine.lean.model import LeanDecoder, can_be_lean
from proxyserve.engine.runner import Runner, probe_ids
from proxyserve.engine.verify import verify_paged
from proxyserve.errors import LoadError
from proxyserve.models.loading import choose_placement, load_model
from proxyserve.types import ModelKey
from tests.engine.lanes import Lanes, plain_logits
from tests.engine.test_adapters import make_adapter
from tests.tiny import config_of, make_tokenizer, save_model

LEAN = ("llama", "mistral", "qwen2", "qwen3")
KEY = ModelKey("m")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family; queries, keys and values of Qwen 2 have biases that matter."""
    root = tmp_path_factory.mktemp("lean")
    made = {name: save_model(root / name, name, make_tokenizer(), seed=1) for name in LEAN if name != "qwen2"}
    torch.manual_seed(1)
    like = config_of("llama", 384, hidden=32, layers=2).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "eos_token_id", "initializer_range")  # fmt: skip
    config = Qwen2Config(
        **{name: like[name] for name in kept},
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn(weight.shape))
    model.save_pretrained(root / "qwen2")
    make_tokenizer().save_pretrained(root / "qwen2")
    return {**made, "qwen2": root / "qwen2"}


def runner_of(folder: Path, dtype: str = "float32", *, lean: bool = True) -> Runner:
    return Runner(load_model(folder, KEY, choose_placement("cpu", dtype)), lean=lean)


@pytest.mark.parametrize("family", LEAN)
def test_it_says_what_the_class_says(folders: dict[str, Path], family: str) -> None:
    lean, plain = runner_of(folders[family]), runner_of(folders[family], lean=False)
    assert isinstance(lean.model.module.model, LeanDecoder)
    assert not isinstance(plain.model.module.model, LeanDecoder)
    assert lean.shapes == plain.shapes
    for got, expected in zip(plain_logits(lean), plain_logits(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.std()))


@pytest.mark.parametrize("family", LEAN)
def test_a_whole_text_against_a_plain_forward(folders: dict[str, Path], family: str) -> None:
    lanes = Lanes(runner_of(folders[family]))
    plain = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float64)
    [got] = [lanes.runner.run(lanes.work([(2, 20)]))]
    ids = torch.tensor([lanes.lanes[2].tokens(0, 34)])
    expected = plain(input_ids=ids).logits[0, -20:]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * float(expected.std()))


@pytest.mark.parametrize("family", LEAN)
def test_bfloat16_rounds_no_more_than_the_class(folders: dict[str, Path], family: str) -> None:
    exact = torch.cat(plain_logits(runner_of(folders[family], lean=False)))

    def error(*, lean: bool) -> float:
        logits = torch.cat(plain_logits(runner_of(folders[family], "bfloat16", lean=lean)))
        return float((logits.float() - exact).square().mean().sqrt())

    assert error(lean=True) <= 1.15 * error(lean=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_change_the_parts_of_merged_layers(folders: dict[str, Path], dtype: str) -> None:
    """Also with layers large enough to be packed."""
    tolerance = 1e-4 if dtype == "float32" else 0.15
    for only in ("q_proj", "v_proj", "up_proj", "o_proj", "down_proj", "proj"):
        logits = []
        for lean in (True, False):
            runner = runner_of(folders["llama"], dtype, lean=lean)
            trunk = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=runner.model.dtype)
            runner.adapters.add(KEY, make_adapter(trunk, 3, only=only))
            logits.append(torch.cat(plain_logits(runner)))
            bare = torch.cat(plain_logits(runner_of(folders["llama"], dtype, lean=lean)))
            assert (logits[-1] - bare).abs().max() > tolerance
        spread = float(logits[1].float().std())
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=tolerance * spread)


def test_a_part_of_what_is_gone_cannot_be_hooked_on_to(folders: dict[str, Path]) -> None:
    runner = runner_of(folders["llama"])
    part = runner.model.module.get_submodule("model.layers.1.self_attn.k_proj")
    assert (part.in_features, part.out_features) == (32, 16)
    runner.model.module.model.layers[1] = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="gone"):
        part.register_forward_hook(lambda *_: None)


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func.__name__] += 1
        return result


def test_a_layer_is_fewer_operations(folders: dict[str, Path]) -> None:
    def operations(layers: int, *, lean: bool, folder: Path) -> int:
        runner = runner_of(folder, lean=lean)
        runner.rehearse(1)
        with Operations() as seen:
            runner.rehearse(1)
        return sum(seen.counts.values())

    per_layer = {}
    for lean in (True, False):
        two = operations(2, lean=lean, folder=folders["llama"])
        one = folders["llama"].parent / "one"
        if not one.exists():
            save_model(one, "llama", make_tokenizer(), seed=1, layers=1)
        per_layer[lean] = two - operations(1, lean=lean, folder=one)
    assert per_layer[True] <= 0.55 * per_layer[False], per_layer


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3", "gpt2"])
def test_others_stay_as_they_are(tmp_path: Path, architecture: str) -> None:
    runner = runner_of(save_model(tmp_path, architecture, make_tokenizer(), seed=1))
    assert not isinstance(getattr(runner.model.module, "model", None), LeanDecoder)
    verify_paged(runner)


def test_what_is_not_plain_stays_as_it_is(folders: dict[str, Path]) -> None:
    def model() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folders["qwen2"])

    features = [Features(4, 0.5, None, None, False)] * 2
    assert can_be_lean(model(), features)
    assert not can_be_lean(model(), [features[0], Features(4, 0.5, None, 30.0, False)])
    assert not can_be_lean(model(), [features[0], Features(4, 0.5, None, None, True)])
    hooked = model()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not can_be_lean(hooked, features)
    other = model()
    other.model.layers[0].mlp.up_proj = torch.nn.Sequential(other.model.layers[0].mlp.up_proj)
    assert not can_be_lean(other, features)
    uneven = model()
    uneven.model.layers[0].self_attn.v_proj.bias = None
    assert not can_be_lean(uneven, features)
    derived = model()
    derived.__class__ = type("Qwen2ForCausalLM", (type(derived),), {"__module__": "elsewhere"})
    assert not can_be_lean(derived, features)


def test_a_decoder_that_differs_from_its_class_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(folders["llama"])
    assert torch.equal(
        runner.reference,
        AutoModelForCausalLM.from_pretrained(folders["llama"], attn_implementation="eager")(
            input_ids=torch.tensor([probe_ids(runner.model)])
        ).logits[0, -1],
    )
    verify_paged(runner)
    right = LeanLayer.forward
    monkeypatch.setattr(LeanLayer, "forward", lambda self, hidden, cos, sin: right(self, hidden, cos, -sin))
    with pytest.raises(LoadError, match="LlamaForCausalLM gives other logits"):
        verify_paged(runner_of(folders["llama"]))
