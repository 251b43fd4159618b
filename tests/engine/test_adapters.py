"""Adapters as rows of one forward: each row is what a model with that row's adapter merged in computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.engine import adapters as adapters_module
from proxyserve.engine.adapters import AdapterBank, adapter_plan
from proxyserve.engine.attention import ShapeProbe, attention_plan
from proxyserve.engine.cpu_linear import PackedLinear, pack_linears
from proxyserve.engine.runner import Runner
from proxyserve.models.formats.lora import LoraModule, LoraWeights, merge_lora
from proxyserve.models.loading import choose_placement, load_model
from proxyserve.types import ModelKey
from tests.tiny import config_of, make_tokenizer, save_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
A, B, C, D, E = (ModelKey(f"{name}.tuned") for name in "abcde")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def needs(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(device)


def make_trunk(architecture: str = "llama", *, hidden: int = 32) -> PreTrainedModel:
    torch.manual_seed(5)
    config = config_of(architecture, 64, hidden=hidden, layers=2)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def linear_layers(trunk: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the head."""
    return [
        name
        for name, module in trunk.named_modules()
        if (hasattr(module, "in_features") or hasattr(module, "nx"))
        and module is not trunk.get_output_embeddings()
    ]


def make_adapter(
    trunk: PreTrainedModel, seed: int, ranks: int | Mapping[str, int] = 4, *, only: str = ""
) -> LoraWeights:
    """Random changes, large enough to matter, of all linear layers whose names contain `only`."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in linear_layers(trunk):
        if only in name:
            module = trunk.get_submodule(name)
            transposed = hasattr(module, "nx")
            size_in, size_out = (
                (module.nx, module.nf) if transposed else (module.in_features, module.out_features)
            )
            rank = ranks if isinstance(ranks, int) else ranks.get(name.rpartition(".")[2], 4)
            a = torch.randn(rank, size_in, generator=generator) * 0.3
            b = torch.randn(size_out, rank, generator=generator) * 0.3
            a, b = (matrix.to(trunk.device, trunk.dtype) for matrix in (a, b))
            modules[name] = LoraModule(a, b, transposed)
    tensors = [tensor for module in modules.values() for tensor in (module.a, module.b)]
    return LoraWeights(
        rank=max(module.a.shape[0] for module in modules.values()),
        modules=modules,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


class Packed:
    """Sequences run as one packed row by a plain Hugging Face model: a mask keeps them apart."""

    def __init__(self, trunk: PreTrainedModel, counts: Sequence[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.counts = counts
        self.ids = [torch.randint(64, (count,), generator=generator) for count in counts]
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        steps = torch.arange(len(owner))
        allowed = (owner[:, None] == owner) & (steps[:, None] >= steps)
        mask = torch.zeros(allowed.shape, dtype=trunk.dtype).masked_fill(
            ~allowed, torch.finfo(trunk.dtype).min
        )
        self._mask = mask[None, None].to(trunk.device)
        self._positions = torch.cat([torch.arange(count) for count in counts])[None].to(trunk.device)
        self._trunk = trunk

    def run(self) -> list[Tensor]:
        """Logits [count, width] of each sequence."""
        mask: Tensor | dict[str, Tensor] = self._mask
        if "sliding_attention" in (getattr(self._trunk.config, "layer_types", None) or ()):
            mask = {"full_attention": self._mask, "sliding_attention": self._mask}
        ids = torch.cat(self.ids)[None].to(self._trunk.device)
        output = self._trunk(
            input_ids=ids, position_ids=self._positions, attention_mask=mask, use_cache=False
        )
        return list(output.logits[0].split(list(self.counts)))


def expected(trunk: PreTrainedModel, weights: LoraWeights | None, ids: Tensor) -> Tensor:
    """The slow twin: a model of its own with the adapter merged in, one sequence, nothing packed."""
    state = trunk.state_dict()
    own = type(trunk)(trunk.config).to(trunk.device, trunk.dtype).eval()
    own.load_state_dict(state if weights is None else merge_lora(state, weights))
    logits: Tensor = own(input_ids=ids[None].to(trunk.device), use_cache=False).logits[0]
    return logits


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, wanted, atol=tolerance * float(wanted.abs().max()), rtol=tolerance)


# Right results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_mixed_rows_equal_merged_models(architecture: str, device: str) -> None:
    """Several adapters with one token or a few, one with many, some twice, rows without."""
    trunk = make_trunk(architecture).to(needs(device))
    weights = {key: make_adapter(trunk, seed) for seed, key in enumerate((A, B, C, D))}
    bank = AdapterBank(trunk)
    for key, adapter in weights.items():
        bank.add(key, adapter)
    keys = [A, None, B, A, C, None, D, C, B]
    packed = Packed(trunk, [1, 3, 1, 1, 3, 1, 6, 1, 2])
    with adapter_plan(bank.plan(keys, packed.counts)):
        results = packed.run()
    for key, ids, logits in zip(keys, packed.ids, results, strict=True):
        close(logits, expected(trunk, None if key is None else weights[key], ids))


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_and_modules_may_differ(device: str) -> None:
    trunk = make_trunk().to(needs(device))
    weights = {
        A: make_adapter(trunk, 1, 4),
        B: make_adapter(trunk, 2, 3),  # shares the stack of rank 4
        C: make_adapter(trunk, 3, 16),
        D: make_adapter(trunk, 4, 4, only="self_attn"),
        E: make_adapter(trunk, 5, {"q_proj": 1, "down_proj": 8}, only="layers.1"),
    }
    bank = AdapterBank(trunk)
    for key, adapter in weights.items():
        bank.add(key, adapter)
    keys = [A, B, C, D, E, None]
    for count in (1, 2, 9):
        packed = Packed(trunk, [count] * len(keys))
        with adapter_plan(bank.plan(keys, packed.counts)):
            results = packed.run()
        for key, ids, logits in zip(keys, packed.ids, results, strict=True):
            close(logits, expected(trunk, None if key is None else weights[key], ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    """The changes of one layer, against the same in float64 from the rounded weights."""
    trunk = make_trunk().to(needs(device), dtype)
    weights = [make_adapter(trunk, seed) for seed in range(4)]
    bank = AdapterBank(trunk)
    for key, adapter in zip((A, B, C, D), weights, strict=True):
        bank.add(key, adapter)
    name = "model.layers.0.mlp.down_proj"
    layer = trunk.get_submodule(name)
    inputs = torch.randn(1, 13, 64, generator=torch.Generator().manual_seed(0)).to(trunk.device, dtype)
    plain = layer(inputs)
    with adapter_plan(bank.plan([A, B, None, C, D], [1, 2, 2, 1, 7])):
        changed = layer(inputs)
    owners = [0, 1, 1, None, None, 2, *[3] * 7]
    for row, owner in enumerate(owners):
        if owner is None:
            assert torch.equal(changed[0, row], plain[0, row])
        else:
            module = weights[owner].modules[name]
            change = module.b.double() @ (module.a.double() @ inputs[0, row].double())
            torch.testing.assert_close(
                changed[0, row].double(), plain[0, row].double() + change, atol=2e-2, rtol=2e-2
            )


def test_packed_layers_take_adapters() -> None:
    trunk = make_trunk(hidden=1024)
    adapter = make_adapter(trunk, 1)
    ids = torch.randint(64, (5,), generator=torch.Generator().manual_seed(0))
    wanted = expected(trunk, adapter, ids)
    pack_linears(trunk)
    assert isinstance(trunk.get_submodule("model.layers.0.self_attn.q_proj"), PackedLinear)
    bank = AdapterBank(trunk)
    bank.add(A, adapter)
    with adapter_plan(bank.plan([A], [5])):
        close(trunk(input_ids=ids[None], use_cache=False).logits[0], wanted)


def test_in_paged_mode(tmp_path: Path) -> None:
    model = load_model(
        save_model(tmp_path, "gemma2", make_tokenizer(), seed=1),
        ModelKey("small"),
        choose_placement("cpu"),
    )
    adapter = make_adapter(model.module, 1)
    ids = torch.arange(6)
    wanted = expected(model.module, adapter, ids)
    runner = Runner(model)
    bank = AdapterBank(model.module)
    bank.add(A, adapter)
    with attention_plan(ShapeProbe()), adapter_plan(bank.plan([A], [6])):
        close(runner._forward(ids.tolist(), list(range(6)), [1, 5], 2), wanted[[1, 5]])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_adapter_are_the_same_bits(device: str) -> None:
    trunk = make_trunk().to(needs(device))
    packed = Packed(trunk, [1, 2, 1, 9, 1, 1, 3])
    alone = packed.run()
    bank = AdapterBank(trunk)
    for seed, key in enumerate((A, B, C)):
        bank.add(key, make_adapter(trunk, seed))
    keys = [A, None, B, C, None, C, None]
    with adapter_plan(bank.plan(keys, packed.counts)):
        mixed = packed.run()
    for key, before, after in zip(keys, alone, mixed, strict=True):
        assert torch.equal(before, after) == (key is None)
    with adapter_plan(bank.plan([None] * 7, packed.counts)):
        assert all(torch.equal(before, after) for before, after in zip(alone, packed.run(), strict=True))
    assert all(torch.equal(before, after) for before, after in zip(alone, packed.run(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 4, 1, 3], [9, 8, 8, 8]])
def test_nan_stays_in_its_row(counts: list[int], device: str) -> None:
    """Of an adapter gone wrong, and of a row's own tokens. The first row's tokens are what padding reads."""
    trunk = make_trunk().to(needs(device))
    weights = {key: make_adapter(trunk, seed) for seed, key in enumerate((A, B, C))}
    broken = make_adapter(trunk, 3)
    for module in broken.modules.values():
        module.b.fill_(float("nan"))
    bank = AdapterBank(trunk)
    for key, adapter in (weights | {D: broken}).items():
        bank.add(key, adapter)
    layer = trunk.get_submodule("model.layers.0.mlp.up_proj")
    inputs = torch.randn(1, sum(counts), 32, generator=torch.Generator().manual_seed(0)).to(trunk.device)
    plan = bank.plan([A, D, B, None], counts)
    with adapter_plan(plan):
        before = layer(inputs)[0].split(counts)
        inputs[0, : counts[0]] = float("nan")
        after = layer(inputs)[0].split(counts)
    assert [bool(rows.isnan().any()) for rows in before] == [False, True, False, False]
    assert [bool(rows.isnan().any()) for rows in after] == [True, True, False, False]
    assert torch.equal(before[2], after[2])


# Many adapters, few slots ---------------------------------------------------------------------------------------


def test_any_sequence_of_sets_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of stacks are filled, overwritten and given up as sets of adapters change; every product stays right."""
    monkeypatch.setattr(adapters_module, "_IDLE_PLANS", 5)
    trunk = make_trunk()
    name = "model.layers.1.self_attn.v_proj"
    layer = trunk.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    bank = AdapterBank(trunk)
    weights: dict[ModelKey, LoraWeights] = {}
    for round_number in range(150):
        if len(weights) < 2 or torch.rand((), generator=generator) < 0.3:
            key = ModelKey(f"e{round_number % 17}.tuned")
            if key in weights:  # other weights under an old name
                bank.remove(key)
            weights[key] = make_adapter(trunk, round_number, [3, 4, 8][round_number % 3], only="self_attn")
            bank.add(key, weights[key])
        elif torch.rand((), generator=generator) < 0.2:
            key = list(weights)[int(torch.randint(len(weights), (), generator=generator))]
            bank.remove(key)
            del weights[key]
        choices: list[ModelKey | None] = [None, *weights]
        size = int(torch.randint(1, 13, (), generator=generator))
        keys = [choices[int(torch.randint(len(choices), (), generator=generator))] for _ in range(size)]
        counts = [int(torch.randint(1, 6, (), generator=generator)) for _ in keys]
        inputs = torch.randn(1, sum(counts), 32, generator=generator)
        plain = layer(inputs)[0].split(counts)
        with adapter_plan(bank.plan(keys, counts)):
            changed = layer(inputs)[0].split(counts)
        for key, rows, before, after in zip(keys, inputs[0].split(counts), plain, changed, strict=True):
            if key is None:
                assert torch.equal(before, after)
            else:
                module = weights[key].modules[name]
                close(after, before + rows @ module.a.T @ module.b.T)
    assert len(bank) == len(weights)


