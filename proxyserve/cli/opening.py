"""From settings to an engine and a control plane: what a server has before it listens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proxyserve.api.errors import StartupError
from proxyserve.api.presets import parse_fusion, parse_presets
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.memory import kv_budget, memory_limit, scoring_bytes, spelled
from proxyserve.engine.offer import Offer
from proxyserve.engine.preparation import check_presets
from proxyserve.engine.runner import Runner
from proxyserve.engine.settling import Settled, settle_dtype, settle_threads
from proxyserve.engine.sharded.ranks import Ranks, check_ranks
from proxyserve.engine.sharded.runner import ShardedRunner
from proxyserve.engine.verify import verify_paged
from proxyserve.errors import InvalidRequest
from proxyserve.experts.audit import AuditLog
from proxyserve.experts.hub import fetch
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.manager import ExpertManager
from proxyserve.experts.room import MemoryPolicy
from proxyserve.experts.roots import Roots
from proxyserve.experts.startup import Starter, Wanted, folders_of
from proxyserve.experts.store import StateStore
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loaded_model import LoadedModel, ParkedExpert
from proxyserve.models.loading import Placement
from proxyserve.models.model_set import ModelSet
from proxyserve.models.upstream import RemoteSource

if TYPE_CHECKING:
    from proxyserve.cli.settings import ServeSettings

#: At most one part in so many of all memory is kept for KV caches before experts are restored.
_KV_PART = 4


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine that was not started yet, and what changes its experts. `messages` are for the operator, and
    `computing` says in which dtype and with how many threads, and why."""

    engine: AsyncEngine
    experts: ExpertManager
    messages: Sequence[str]
    computing: str


@contextmanager
def open_server(
    base: Path | RemoteSource,
    experts: Sequence[ExpertSource],
    settings: ServeSettings,
    *,
    served_name: str | None,
    progress: Callable[[str], None],
) -> Iterator[Opened]:
    """Load everything; close the control plane at the end. Raises LoadError, StateError and StartupError."""
    chosen, config = settings.experts, settings.engine
    ranks: Ranks | None = None
    store = StateStore.open(chosen.state_dir)
    try:
        audit = AuditLog.open(chosen.state_dir)
        restored = store.restore()
        roots = Roots(chosen.roots, fetch if chosen.allow_hub else None)
        wanted = [Wanted.of(source) for source in experts]
        placed = settle_dtype(
            config.device,
            config.dtype,
            base if isinstance(base, Path) else None,
            folders_of(wanted, restored, roots),
        )
        placement = placed.value
        if config.tensor_parallel > 1:
            if not isinstance(base, Path):
                raise StartupError(
                    "--tensor-parallel is for a base in this process, not for one on another server."
                )
            progress(f"starting {config.tensor_parallel - 1} processes beside this one")
            ranks, threads = _start_ranks(config, placement)
            config = replace(config, cuda_graphs=False)
        base_model = load_family(
            base,
            base_name=served_name,
            placement=placement,
            quantize=config.quantize,
            load_base=None if ranks is None else ranks.load,
            progress=progress,
        ).base
        runner = None
        if isinstance(base_model, LoadedModel):
            runner = Runner(base_model) if ranks is None else ShardedRunner(base_model, ranks)
            verify_paged(runner)
        if ranks is None:
            threads = settle_threads(config.threads, runner)
        if threads.value is not None:
            torch.set_num_threads(threads.value)
        library = Library(base_model, runner, placement)
        aside = scoring_bytes(base_model, config)
        memory = MemoryPolicy(memory_limit(placement.device, chosen.memory, aside), chosen.evict_idle)
        beside_kv = replace(memory, limit=memory.limit - _kv_share(memory.limit, config, placement))
        starter = Starter(library, store, audit, roots, beside_kv, progress)
        begun = starter.begin(wanted, restored)
        models = ModelSet(
            base_model,
            [expert.loaded.expert for expert in begun if isinstance(expert.loaded, LoadedExpert)],
            parked={
                expert.stored.expert: expert.loaded
                for expert in begun
                if isinstance(expert.loaded, ParkedExpert)
            },
        )
        # With a state folder, an earlier server may have known it, and may have been told to delete it.
        names = {expert.name for expert in wanted} | {expert.name for expert in restored.experts}
        unknown = sorted(settings.policy.protected - names)
        if unknown and chosen.state_dir is None:
            raise StartupError(f"--protect {unknown[0]}: there is no such expert.")
        starter.messages.extend(f"--protect {name}: there is no such expert now" for name in unknown)
        presets = parse_presets(settings.presets, {base_model.name, *models.experts, *models.parked})
        texts: dict[str, Mapping[str, Any]] = {
            name: preset for name, preset in restored.presets.items() if name not in presets
        }
        dropped = _drop_impossible(texts, presets, models, settings)
        engine = Engine(
            models,
            _within(memory.limit, config, library.runners(), placement, starter.messages.append),
            settings.policy,
            progress,
            presets=presets,
            calibrations=settings.calibrations,
            runners=library.runners(),
            grows=bool(chosen.roots or models.parked) or chosen.allow_hub,
        )
        loop = AsyncEngine(engine, settings.server.limits)
        manager = ExpertManager(
            loop,
            library,
            store,
            audit,
            roots,
            memory,
            parse_preset=parse_fusion,
        )
    except BaseException:
        store.close()
        if ranks is not None:
            ranks.close()
        raise
    manager.install(
        begun,
        texts,
        fixed_presets={name: json.loads(text) for name, text in settings.presets.items()},
        dropped=starter.dropped,
        last_errors=restored.last_errors,
    )
    manager.start()
    if ranks is not None:
        ranks.watch(loop.lose)
    try:
        number = torch.get_num_threads()
        computing = (
            f"{placement.dtype} ({placed.reason}), {number} thread{'s' * (number > 1)} ({threads.reason})"
        )
        yield Opened(loop, manager, [*starter.messages, *dropped], computing)
    finally:
        manager.close()
        if ranks is not None:
            ranks.close()


