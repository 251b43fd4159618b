"""A tiny base, a small model and changes of it in every format, each with its twin: a plain folder of the same weights,
put together with nothing of the formats' own code but the decompressor."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.cli.opening import Opened, open_server
from proxyserve.cli.options import parse_expert
from proxyserve.cli.settings import ExpertSettings, ServeSettings
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner
from proxyserve.errors import LoadError
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.recipe import make_recipe
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, LayerScale, Source
from proxyserve.experts.status import ExpertStatus
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.formats.compressed import compress, read_compressed
from proxyserve.models.formats.diff import make_diff
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import choose_placement, load_model
from proxyserve.models.model_set import ModelSet
from proxyserve.models.upstream import RemoteSource
from proxyserve.types import ModelKey
from tests.engine.driver import Collected, run, submission
from tests.tiny import CHAT_TEMPLATE, config_of, make_tokenizer

#: How the tiny models are named in tests, and whether head and embeddings are one matrix.
FAMILIES = ("llama", "llama-tied", "qwen3", "gemma2", "gpt2")

#: Linear layers that adapters change, by family; each adapter takes some of them.
_LAYERS = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


@dataclass(frozen=True)
class Twin:
    """Folders of whole models; no `untuned` for an expert without one."""

    tuned: Path
    untuned: Path | None


@dataclass(frozen=True)
class Shelf:
    """`specs` have paths relative to `root`. `twins` are the same experts as whole folders."""

    root: Path
    base: Path
    small: Path
    specs: Mapping[str, ExpertSpec] = field(default_factory=dict)
    twins: Mapping[str, Twin] = field(default_factory=dict)


def save_tiny(
    folder: Path,
    family: str,
    *,
    seed: int,
    hidden: int = 32,
    layers: int = 2,
    padding: int = 8,
    chat: bool = False,
) -> Path:
    """A random model of a family, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    architecture, _, tied = family.partition("-")
    config = config_of(architecture, len(tokenizer) + padding, hidden=hidden, layers=layers)
    if tied:
        config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_twin(
    folder: Path, origin: Path, change: Callable[[str, Tensor], Tensor | None], like: Path | None = None
) -> Path:
    """`origin` with `change(name, weight)`, computed in float64, added to its parameters; the tokenizer is that of
    `like`, or else of `origin`."""
    model = load(origin)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            delta = change(name, parameter.double())
            if delta is not None:
                parameter.copy_((parameter.double() + delta).float())
    model.save_pretrained(folder)
    for file in (like or origin).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    template = (like or origin) / "chat_template.jinja"
    if template.is_file():
        (folder / template.name).write_bytes(template.read_bytes())
    return folder


def tune(folder: Path, origin: Path, *, seed: int, size: float = 0.1) -> Path:
    """A tuned model: `origin` with noise, and a chat template."""
    generator = torch.Generator().manual_seed(seed)

    def noise(_: str, weight: Tensor) -> Tensor:
        return size * torch.randn(weight.shape, generator=generator).double()

    save_twin(folder, origin, noise)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def write_lora(
    folder: Path,
    origin: Path,
    *,
    seed: int,
    rank: int = 4,
    layers: tuple[int, ...] = (0, 1, 2, 3),
    twin: Path | None = None,
    scale: float = 1.0,
    **config: Any,
) -> Path:
    """An adapter in PEFT's layout over the model in `origin`, written by hand, and its merged `twin`, whose change is
    `scale` times as large."""
    generator = torch.Generator().manual_seed(seed)
    model = load(origin)
    kinds = _LAYERS.get(model.config.model_type, _LAYERS["llama"])
    suffixes = tuple(kinds[number] for number in layers)
    value = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "target_modules": sorted({suffix.rpartition(".")[2] for suffix in suffixes}),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": model.config.model_type == "gpt2",
        **config,
    }
    factor = scale * value["lora_alpha"] / (math.sqrt(rank) if value["use_rslora"] else rank)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not name.endswith(suffixes):
            continue
        conv = hasattr(module, "nx")
        size_in, size_out = (module.nx, module.nf) if conv else (module.in_features, module.out_features)
        a = 0.3 * torch.randn(rank, size_in, generator=generator)
        b = 0.3 * torch.randn(size_out, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        delta = factor * (b.double() @ a.double())
        deltas[f"{name}.weight"] = delta.t() if conv else delta
    assert deltas
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(value))
    save_file(tensors, folder / "adapter_model.safetensors")
    if twin is not None:
        save_twin(twin, origin, lambda name, _: deltas.get(name))
    return folder