def test_memory_is_bounded_and_returns() -> None:
    trunk = make_trunk()
    bank = AdapterBank(trunk)
    keys = [ModelKey(f"e{number}.tuned") for number in range(16)]
    one = make_adapter(trunk, 0).bytes
    assert (bank.bytes, len(bank)) == (0, 0)
    for number, key in enumerate(keys):
        bank.add(key, make_adapter(trunk, number))
    assert bank.bytes == 16 * one
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        chosen = torch.randperm(16, generator=generator)[: int(torch.randint(1, 17, (), generator=generator))]
        bank.plan([keys[number] for number in chosen.tolist()], [1] * len(chosen))
        assert bank.bytes <= 3 * 16 * one  # stacks of 2, 4, 8 and 16
    for key in keys[4:]:
        bank.remove(key)
    assert bank.bytes <= (4 + 4 + 2) * one
    for key in keys[:4]:
        bank.remove(key)
    assert (bank.bytes, len(bank)) == (0, 0)


def test_stacks_that_are_not_used_any_more_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_module, "_IDLE_PLANS", 3)
    trunk = make_trunk()
    bank = AdapterBank(trunk)
    for seed, key in enumerate((A, B, C)):
        bank.add(key, make_adapter(trunk, seed))
    one = bank.bytes // 3
    bank.plan([A, B, C], [1, 1, 1])
    assert bank.bytes == (3 + 4) * one
    for _ in range(3):
        bank.plan([A, B], [1, 1])
    assert bank.bytes == (3 + 4 + 2) * one
    bank.plan([C], [1])
    assert bank.bytes == (3 + 2) * one


