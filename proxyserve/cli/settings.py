"""The options that `serve` and `demo` have in common, listed once, and the settings that they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, get_type_hints

import typer

from proxyserve.cli import options
from proxyserve.config import (
    EngineConfig,
    Limits,
    LogConfig,
    ServerConfig,
)
from proxyserve.fusion.calibration import Calibration, read_calibrations
from proxyserve.fusion.policy import FusionPolicy


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """As they were typed, in the order of the help text. `taking` makes command-line options of the fields."""

    host: options.Host = "127.0.0.1"
    port: options.Port = 8000
    api_key_file: options.ApiKeyFile = None
    admin_key_file: options.AdminKeyFile = None
    admin_port: options.AdminPort = None
    playground: options.Playground = True
    cors_origin: options.CorsOrigin = None
    tls_certificate: options.TLSCertificate = None
    tls_key: options.TLSKey = None
    device: options.Device = "auto"
    dtype: options.ServedDtype = "auto"
    threads: options.ServedThreads = "auto"
    quantize: options.QuantizeOption = "off"
    tensor_parallel: options.TensorParallel = 1
    kernels: options.Kernels = "auto"
    pairs: options.Pairs = "auto"
    cuda_graphs: options.CudaGraphs = True
    speculate: options.SpeculateOption = "auto"
    max_drafts: options.MaxDrafts = None
    max_batch: options.MaxBatch = 64
    max_batch_tokens: options.MaxBatchTokens = 512
    prefill_tokens: options.PrefillTokens = None
    max_scored_rows: options.MaxScoredRows = 256
    memory: options.Memory = None
    kv_memory: options.KVMemory = None
    block_size: options.BlockSize = 16
    prefix_cache: options.PrefixCache = True
    evict_idle: options.EvictIdle = False
    preset: options.PresetOption = None
    weight_range: options.Weights = "-4:4"
    calibration: options.CalibrationFile = None
    protect: options.Protect = None
    explain_to_all: options.ExplainToAll = False
    expert_root: options.ExpertRoot = None
    allow_hub: options.AllowHub = False
    state_dir: options.StateDir = None
    load_wait: options.LoadWait = 30.0
    drain_seconds: options.DrainSeconds = 30.0
    request_timeout: options.RequestTimeout = None
    max_waiting_requests: options.MaxWaitingRequests = 1024
    max_waiting_tokens: options.MaxWaitingTokens = 1_000_000
    max_connections: options.MaxConnections = 900
    chat_template: options.ChatTemplateFile = None
    tool_parser: options.ToolParserOption = "auto"
    reasoning_parser: options.ReasoningParserOption = "auto"
    log_format: options.LogFormatOption = "text"
    log_level: options.LogLevelOption = "info"
    otlp_endpoint: options.OtlpEndpoint = None
    config: options.Config = None


def taking(kind: type[Any], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in place of its parameter `given`, an option for each field of the dataclass `kind`. `defaults`
    replace those of the fields."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = [each.name for each in fields(kind)]

        @wraps(command)
        def run(**values: Any) -> None:
            given = kind(**{name: values.pop(name) for name in names})
            command(**values, given=given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.name != "given"]
        hints = get_type_hints(kind, include_extras=True)
        for each in fields(kind):
            assert each.default is not MISSING
            parameters.append(
                inspect.Parameter(
                    each.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(each.name, each.default),
                    annotation=hints[each.name],
                )
            )
        vars(run).pop("__wrapped__")
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """Where experts that come later may be loaded from, where they are kept, and what memory there is for them."""

    roots: Sequence[Path] = ()
    allow_hub: bool = False
    state_dir: Path | None = None
    memory: int | None = None
    evict_idle: bool = False


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


def make_settings(given: ServerOptions) -> ServeSettings:
    """Options as typed, self-checked settings. Raises BadParameter and LoadError."""
    low, high = options.parse_range(given.weight_range)
    try:
        engine = engine_config(given)
        server = ServerConfig(
            host=given.host,
            port=given.port,
            api_key_file=given.api_key_file,
            admin_key_file=given.admin_key_file,
            admin_port=given.admin_port,
            playground=given.playground,
            drain_seconds=given.drain_seconds,
            load_wait_seconds=given.load_wait,
            request_timeout=given.request_timeout,
            cors_origins=tuple(given.cors_origin or ()),
            tls_certificate=given.tls_certificate,
            tls_key=given.tls_key,
            otlp_endpoint=given.otlp_endpoint,
            limits=Limits(
                max_waiting_requests=given.max_waiting_requests,
                max_waiting_tokens=given.max_waiting_tokens,
                max_connections=given.max_connections,
            ),
            chat=options.chat_config(given.chat_template, given.tool_parser, given.reasoning_parser),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    protected = frozenset(given.protect or ())
    return ServeSettings(
        engine,
        server,
        FusionPolicy(low, high, protected=protected, explain_to_all=given.explain_to_all),
        dict(options.parse_preset(text) for text in given.preset or ()),
        {} if given.calibration is None else read_calibrations(given.calibration),
        ExpertSettings(
            tuple(given.expert_root or ()),
            allow_hub=given.allow_hub,
            state_dir=given.state_dir,
            memory=None if given.memory is None else options.parse_size(given.memory),
            evict_idle=given.evict_idle,
        ),
        LogConfig(given.log_format, given.log_level),
    )


def engine_config(given: ServerOptions) -> EngineConfig:
    """Raises BadParameter, and ValueError for values that contradict each other."""
    drafted = options.parse_speculate(given.speculate)
    return EngineConfig(
        device=given.device,
        dtype=given.dtype,
        kernels=given.kernels,
        pairs=given.pairs,
        max_batch=given.max_batch,
        max_batch_tokens=given.max_batch_tokens,
        prefill_tokens=given.prefill_tokens,
        max_scored_rows=given.max_scored_rows,
        kv_memory=None if given.kv_memory is None else options.parse_size(given.kv_memory),
        block_size=given.block_size,
        prefix_cache=given.prefix_cache,
        cuda_graphs=given.cuda_graphs,
        threads=options.parse_threads(given.threads),
        quantize=options.parse_quantize(given.quantize),
        tensor_parallel=given.tensor_parallel,
        speculate=drafted,
        max_drafts=options.check_max_drafts(given.max_drafts, drafted),
    )
