"""The one table that a server prints when it starts."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from proxyserve import __version__
from proxyserve.api.key_ring import KeyRing
from proxyserve.cli.settings import ExpertSettings
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.engine.arena import Arena
from proxyserve.engine.engine import Engine
from proxyserve.engine.memory import memory_limit, scoring_bytes, spelled
from proxyserve.engine.runner import Runner
from proxyserve.engine.sharded.runner import ShardedRunner
from proxyserve.models.remote import AnyModel, RemoteModel


def startup_table(
    engine: Engine, server: ServerConfig, experts: ExpertSettings, keys: KeyRing, *, computing: str
) -> Group:
    """Models, memory and caps, and where to reach the server. `computing` says how weights are kept and run, and
    why."""
    table = Table(title=f"proxyserve {__version__}", title_justify="left")
    for column, justify in (
        ("model", "left"),
        ("class", "left"),
        ("parameters", "right"),
        ("weights", "right"),
        ("KV cache", "right"),
        ("KV tokens", "right"),
        ("context", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    shown: set[Arena] = set()
    for model in engine.models.models.values():
        if isinstance(model, RemoteModel):
            table.add_row(model.name, "remote", "", "remote", "remote", "", f"{model.context_length:,}")
            continue
        runner = engine.runners[model.trunk.key]
        assert isinstance(runner, Runner)
        arena = engine.residents.arenas[runner.layout]
        counted = arena in shown
        shown.add(arena)
        [weights, kv] = spelled([model.bytes, arena.bytes])
        table.add_row(
            model.name,
            type(model.module).__name__.removesuffix("ForCausalLM"),
            f"{model.parameters / 1e6:,.1f}M",
            weights if model.over is None else f"+ {weights}",
            "shared" if counted else kv,
            "" if counted else f"{arena.tokens:,}",
            f"{model.context_length:,}",
        )
    base = engine.models.base
    lines = [f"base {base.name}: {len(base.vocabulary.ids()):,} tokens, {_whereabouts(base)}"]
    lines += _parts(engine)
    for expert in engine.models.experts.values():
        untuned = expert.untuned.name if expert.untuned else "none"
        shared = len(expert.vocabulary.ids())
        lines.append(f"expert {expert.name}: untuned {untuned}, {shared:,} tokens shared with the base")
        protected = ", protected" if expert.name in engine.policy.protected else ""
        calibrated = ", calibrated" if expert.name in engine.catalog.calibrations else ""
        lines[-1] += f"{protected}{calibrated}"
    for name, preset in engine.catalog.presets.items():
        lines.append(f"preset {name}: rule {preset.rule.name}")
    lines.append(f"computing in {computing}")
    config, policy = engine.config, engine.policy
    lines.append(
        f"at most {config.max_batch} requests and {config.max_batch_tokens} tokens per model in a step; "
        f"weights {policy.min_weight:g} to {policy.max_weight:g}"
    )
    lines.append(_drafts(config, base))
    if engine.graphs is not None:
        kernels = {runner.attention.name for runner in engine.residents.local}
        lines.append(
            f"{len(engine.graphs)} decoding steps recorded, of at most {engine.graphs.sizes[-1]} tokens "
            f"(--no-cuda-graphs); attention by {', '.join(sorted(kernels))}"
        )
    scoring = scoring_bytes(base, config)
    limit = memory_limit(base.device, experts.memory, scoring)
    [used, most, aside] = spelled([engine.residents.bytes, limit, scoring])
    lines.append(
        f"memory: {used} of {most} for weights and KV{', idle experts give way' * experts.evict_idle}; "
        f"{aside} to score prompts"
    )
    roots = ", ".join([*map(str, experts.roots), *(["the hub"] if experts.allow_hub else [])])
    lines.append(
        f"more experts from {roots or 'nowhere (--expert-root)'}; "
        f"state in {experts.state_dir or 'memory, gone with the server (--state-dir)'}"
    )
    lines += _access(server, keys)
    return Group(table, *(Text(line) for line in lines))


def _access(server: ServerConfig, keys: KeyRing) -> list[str]:
    """Who may call, how much of it, and where."""
    files = [str(path) for path in (server.api_key_file, server.admin_key_file) if path is not None]
    users = len(keys) - keys.admins
    who = (
        f"keys: {users} of users, {keys.admins} of administrators, from {' and '.join(files)}"
        if files
        else "no keys: whoever connects is the administrator, on loopback only (--api-key-file)"
    )
    limits, timeout = server.limits, server.request_timeout
    caps = (
        f"at most {limits.max_waiting_requests:,} choices wait, with {limits.max_waiting_tokens:,} prompt tokens; "
        f"{limits.max_connections:,} connections; requests take "
        + ("any time (--request-timeout)" if timeout is None else f"at most {timeout:g} s")
    )
    tls = f"TLS with {server.tls_certificate}" if server.tls_certificate else "no TLS (--tls-certificate)"
    origins = ", ".join(server.cors_origins) or "none (--cors-origin)"
    url = f"{'http' if server.tls_certificate is None else 'https'}://{server.host}"
    lines = [who, caps, f"{tls}; web pages that may call: {origins}"]
    page = f"; playground: {url}:{server.port}/" if server.playground else ""
    lines.append(f"{url}:{server.port}/v1; {url}:{server.port}/docs{page}")
    if server.admin_port is not None:
        lines.append(f"control plane: {url}:{server.admin_port}/admin/v1")
    return lines


def _parts(engine: Engine) -> list[str]:
    """Where the parts of a divided base are, of which the table shows one."""
    runner = engine.runners[engine.models.base.key]
    if not isinstance(runner, ShardedRunner):
        return []
    others = ", ".join(f"rank {rank} is process {pid}" for rank, pid in enumerate(runner.ranks.pids, start=1))
    [weights, kv] = spelled([runner.model.bytes, engine.residents.arenas[runner.layout].bytes])
    return [
        f"its weights and KV cache are in {runner.ranks.size} parts (--tensor-parallel), {weights} and {kv} in each "
        f"process: rank 0 is this one, with the experts; {others}; no steps are recorded"
    ]


def _drafts(config: EngineConfig, base: AnyModel) -> str:
    if config.speculate == "off":
        return "no drafts (--speculate)"
    if isinstance(base, RemoteModel):
        return f"no drafts: over a remote base there are none, whatever --speculate is ({config.speculate})"
    if config.speculate == "auto":
        return f"drafts where they pay, at most {config.max_drafts} tokens of a request (--speculate, --max-drafts)"
    return f"drafts of {config.speculate} tokens, whether they pay or not (--speculate)"


def _whereabouts(base: AnyModel) -> str:
    if not isinstance(base, RemoteModel):
        where, stored = f"{base.dtype} on {base.device}", base.quantized
        if stored is None:
            return where
        if stored.error is None:
            return f"{where}, linear layers as stored ({stored.how})"
        return f"{where}, linear layers in {stored.how}, which moves its logits by {stored.error:.2%} of their spread"
    source = base.client.source
    named = "named by id" if base.client.by_id else "named by text, so that some cannot be told apart"
    return f"{base.client.model} at {source.url}, remote: its {source.top_k} likeliest tokens, {named}"