def _start_ranks(config: EngineConfig, placement: Placement) -> tuple[Ranks, Settled[int | None]]:
    """The processes for --tensor-parallel, and how many CPU threads each has. Raises LoadError."""
    size = config.tensor_parallel
    check_ranks(size, placement, config.device)
    threads: Settled[int | None]
    if config.threads == "auto" and placement.device.type == "cpu":
        threads = Settled(max(1, torch.get_num_threads() // size), f"cores for each of {size} processes")
    else:
        threads = settle_threads(None if config.threads == "auto" else config.threads, None)
    return Ranks(size, placement, threads=threads.value), threads


def _kv_share(limit: int, config: EngineConfig, placement: Placement) -> int:
    """Bytes that KV caches are sure to get, whatever experts were published before."""
    return min(kv_budget(placement.device, config.kv_memory), limit // _KV_PART)


def _within(
    limit: int,
    config: EngineConfig,
    runners: Sequence[Runner],
    placement: Placement,
    tell: Callable[[str], None],
) -> EngineConfig:
    """The configuration with at most the KV memory for which there is room beside the weights. Raises StartupError."""
    weights = sum(runner.bytes for runner in runners)
    if weights >= limit:
        [need, most] = spelled([weights, limit])
        raise StartupError(
            f"The weights alone need {need}, and --memory allows {most}: give more, or serve less."
        )
    left = limit - weights
    if config.kv_memory is not None and config.kv_memory > left:
        [wanted, most] = spelled([config.kv_memory, left])
        tell(f"--kv-memory is {wanted}, and --memory leaves {most} for it beside the weights")
    return replace(config, kv_memory=min(kv_budget(placement.device, config.kv_memory), left))


def _drop_impossible(
    texts: dict[str, Mapping[str, Any]],
    presets: dict[str, Fusion],
    models: ModelSet,
    settings: ServeSettings,
) -> list[str]:
    """Add the presets of the state folder to those of the command line, but for those that cannot work with the models
    that are here now. Returns what to tell of them. A preset may be made of others, so this goes on until nothing
    changes."""
    waiting = dict(texts)
    reasons: dict[str, str] = {}
    while waiting:
        added = False
        for name, value in list(waiting.items()):
            try:
                if name in (*models.experts, *models.parked, models.base.name):
                    raise InvalidRequest("a model has this name now")
                candidate = {**presets, name: parse_fusion(value)}
                catalog = Catalog(models, candidate, settings.calibrations)
                check_presets(Offer(catalog, settings.policy))
            except InvalidRequest as error:
                reasons[name] = error.message
                continue
            presets[name] = candidate[name]
            del waiting[name]
            added = True
        if not added:
            break
    for name in waiting:
        del texts[name]
    return [f"preset '{name}' is dropped: {reasons[name]}" for name in waiting]