def test_a_set_that_stays_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = make_trunk()
    bank = AdapterBank(trunk)
    for seed, key in enumerate((A, B, C, D, E)):
        bank.add(key, make_adapter(trunk, seed))
    copied: list[int] = []
    fill = adapters_module._Stack._fill

    def count(stack: adapters_module._Stack, slot: int, weights: LoraWeights) -> None:
        copied.append(slot)
        fill(stack, slot, weights)

    monkeypatch.setattr(adapters_module._Stack, "_fill", count)
    bank.plan([A, B, C], [1, 1, 1])
    assert len(copied) == 3
    bank.plan([C, A, None, B, A], [1, 1, 5, 1, 4])  # A has many tokens now, and none is new to a stack of two
    assert len(copied) == 5
    bank.plan([C, D, B, A], [1, 1, 1, 1])
    assert len(copied) == 6
    bank.plan([E, D, B], [1, 1, 1])
    assert len(copied) == 7
    bank.plan([D, E, A], [1, 1, 1])  # A was used before B; C, oldest of all, made room for E
    assert len(copied) == 7


# Coming and going -----------------------------------------------------------------------------------------------


def test_plans_in_use_do_not_change() -> None:
    trunk = make_trunk()
    packed = Packed(trunk, [1, 1, 1, 8])
    bank = AdapterBank(trunk)
    for seed, key in enumerate((A, B, C)):
        bank.add(key, make_adapter(trunk, seed))
    plan = bank.plan([A, B, None, C], packed.counts)
    with adapter_plan(plan):
        before = packed.run()
    for key in (A, B, C):
        bank.remove(key)
    for seed, key in enumerate((D, E, A), start=10):
        bank.add(key, make_adapter(trunk, seed, only="mlp"))
    other = bank.plan([D, E, None, A], packed.counts)
    with adapter_plan(plan):
        assert all(torch.equal(one, two) for one, two in zip(before, packed.run(), strict=True))
    for key in (D, E, A):
        bank.remove(key)
    with adapter_plan(plan):
        assert all(torch.equal(one, two) for one, two in zip(before, packed.run(), strict=True))
    del plan, other