def deltas_of(tuned: Path, untuned: Path) -> dict[str, Tensor]:
    ours, theirs = dict(load(tuned).named_parameters()), dict(load(untuned).named_parameters())
    return {name: (ours[name].double() - theirs[name].double()).detach() for name in ours}


def lines(name: str, layers: int, first: float, last: float) -> float:
    """LiNeS, written down once more: the factor of a weight by its name."""
    found = re.search(r"\.(\d+)\.", name)
    return first if found is None else first + (last - first) * int(found[1]) / (layers - 1)


def make_shelf(root: Path, family: str) -> Shelf:
    base = save_tiny(root / "atlas", family, seed=1, hidden=64, layers=3, padding=24)
    small = save_tiny(root / "small", family, seed=2)
    other = save_tiny(root / "other", family, seed=5, padding=0)
    qa, record = tune(root / "qa", small, seed=3), tune(root / "record", small, seed=4)
    write_lora(root / "lora", small, seed=11, twin=root / "lora-full")
    write_lora(
        root / "rslora",
        small,
        seed=12,
        rank=3,
        layers=(0, 3),
        twin=root / "rslora-full",
        scale=0.5,
        use_rslora=True,
    )
    write_lora(root / "third", small, seed=14, rank=4, twin=root / "third-full")
    write_lora(root / "lora-base", base, seed=13, rank=2, twin=root / "lora-base-full")
    make_diff(qa, small, root / "diff-qa")
    make_diff(record, small, root / "diff-record.safetensors")
    compress(qa, small, root / "packed", density=0.3)
    of_qa, of_record = deltas_of(qa, small), deltas_of(record, small)
    packed = dict(read_compressed(root / "packed"))
    save_twin(
        root / "scaled-full", small, lambda name, _: 0.7 * lines(name, 2, 0.5, 1.5) * of_qa[name], like=qa
    )
    save_twin(
        root / "packed-full",
        small,
        lambda name, _: None if name not in packed else packed[name].double(),
        like=qa,
    )
    save_twin(root / "soup-full", small, lambda name, _: 0.6 * of_qa[name] - 0.4 * of_record[name])
    save_twin(root / "blend-full", small, lambda name, _: 0.5 * of_qa[name] + 0.9 * 0.5 * of_record[name])
    of_small = Source(of="small")
    specs = {
        "folder": ExpertSpec(Source("qa"), Source("small")),
        "lora": ExpertSpec(Source("lora"), Source("small")),
        "rslora": ExpertSpec(Source("rslora", of="small", scale=0.5)),
        "third": ExpertSpec(Source("third"), of_small),
        "diff": ExpertSpec(Source("diff-qa"), of_small),
        "scaled": ExpertSpec(Source("diff-qa", of="small", scale=0.7, layers=LayerScale(0.5, 1.5))),
        "packed": ExpertSpec(Source("packed", format="compressed"), Source("small")),
        "soup": ExpertSpec(Source(of="small", merge=((0.6, Source("qa")), (-0.4, Source("record"))))),
        "blend": ExpertSpec(
            Source(
                of="small",
                merge=((0.5, Source("diff-qa")), (0.9, Source("diff-record.safetensors", scale=0.5))),
            )
        ),
        "overbase": ExpertSpec(Source("lora-base", of="base")),
        "cross": ExpertSpec(Source("lora", of="small"), Source("other")),
        "plain": ExpertSpec(Source(of="small"), Source("other")),
        "lone": ExpertSpec(Source("record")),
    }
    twins = {
        "folder": Twin(qa, small),
        "lora": Twin(root / "lora-full", small),
        "rslora": Twin(root / "rslora-full", small),
        "third": Twin(root / "third-full", small),
        "diff": Twin(qa, small),
        "scaled": Twin(root / "scaled-full", small),
        "packed": Twin(root / "packed-full", small),
        "soup": Twin(root / "soup-full", small),
        "blend": Twin(root / "blend-full", small),
        "overbase": Twin(root / "lora-base-full", base),
        "cross": Twin(root / "lora-full", other),
        "plain": Twin(small, other),
        "lone": Twin(record, None),
    }
    return Shelf(root, base, small, specs, twins)


