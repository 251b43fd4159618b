"""`proxyserve demo`: the server on the family of small models that comes with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from proxyserve.cli import options
from proxyserve.cli.serve import make_settings, serve
from proxyserve.demo.family import family_paths
from proxyserve.models.family import ExpertSource


def demo_command(
    paths: Annotated[
        bool, typer.Option("--paths", help="Print the family's folders as JSON and exit.")
    ] = False,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    device: options.Device = "auto",
    dtype: options.ServedDtype = "float32",
    kernels: options.Kernels = "auto",
    pairs: options.Pairs = "auto",
    max_batch: options.MaxBatch = 64,
    max_batch_tokens: options.MaxBatchTokens = 512,
    prefill_tokens: options.PrefillTokens = None,
    max_scored_rows: options.MaxScoredRows = 256,
    kv_memory: options.KVMemory = "256MiB",
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
    """Serve the demo family: a base that knows facts, and experts that know how to answer."""
    family = family_paths()
    if paths:
        typer.echo(family.as_json())
        return
    experts = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
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
        expert_root=expert_root or [family.base.parent],
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
    serve(family.base, experts, settings)