def test_slots_of_a_plan_in_use_are_not_overwritten() -> None:
    """Stacks have four slots here."""
    trunk = make_trunk()
    name = "model.layers.0.mlp.up_proj"
    layer = trunk.get_submodule(name)
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weights = {key: make_adapter(trunk, seed) for seed, key in enumerate((A, B, C, D, E))}
    bank = AdapterBank(trunk)
    for key, adapter in weights.items():
        bank.add(key, adapter)
    plans = {}
    bank.plan([A, B, C, D], [1] * 4)
    for keys in ([A, B, C], [D, E, A], [B, C, E], [D, B, E]):
        plans[tuple(keys)] = bank.plan(keys, [1] * 3)
    for keys, plan in plans.items():
        with adapter_plan(plan):
            changed = layer(inputs)
        for key, row, after in zip(keys, inputs, changed, strict=True):
            module = weights[key].modules[name]
            close(after, layer(row) + module.b @ (module.a @ row))


def test_slots_of_adapters_that_left_stay_with_plans_in_use() -> None:
    trunk = make_trunk()
    layer = trunk.get_submodule("model.layers.0.mlp.up_proj")
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    bank = AdapterBank(trunk)
    for seed, key in enumerate((A, B, C, D, E)):
        bank.add(key, make_adapter(trunk, seed))
    plan = bank.plan([A, B, C], [1] * 3)
    with adapter_plan(plan):
        before = layer(inputs)
    bank.remove(A)
    bank.plan([B, D, E], [1] * 3)
    with adapter_plan(plan):
        assert torch.equal(layer(inputs), before)


