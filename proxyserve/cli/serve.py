"""`proxyserve serve` and what `proxyserve demo` shares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from proxyserve.api.errors import StartupError
from proxyserve.api.presets import parse_presets
from proxyserve.api.server import check_binding, run_server
from proxyserve.cli import options
from proxyserve.cli.startup import startup_table
from proxyserve.config import EngineConfig, KernelChoice, Limits, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.fusion.calibration import Calibration, read_calibrations
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import choose_placement
from proxyserve.models.upstream import RemoteSource
from proxyserve_kernels import backend_for


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything that serving needs beside the models."""

    engine: EngineConfig
    server: ServerConfig
    policy: FusionPolicy
    presets: Mapping[str, str]
    calibrations: Mapping[str, Calibration]


def serve_command(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            envvar="PROXYSERVE_BASE",
            help="Folder of the large model, or the URL of an OpenAI-style server that has it (http://host:8001/v1).",
        ),
    ],
    expert: options.ExpertOption = None,
    served_name: options.ServedName = None,
    base_tokenizer: options.BaseTokenizer = None,
    base_model: options.BaseModelName = None,
    base_api_key_file: options.BaseApiKeyFile = None,
    base_top_k: options.BaseTopK = None,
    base_timeout: options.BaseTimeout = None,
    base_context: options.BaseContext = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kernels: options.Kernels = "auto",
    max_batch: options.MaxBatch = 64,
    max_batch_tokens: options.MaxBatchTokens = 512,
    kv_memory: options.KVMemory = None,
    block_size: options.BlockSize = 16,
    prefix_cache: options.PrefixCache = True,
    threads: options.Threads = None,
    weight_range: options.Weights = "-4:4",
    preset: options.PresetOption = None,
    calibration: options.CalibrationFile = None,
    protect: options.Protect = None,
    explain_to_all: options.ExplainToAll = False,
    api_key_file: options.ApiKeyFile = None,
    admin_key_file: options.AdminKeyFile = None,
    drain_seconds: options.DrainSeconds = 30.0,
    config: options.Config = None,
) -> None:
    """Serve a large model and the small experts that steer it."""
    settings = make_settings(
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        kernels=kernels,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        kv_memory=kv_memory,
        block_size=block_size,
        prefix_cache=prefix_cache,
        threads=threads,
        weight_range=weight_range,
        preset=preset,
        calibration=calibration,
        protect=protect,
        explain_to_all=explain_to_all,
        api_key_file=api_key_file,
        admin_key_file=admin_key_file,
        drain_seconds=drain_seconds,
    )
    source = options.parse_base(
        base,
        tokenizer=base_tokenizer,
        model=base_model,
        api_key_file=base_api_key_file,
        top_k=base_top_k,
        timeout=base_timeout,
        context=base_context,
    )
    serve(source, [options.parse_expert(text) for text in expert or []], settings, served_name=served_name)


def make_settings(
    *,
    host: str,
    port: int,
    device: str,
    dtype: str,
    kernels: KernelChoice,
    max_batch: int,
    max_batch_tokens: int,
    kv_memory: str | None,
    block_size: int,
    prefix_cache: bool,
    threads: int | None,
    weight_range: str,
    preset: Sequence[str] | None,
    calibration: Path | None,
    protect: Sequence[str] | None,
    explain_to_all: bool,
    api_key_file: Path | None,
    admin_key_file: Path | None,
    drain_seconds: float,
) -> ServeSettings:
    """Options as typed, self-checked settings. Raises BadParameter and LoadError."""
    low, high = options.parse_range(weight_range)
    try:
        engine = EngineConfig(
            device=device,
            dtype=dtype,
            kernels=kernels,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            kv_memory=None if kv_memory is None else options.parse_size(kv_memory),
            block_size=block_size,
            prefix_cache=prefix_cache,
            threads=threads,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    server = ServerConfig(
        host=host,
        port=port,
        api_key_file=api_key_file,
        admin_key_file=admin_key_file,
        drain_seconds=drain_seconds,
        limits=Limits(),
    )
    policy = FusionPolicy(low, high, protected=frozenset(protect or ()), explain_to_all=explain_to_all)
    presets = dict(options.parse_preset(text) for text in preset or ())
    calibrations = {} if calibration is None else read_calibrations(calibration)
    return ServeSettings(engine, server, policy, presets, calibrations)


def serve(
    base: Path | RemoteSource,
    experts: Sequence[ExpertSource],
    settings: ServeSettings,
    *,
    served_name: str | None = None,
) -> None:
    """Load, show the start-up table, listen until a signal. Raises LoadError and StartupError."""
    check_binding(settings.server)  # before minutes of loading, not after
    console = Console(stderr=True)
    if settings.engine.threads is not None:
        torch.set_num_threads(settings.engine.threads)
    placement = choose_placement(settings.engine.device, settings.engine.dtype)
    try:
        backend_for(placement.device, settings.engine.kernels)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--kernels") from error
    with console.status("loading") as status:
        models = load_family(
            base, experts, base_name=served_name, placement=placement, progress=status.update
        )
        unknown = sorted(settings.policy.protected - set(models.experts))
        if unknown:
            raise StartupError(f"--protect {unknown[0]}: there is no such expert.")
        engine = Engine(
            models,
            settings.engine,
            settings.policy,
            progress=status.update,
            presets=parse_presets(settings.presets, {models.base.name, *models.experts}),
            calibrations=settings.calibrations,
        )
    console.print(startup_table(engine, settings.server))
    run_server(AsyncEngine(engine, settings.server.limits), settings.server)