def make_library(base: Path, *, dtype: str = "float32") -> Library:
    placement = choose_placement("cpu", dtype)
    model = load_model(base, ModelKey("atlas"), placement)
    return Library(model, Runner(model), placement)


def load_expert(
    library: Library,
    name: str,
    spec: ExpertSpec,
    root: Path,
    *,
    generation: int = 1,
    expected: str | None = None,
) -> LoadedExpert:
    loaded = library.load(make_recipe(spec, Roots([root])), name, generation, expected=expected)
    library.verify(loaded)
    return loaded


def make_engine(library: Library, experts: list[LoadedExpert], **config: Any) -> Engine:
    values = {"max_batch": 16, "max_batch_tokens": 64, "kv_memory": 2**23, **config}
    models = ModelSet(library.base, [loaded.expert for loaded in experts])
    return Engine(models, EngineConfig(**values), runners=library.runners(), grows=True)


def base_of(library: Library) -> LoadedModel:
    assert isinstance(library.base, LoadedModel)
    return library.base


# A server without HTTP ------------------------------------------------------------------------------------------


@contextmanager
def open_state(
    base: Path | RemoteSource,
    state: Path | None,
    *experts: str,
    roots: Sequence[Path] = (),
    presets: Mapping[str, str] | None = None,
    protect: Collection[str] = (),
    memory: int | None = None,
    evict_idle: bool = False,
    served_name: str | None = None,
    **config: Any,
) -> Iterator[Opened]:
    """What `proxyserve serve BASE --expert ... --state-dir STATE` has before it listens. Its engine steps when the test
    says so; changes of what steps can run are made at once."""
    values = {"device": "cpu", "dtype": "float32", "max_batch": 8, "max_batch_tokens": 64, "kv_memory": 2**22}
    settings = ServeSettings(
        EngineConfig(**(values | config)),
        ServerConfig(),
        FusionPolicy(protected=frozenset(protect)),
        presets or {},
        {},
        ExpertSettings(tuple(roots), False, state, memory, evict_idle),
    )
    with open_server(
        base,
        [parse_expert(text) for text in experts],
        settings,
        served_name=served_name,
        progress=lambda _: None,
    ) as opened:
        yield opened


def put(opened: Opened, name: str, spec: ExpertSpec) -> ExpertStatus:
    """Wait until it is published; LoadError says why it is not."""
    change = opened.experts.put(name, spec, actor="operator")
    status = asyncio.run(opened.experts.settled(change))
    if status.generation != change.generation:
        raise LoadError(status.last_error or "no reason")
    return status


def answer(opened: Opened, name: str | None = None, *, prompt: Sequence[int] = (5, 17, 200)) -> Collected:
    """Of an expert with weight 1, or of the base."""
    engine = opened.engine.engine
    weights = {} if name is None else {name: 1.0}
    return run(engine, [submission("r", prompt, weights, logprobs=0)])["r/0"]