def test_other_weights_under_an_old_name() -> None:
    trunk = make_trunk()
    name = "model.layers.0.mlp.up_proj"
    layer = trunk.get_submodule(name)
    row = torch.randn(32, generator=torch.Generator().manual_seed(0))
    bank = AdapterBank(trunk)
    bank.add(A, make_adapter(trunk, 1))
    bank.add(B, make_adapter(trunk, 2))
    bank.add(C, make_adapter(trunk, 3))
    for seed in (4, 5):
        bank.plan([A, B], [1, 1])
        bank.remove(A)
        adapter = make_adapter(trunk, seed)
        bank.add(A, adapter)
        with adapter_plan(bank.plan([A, B], [1, 1])):
            changed = layer(torch.stack([row, row]))[0]
        close(changed, layer(row) + adapter.modules[name].b @ (adapter.modules[name].a @ row))


def hooks(trunk: nn.Module) -> dict[str, int]:
    found = {name: len(module._forward_hooks) for name, module in trunk.named_modules()}
    return {name: number for name, number in found.items() if number}


def test_hooks_are_there_while_an_adapter_needs_them() -> None:
    trunk = make_trunk()
    assert hooks(trunk) == {}
    bank = AdapterBank(trunk)
    bank.add(A, make_adapter(trunk, 1, only="q_proj"))
    bank.add(B, make_adapter(trunk, 2, only="self_attn"))
    assert hooks(trunk) == dict.fromkeys((name for name in linear_layers(trunk) if "self_attn" in name), 1)
    bank.remove(B)
    assert hooks(trunk) == dict.fromkeys((name for name in linear_layers(trunk) if "q_proj" in name), 1)
    plan = bank.plan([A], [3])
    bank.remove(A)
    assert len(hooks(trunk)) == 2  # for the plan's sake
    bank.add(A, make_adapter(trunk, 1, only="q_proj"))
    del plan
    assert bank.plan([A], [3]) is not None
    assert len(hooks(trunk)) == 2
    bank.remove(A)
    bank.add(B, make_adapter(trunk, 2, only="k_proj"))
    bank.remove(B)
    assert hooks(trunk) == {}


