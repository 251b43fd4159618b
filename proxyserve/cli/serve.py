"""`proxyserve serve` and what `proxyserve demo` shares with it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from proxyserve.api.key_ring import Keys
from proxyserve.api.logs import configure_logging
from proxyserve.api.server import check_binding, check_tls, run_server
from proxyserve.api.telemetry import check_tracing
from proxyserve.cli import options
from proxyserve.cli.opening import ExpertSettings, open_server
from proxyserve.cli.startup import startup_table
from proxyserve.config import (
    EngineConfig,
    KernelChoice,
    Limits,
    LogConfig,
    LogFormat,
    LogLevel,
    PairsChoice,
    ReasoningParser,
    ServerConfig,
    ToolParser,
)
from proxyserve.fusion.calibration import Calibration, read_calibrations
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.family import ExpertSource
from proxyserve.models.loading import choose_placement
from proxyserve.models.upstream import RemoteSource
from proxyserve_kernels import backend_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything that serving needs beside the models."""

    engine: EngineConfig
    server: ServerConfig
    policy: FusionPolicy
    presets: Mapping[str, str]
    calibrations: Mapping[str, Calibration]
    experts: ExpertSettings
    logs: LogConfig = field(default_factory=LogConfig)


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
    dtype: options.ServedDtype = "auto",
    kernels: options.Kernels = "auto",
    pairs: options.Pairs = "auto",
    max_batch: options.MaxBatch = 64,
    max_batch_tokens: options.MaxBatchTokens = 512,
    prefill_tokens: options.PrefillTokens = None,
    max_scored_rows: options.MaxScoredRows = 256,
    kv_memory: options.KVMemory = None,
    block_size: options.BlockSize = 16,
    prefix_cache: options.PrefixCache = True,
    cuda_graphs: options.CudaGraphs = True,
    threads: options.ServedThreads = "auto",
    quantize: options.QuantizeOption = "off",
    tensor_parallel: options.TensorParallel = 1,
    speculate: options.SpeculateOption = "auto",
    max_drafts: options.MaxDrafts = None,
    weight_range: options.Weights = "-4:4",
    preset: options.PresetOption = None,
    calibration: options.CalibrationFile = None,
    protect: options.Protect = None,
    explain_to_all: options.ExplainToAll = False,
    api_key_file: options.ApiKeyFile = None,
    admin_key_file: options.AdminKeyFile = None,
    admin_port: options.AdminPort = None,
    drain_seconds: options.DrainSeconds = 30.0,
    request_timeout: options.RequestTimeout = None,
    max_waiting_requests: options.MaxWaitingRequests = 1024,
    max_waiting_tokens: options.MaxWaitingTokens = 1_000_000,
    max_connections: options.MaxConnections = 900,
    cors_origin: options.CorsOrigin = None,
    tls_certificate: options.TLSCertificate = None,
    tls_key: options.TLSKey = None,
    expert_root: options.ExpertRoot = None,
    allow_hub: options.AllowHub = False,
    state_dir: options.StateDir = None,
    memory: options.Memory = None,
    evict_idle: options.EvictIdle = False,
    load_wait: options.LoadWait = 30.0,
    log_format: options.LogFormatOption = "text",
    log_level: options.LogLevelOption = "info",
    otlp_endpoint: options.OtlpEndpoint = None,
    chat_template: options.ChatTemplateFile = None,
    tool_parser: options.ToolParserOption = "auto",
    reasoning_parser: options.ReasoningParserOption = "auto",
    config: options.Config = None,
) -> None:
    """Serve a large model and the small experts that steer it."""
    settings = make_settings(
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        kernels=kernels,
        pairs=pairs,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        prefill_tokens=prefill_tokens,
        max_scored_rows=max_scored_rows,
        kv_memory=kv_memory,
        block_size=block_size,
        prefix_cache=prefix_cache,
        cuda_graphs=cuda_graphs,
        threads=threads,
        quantize=quantize,
        tensor_parallel=tensor_parallel,
        speculate=speculate,
        max_drafts=max_drafts,
        weight_range=weight_range,
        preset=preset,
        calibration=calibration,
        protect=protect,
        explain_to_all=explain_to_all,
        api_key_file=api_key_file,
        admin_key_file=admin_key_file,
        admin_port=admin_port,
        drain_seconds=drain_seconds,
        request_timeout=request_timeout,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
        max_connections=max_connections,
        cors_origin=cors_origin,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        expert_root=expert_root,
        allow_hub=allow_hub,
        state_dir=state_dir,
        memory=memory,
        evict_idle=evict_idle,
        load_wait=load_wait,
        log_format=log_format,
        log_level=log_level,
        otlp_endpoint=otlp_endpoint,
        chat_template=chat_template,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
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
    pairs: PairsChoice,
    max_batch: int,
    max_batch_tokens: int,
    prefill_tokens: int | None,
    max_scored_rows: int,
    kv_memory: str | None,
    block_size: int,
    prefix_cache: bool,
    cuda_graphs: bool,
    threads: str,
    quantize: str,
    tensor_parallel: int,
    speculate: str,
    max_drafts: int | None,
    weight_range: str,
    preset: Sequence[str] | None,
    calibration: Path | None,
    protect: Sequence[str] | None,
    explain_to_all: bool,
    api_key_file: Path | None,
    admin_key_file: Path | None,
    admin_port: int | None,
    drain_seconds: float,
    request_timeout: float | None,
    max_waiting_requests: int,
    max_waiting_tokens: int,
    max_connections: int,
    cors_origin: Sequence[str] | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    expert_root: Sequence[Path] | None,
    allow_hub: bool,
    state_dir: Path | None,
    memory: str | None,
    evict_idle: bool,
    load_wait: float,
    log_format: LogFormat,
    log_level: LogLevel,
    otlp_endpoint: str | None,
    chat_template: Path | None,
    tool_parser: ToolParser,
    reasoning_parser: ReasoningParser,
) -> ServeSettings:
    """Options as typed, self-checked settings. Raises BadParameter and LoadError."""
    low, high = options.parse_range(weight_range)
    drafted = options.parse_speculate(speculate)
    try:
        engine = EngineConfig(
            device=device,
            dtype=dtype,
            kernels=kernels,
            pairs=pairs,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            prefill_tokens=prefill_tokens,
            max_scored_rows=max_scored_rows,
            kv_memory=None if kv_memory is None else options.parse_size(kv_memory),
            block_size=block_size,
            prefix_cache=prefix_cache,
            cuda_graphs=cuda_graphs,
            threads=options.parse_threads(threads),
            quantize=options.parse_quantize(quantize),
            tensor_parallel=tensor_parallel,
            speculate=drafted,
            max_drafts=options.check_max_drafts(max_drafts, drafted),
        )
        server = ServerConfig(
            host=host,
            port=port,
            api_key_file=api_key_file,
            admin_key_file=admin_key_file,
            admin_port=admin_port,
            drain_seconds=drain_seconds,
            load_wait_seconds=load_wait,
            request_timeout=request_timeout,
            cors_origins=tuple(cors_origin or ()),
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            otlp_endpoint=otlp_endpoint,
            limits=Limits(
                max_waiting_requests=max_waiting_requests,
                max_waiting_tokens=max_waiting_tokens,
                max_connections=max_connections,
            ),
            chat=options.chat_config(chat_template, tool_parser, reasoning_parser),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    policy = FusionPolicy(low, high, protected=frozenset(protect or ()), explain_to_all=explain_to_all)
    presets = dict(options.parse_preset(text) for text in preset or ())
    calibrations = {} if calibration is None else read_calibrations(calibration)
    experts = ExpertSettings(
        tuple(expert_root or ()),
        allow_hub=allow_hub,
        state_dir=state_dir,
        memory=None if memory is None else options.parse_size(memory),
        evict_idle=evict_idle,
    )
    logs = LogConfig(log_format, log_level)
    return ServeSettings(engine, server, policy, presets, calibrations, experts, logs)


def serve(
    base: Path | RemoteSource,
    experts: Sequence[ExpertSource],
    settings: ServeSettings,
    *,
    served_name: str | None = None,
) -> None:
    """Load, show the start-up table, listen until a signal. Raises LoadError and StartupError."""
    check_binding(settings.server)  # before minutes of loading, not after
    check_tls(settings.server)
    check_tracing(settings.server.otlp_endpoint)
    keys = Keys.of(settings.server)
    configure_logging(settings.logs)
    console = Console(stderr=True)
    try:
        backend_for(choose_placement(settings.engine.device).device, settings.engine.kernels)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--kernels") from error
    with (
        console.status("loading") as status,
        open_server(
            base,
            experts,
            settings,
            served_name=served_name,
            progress=status.update,
        ) as opened,
    ):
        status.stop()
        # What is here now stays. A full garbage collection, of which some swaps cause one, would look at all of it and
        # steps would wait for a quarter of a second.
        gc.collect()
        gc.freeze()
        messages = [*opened.messages, *keys.warnings]
        table = startup_table(
            opened.engine.engine, settings.server, settings.experts, keys.ring, computing=opened.computing
        )
        if settings.logs.format == "json":  # then every line is for machines
            for message in messages:
                logger.warning("%s", message)
            logger.info("%s", _as_text(table))
        else:
            for message in messages:
                console.print(Text.assemble(("note: ", "bold yellow"), message), soft_wrap=True)
            console.print(table)
        run_server(opened.engine, settings.server, opened.experts)


def _as_text(shown: RenderableType) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