def test_closing_a_bank_leaves_the_trunk_as_it_was() -> None:
    trunk = make_trunk()
    packed = Packed(trunk, [2, 1, 1])
    alone = packed.run()
    bank, other = AdapterBank(trunk), AdapterBank(trunk)
    for seed, key in enumerate((A, B)):
        bank.add(key, make_adapter(trunk, seed))
    other.add(A, make_adapter(trunk, 1, only="q_proj"))
    plan = bank.plan([None, A, B], packed.counts)
    bank.close()
    assert (len(bank), bank.bytes) == (0, 0)
    assert len(hooks(trunk)) == 2  # the other bank's
    with adapter_plan(plan):
        assert all(torch.equal(one, two) for one, two in zip(alone, packed.run(), strict=True))


def test_two_banks_over_one_trunk_do_not_mix() -> None:
    trunk = make_trunk()
    packed = Packed(trunk, [2, 3])
    first, second = AdapterBank(trunk), AdapterBank(trunk)
    weights = make_adapter(trunk, 1), make_adapter(trunk, 2)
    for bank, adapter in zip((first, second), weights, strict=True):
        bank.add(A, adapter)
        bank.add(B, adapter)
    for bank, adapter in zip((first, second), weights, strict=True):
        with adapter_plan(bank.plan([A, None], packed.counts)):
            changed, plain = packed.run()
        close(changed, expected(trunk, adapter, packed.ids[0]))
        close(plain, expected(trunk, None, packed.ids[1]))
    first.remove(A)
    with adapter_plan(second.plan([B, None], packed.counts)):
        close(packed.run()[0], expected(trunk, weights[1], packed.ids[0]))
    for bank, key in ((first, B), (second, A), (second, B)):
        bank.remove(key)
    assert hooks(trunk) == {}


def test_threads_have_plans_of_their_own() -> None:
    """One thread adds, plans, runs and removes; another runs the trunk alone and never sees a change."""
    trunk = make_trunk()
    packed = Packed(trunk, [3, 2])
    alone = packed.run()
    bank = AdapterBank(trunk)
    stop = threading.Event()
    runs: list[bool] = []

    def run_alone() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                same = [torch.equal(one, two) for one, two in zip(alone, packed.run(), strict=True)]
                runs.append(all(same))

    thread = threading.Thread(target=run_alone)
    thread.start()
    adapter = make_adapter(trunk, 1)
    changed = []
    try:
        for _ in range(30):
            bank.add(A, adapter)
            with adapter_plan(bank.plan([A, None], packed.counts)):
                changed.append(packed.run()[0])
            bank.remove(A)
    finally:
        stop.set()
        thread.join()
    assert runs
    assert all(runs)
    assert all(torch.equal(one, changed[0]) for one in changed)
    assert not torch.equal(changed[0], alone[0])


# Misuse ---------------------------------------------------------------------------------------------------------


def test_misuse_is_told() -> None:
    trunk = make_trunk()
    bank = AdapterBank(trunk)
    adapter = make_adapter(trunk, 1)
    bank.add(A, adapter)
    assert A in bank
    assert B not in bank
    with pytest.raises(ValueError, match=r"a\.tuned@1"):
        bank.add(A, adapter)
    with pytest.raises(KeyError):
        bank.remove(B)
    with pytest.raises(KeyError):
        bank.plan([B], [1])
    with pytest.raises(ValueError, match="zip"):
        bank.plan([A], [1, 2])
    with pytest.raises(AttributeError):
        bank.add(B, LoraWeights(1, {"model.nothing": LoraModule(torch.ones(1, 2), torch.ones(2, 1))}, 16))
    assert B not in bank
    with (
        adapter_plan(bank.plan([A], [3])),
        pytest.raises(RuntimeError, match=r"self_attn\.q_proj runs on 4 tokens"),
    ):
        trunk(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
