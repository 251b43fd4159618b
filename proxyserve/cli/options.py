"""Command-line options that several commands share, and how their values are read.

Every option can also come from an environment variable (`PROXYSERVE_…`) or from the file given by `--config`. The
command line wins over the environment, the environment over the file.

Importing this must not import torch, or `--help` and the completion of words would wait for it: what a function needs
of the models it imports itself.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from proxyserve.cli import panels
from proxyserve.config import (
    MOST_DRAFTS,
    ChatConfig,
    EngineConfig,
    KernelChoice,
    LogFormat,
    LogLevel,
    PairsChoice,
    ReasoningParser,
    Speculate,
    ToolParser,
)
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.policy import FusionPolicy

if TYPE_CHECKING:
    from proxyserve.models.family import ExpertSource
    from proxyserve.models.upstream import RemoteSource

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`512MiB`, `4GiB`, `1.5GB` or plain bytes -> bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match.group(2).lower() not in _UNITS:
        raise typer.BadParameter(f"'{text}' is no size; write 4GiB, 512MiB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def parse_expert(text: str) -> ExpertSource:
    """`NAME=TUNED[,UNTUNED]` -> the folders of an expert."""
    from proxyserve.models.family import ExpertSource

    name, equals, folders = text.partition("=")
    tuned, comma, untuned = folders.partition(",")
    if not (name and equals and tuned) or (comma and not untuned):
        raise typer.BadParameter(f"'{text}' is not of the form NAME=TUNED_FOLDER,UNTUNED_FOLDER")
    return ExpertSource(name, Path(tuned), Path(untuned) if comma else None)


def parse_base(
    text: str,
    *,
    tokenizer: Path | None,
    model: str | None,
    api_key_file: Path | None,
    top_k: int | None,
    timeout: float | None,
    context: int | None,
) -> Path | RemoteSource:
    """A folder, or a server's URL with the `--base-...` options, which a folder has no use for."""
    from proxyserve.models.upstream import RemoteSource

    if not text.startswith(("http://", "https://")):
        given = {
            "--base-tokenizer": tokenizer,
            "--base-model": model,
            "--base-api-key-file": api_key_file,
            "--base-top-k": top_k,
            "--base-timeout": timeout,
            "--base-context": context,
        }
        for name, value in given.items():
            if value is not None:
                raise typer.BadParameter(
                    "it is for a BASE that is a URL, http://... or https://...; leave it out for a folder",
                    param_hint=name,
                )
        return Path(text)
    if tokenizer is None:
        raise typer.BadParameter(
            "a BASE on another server needs the folder of its tokenizer here", param_hint="--base-tokenizer"
        )
    default = RemoteSource(text.rstrip("/"), tokenizer)
    return replace(
        default,
        model=model,
        api_key=None if api_key_file is None else _first_line(api_key_file),
        top_k=default.top_k if top_k is None else top_k,
        timeout=default.timeout if timeout is None else timeout,
        context=context,
    )


def _first_line(file: Path) -> str:
    """The key in a file of one line. What the file holds is never repeated."""
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read", param_hint="--base-api-key-file") from error
    if len(lines) != 1 or not (lines[0].isascii() and lines[0].isprintable()):
        raise typer.BadParameter(
            f"{file} must hold one key and nothing else", param_hint="--base-api-key-file"
        )
    return lines[0]


def _read_config(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's other options."""
    if path is None:
        return None
    import yaml

    try:
        values = (
            tomllib.loads(path.read_text()) if path.suffix == ".toml" else yaml.safe_load(path.read_text())
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold a table of option names and values")
    known = {name for name in (p.name for p in context.command.params) if name is not None}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = _PLURALS.get(name, name)
        if name not in known or name == parameter.name:
            raise typer.BadParameter(f"{path} names '{key}', which is no option of this command")
        if name == "expert" and isinstance(value, dict):
            value = [f"{expert}={folders}" for expert, folders in value.items()]
        if name == "preset" and isinstance(value, dict):
            value = [f"{preset}={json.dumps(fusion)}" for preset, fusion in value.items()]
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


_PLURALS = {"experts": "expert", "presets": "preset", "cors_origins": "cors_origin"}


def _envvar(name: str) -> str:
    return f"PROXYSERVE_{name}"


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar=_envvar("CONFIG"),
        is_eager=True,
        callback=_read_config,
        exists=True,
        dir_okay=False,
        help="TOML or YAML file with values for the other options.",
    ),
]
Host = Annotated[
    str,
    typer.Option(
        "--host",
        envvar=_envvar("HOST"),
        help="Address to listen on; others than loopback need keys.",
        rich_help_panel=panels.NETWORK,
    ),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        envvar=_envvar("PORT"),
        min=0,
        max=65535,
        help="Port to listen on; 0 takes a free one.",
        rich_help_panel=panels.NETWORK,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        envvar=_envvar("DEVICE"),
        help="auto, cpu, cuda or cuda:N.",
        rich_help_panel=panels.COMPUTING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        envvar=_envvar("DTYPE"),
        help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or float16.",
        rich_help_panel=panels.COMPUTING,
    ),
]
ServedDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        envvar=_envvar("DTYPE"),
        help="auto (bfloat16 on a GPU; on a CPU float32, or what is stored where that has fewer bits and is faster), "
        "fastest (the faster of float32 and bfloat16), float32, bfloat16 or float16.",
        rich_help_panel=panels.COMPUTING,
    ),
]
Kernels = Annotated[
    KernelChoice,
    typer.Option(
        "--kernels",
        envvar=_envvar("KERNELS"),
        help="Backend of the logit arithmetic; auto is triton on a GPU and torch elsewhere.",
        rich_help_panel=panels.COMPUTING,
    ),
]
Pairs = Annotated[
    PairsChoice,
    typer.Option(
        "--pairs",
        envvar=_envvar("PAIRS"),
        help="Whether models that differ in their weights only run together in one forward, or apart; auto measures.",
        rich_help_panel=panels.COMPUTING,
    ),
]
MaxBatch = Annotated[
    int,
    typer.Option(
        "--max-batch",
        envvar=_envvar("MAX_BATCH"),
        min=1,
        help="Most requests run at once.",
        rich_help_panel=panels.COMPUTING,
    ),
]
MaxBatchTokens = Annotated[
    int,
    typer.Option(
        "--max-batch-tokens",
        envvar=_envvar("MAX_BATCH_TOKENS"),
        min=32,
        help="Most tokens one model computes per step; longer prompts are cut into chunks.",
        rich_help_panel=panels.COMPUTING,
    ),
]
PrefillTokens = Annotated[
    int | None,
    typer.Option(
        "--prefill-tokens",
        envvar=_envvar("PREFILL_TOKENS"),
        min=FusionPolicy().most_lanes,  # the last tokens of all lanes of a request run in one step
        help="Most tokens of prompts that one model computes per step while others decode, beside two for each of "
        "these. Fewer make shorter pauses, more let long prompts begin sooner. Default: 32 on a CPU, none on a GPU.",
        rich_help_panel=panels.COMPUTING,
    ),
]
MaxScoredRows = Annotated[
    int,
    typer.Option(
        "--max-scored-rows",
        envvar=_envvar("MAX_SCORED_ROWS"),
        min=32,
        help="Most rows of logits computed per step to score prompts, of all models together; they take memory.",
        rich_help_panel=panels.COMPUTING,
    ),
]
KVMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-memory",
        envvar=_envvar("KV_MEMORY"),
        help="Memory for the KV caches of all models together, e.g. 4GiB. Default: chosen for the device.",
        rich_help_panel=panels.MEMORY,
    ),
]
BlockSize = Annotated[
    int,
    typer.Option(
        "--block-size",
        envvar=_envvar("BLOCK_SIZE"),
        min=1,
        help="Tokens per KV block.",
        rich_help_panel=panels.MEMORY,
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        envvar=_envvar("PREFIX_CACHE"),
        help="Reuse the KV of prompts that begin alike.",
        rich_help_panel=panels.MEMORY,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        envvar=_envvar("CUDA_GRAPHS"),
        help="On a GPU: record decoding steps when a model comes, and replay them.",
        rich_help_panel=panels.COMPUTING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        envvar=_envvar("THREADS"),
        min=1,
        help="CPU threads; default: torch's choice.",
        rich_help_panel=panels.COMPUTING,
    ),
]
ServedThreads = Annotated[
    str,
    typer.Option(
        "--threads",
        envvar=_envvar("THREADS"),
        metavar="[auto|N]",
        help="CPU threads that compute; auto takes as many as are worth it, by a measurement at the start.",
        rich_help_panel=panels.COMPUTING,
    ),
]
QuantizeOption = Annotated[
    str,
    typer.Option(
        "--quantize",
        envvar=_envvar("QUANTIZE"),
        metavar="[off|int8|int4]",
        help="Store the linear layers of the base (not its head, and no expert's) in int8 or, on a GPU, int4; needs "
        "proxyserve[quantize]. Saves memory; on a CPU it is slower.",
        rich_help_panel=panels.COMPUTING,
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel",
        envvar=_envvar("TENSOR_PARALLEL"),
        min=1,
        help="Divide the base over so many GPUs of this machine, a process for each; experts stay on the first one. "
        "No steps are recorded then.",
        rich_help_panel=panels.COMPUTING,
    ),
]
SpeculateOption = Annotated[
    str,
    typer.Option(
        "--speculate",
        envvar=_envvar("SPECULATE"),
        metavar="[auto|off|N]",
        help="Draft tokens with the small experts and verify them together: as many as pay (auto), none, or always N. "
        "The text is the same.",
        rich_help_panel=panels.COMPUTING,
    ),
]
MaxDrafts = Annotated[
    int | None,
    typer.Option(
        "--max-drafts",
        envvar=_envvar("MAX_DRAFTS"),
        min=1,
        max=MOST_DRAFTS,
        help="Most tokens that --speculate auto drafts ahead for one request; 8 by default.",
        rich_help_panel=panels.COMPUTING,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        envvar=_envvar("API_KEY_FILE"),
        exists=True,
        dir_okay=False,
        help="Keys: records in .yaml, .toml or .json (`proxyserve keys new`), or one sha256:HEX per line. Without any "
        "only loopback addresses are served.",
        rich_help_panel=panels.NETWORK,
    ),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        "--request-timeout",
        envvar=_envvar("REQUEST_TIMEOUT"),
        min=0.001,
        help="Most seconds that a request may take, and may ask for with `timeout`. Default: any time.",
        rich_help_panel=panels.LIMITS,
    ),
]
MaxWaitingRequests = Annotated[
    int,
    typer.Option(
        "--max-waiting-requests",
        envvar=_envvar("MAX_WAITING_REQUESTS"),
        min=1,
        help="Choices that may wait for their first token; more are answered 429.",
        rich_help_panel=panels.LIMITS,
    ),
]
MaxWaitingTokens = Annotated[
    int,
    typer.Option(
        "--max-waiting-tokens",
        envvar=_envvar("MAX_WAITING_TOKENS"),
        min=1,
        help="Prompt tokens that they may have together.",
        rich_help_panel=panels.LIMITS,
    ),
]
MaxConnections = Annotated[
    int,
    typer.Option(
        "--max-connections",
        envvar=_envvar("MAX_CONNECTIONS"),
        min=1,
        help="Connections that may be open at once; more are answered 503.",
        rich_help_panel=panels.LIMITS,
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        envvar=_envvar("CORS_ORIGIN"),
        metavar="ORIGIN",
        help="Web pages of this origin (https://HOST[:PORT]) may call the server. May be given several times.",
        rich_help_panel=panels.NETWORK,
    ),
]
TLSCertificate = Annotated[
    Path | None,
    typer.Option(
        "--tls-certificate",
        envvar=_envvar("TLS_CERTIFICATE"),
        exists=True,
        dir_okay=False,
        help="PEM file with the server's certificate and those that vouch for it; then it speaks HTTPS alone.",
        rich_help_panel=panels.NETWORK,
    ),
]
TLSKey = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        envvar=_envvar("TLS_KEY"),
        exists=True,
        dir_okay=False,
        help="PEM file with its private key.",
        rich_help_panel=panels.NETWORK,
    ),
]
Playground = Annotated[
    bool,
    typer.Option(
        "--playground/--no-playground",
        envvar=_envvar("PLAYGROUND"),
        help="Serve a page at / to try models, experts and weights.",
        rich_help_panel=panels.NETWORK,
    ),
]
AdminPort = Annotated[
    int | None,
    typer.Option(
        "--admin-port",
        envvar=_envvar("ADMIN_PORT"),
        min=1,
        max=65535,
        help="Port of its own for the control plane, which is then not on the other one.",
        rich_help_panel=panels.NETWORK,
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        "--drain-seconds",
        envvar=_envvar("DRAIN_SECONDS"),
        min=0,
        help="How long running requests may go on after SIGTERM.",
        rich_help_panel=panels.LIMITS,
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar=_envvar("LOG_FORMAT"),
        help="Form of the log on standard error.",
        rich_help_panel=panels.LOGS,
    ),
]
LogLevelOption = Annotated[
    LogLevel,
    typer.Option(
        "--log-level",
        envvar=_envvar("LOG_LEVEL"),
        help="What is logged. Every finished request is a line at info; prompts and answers never are.",
        rich_help_panel=panels.LOGS,
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        "--otlp-endpoint",
        envvar=[_envvar("OTLP_ENDPOINT"), "OTEL_EXPORTER_OTLP_ENDPOINT"],
        help="URL of a collector that takes traces by OTLP over HTTP, e.g. http://127.0.0.1:4318. Needs "
        "proxyserve[otel]; without it there are no traces.",
        rich_help_panel=panels.LOGS,
    ),
]
ExpertRoot = Annotated[
    list[Path] | None,
    typer.Option(
        "--expert-root",
        envvar=_envvar("EXPERT_ROOT"),
        exists=True,
        file_okay=False,
        help="Folder that the control plane may load experts from. May be given several times; without it experts are "
        "those of the command line.",
        rich_help_panel=panels.EXPERTS,
    ),
]
AllowHub = Annotated[
    bool,
    typer.Option(
        "--allow-hub",
        envvar=_envvar("ALLOW_HUB"),
        help="The control plane may load experts by hub id (org/name).",
        rich_help_panel=panels.EXPERTS,
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar=_envvar("STATE_DIR"),
        file_okay=False,
        help="Folder that keeps published experts, presets and the audit log. Without it they end with the server.",
        rich_help_panel=panels.EXPERTS,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        envvar=_envvar("MEMORY"),
        help="Memory for all weights and KV caches together, e.g. 16GiB; an expert that would not fit is refused. "
        "Default: most of the device.",
        rich_help_panel=panels.MEMORY,
    ),
]
EvictIdle = Annotated[
    bool,
    typer.Option(
        "--evict-idle",
        envvar=_envvar("EVICT_IDLE"),
        help="Take experts that nobody uses out of memory when another one needs it; they are loaded again when a "
        "request names them.",
        rich_help_panel=panels.MEMORY,
    ),
]
LoadWait = Annotated[
    float,
    typer.Option(
        "--load-wait",
        envvar=_envvar("LOAD_WAIT"),
        min=0,
        help="Seconds that a request waits for an expert that must be loaded again first.",
        rich_help_panel=panels.EXPERTS,
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weight-range",
        envvar=_envvar("WEIGHT_RANGE"),
        help="Weights that requests may give an expert, as LOW:HIGH.",
        rich_help_panel=panels.FUSION,
    ),
]
ServedName = Annotated[
    str | None,
    typer.Option(
        "--served-name",
        envvar=_envvar("SERVED_NAME"),
        help="Name of the base; default: its folder's.",
        rich_help_panel=panels.MODELS,
    ),
]
BaseTokenizer = Annotated[
    Path | None,
    typer.Option(
        "--base-tokenizer",
        envvar=_envvar("BASE_TOKENIZER"),
        help="Remote base: folder of its tokenizer (its generation_config.json is read too).",
        rich_help_panel=panels.REMOTE,
    ),
]
BaseModelName = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        envvar=_envvar("BASE_MODEL"),
        help="Remote base: its name on the other server; default: the first that is listed there.",
        rich_help_panel=panels.REMOTE,
    ),
]
BaseApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--base-api-key-file",
        envvar=_envvar("BASE_API_KEY_FILE"),
        exists=True,
        dir_okay=False,
        help="Remote base: file with the key for the other server.",
        rich_help_panel=panels.REMOTE,
    ),
]
BaseTopK = Annotated[
    int | None,
    typer.Option(
        "--base-top-k",
        envvar=_envvar("BASE_TOP_K"),
        min=1,
        max=1000,
        help="Remote base: how many log-probs to ask for at each position; default 20.",
        rich_help_panel=panels.REMOTE,
    ),
]
BaseTimeout = Annotated[
    float | None,
    typer.Option(
        "--base-timeout",
        envvar=_envvar("BASE_TIMEOUT"),
        min=0.1,
        help="Remote base: seconds for one token, retries included; default 60.",
        rich_help_panel=panels.REMOTE,
    ),
]
BaseContext = Annotated[
    int | None,
    typer.Option(
        "--base-context",
        envvar=_envvar("BASE_CONTEXT"),
        min=2,
        help="Remote base: its context in tokens; default: what the other server says, else 4096.",
        rich_help_panel=panels.REMOTE,
    ),
]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        envvar=_envvar("EXPERT"),
        metavar="NAME=TUNED[,UNTUNED]",
        help="An expert: a tuned small model and its untuned twin. May be given several times.",
        rich_help_panel=panels.MODELS,
    ),
]


PresetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        envvar=_envvar("PRESET"),
        metavar="NAME=JSON",
        help="A fusion with a name, callable as a model. May be given several times.",
        rich_help_panel=panels.FUSION,
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        envvar=_envvar("CALIBRATION"),
        exists=True,
        dir_okay=False,
        help="What `proxyserve calibrate --save` wrote; rule `edit` takes its weights from it.",
        rich_help_panel=panels.FUSION,
    ),
]
AdminKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--admin-key-file",
        envvar=_envvar("ADMIN_KEY_FILE"),
        exists=True,
        dir_okay=False,
        help="Keys of administrators, in the form of --api-key-file. Without any keys everybody is one.",
        rich_help_panel=panels.NETWORK,
    ),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        "--protect",
        envvar=_envvar("PROTECT"),
        metavar="EXPERT",
        help="Only administrators may weigh against this expert. May be given several times.",
        rich_help_panel=panels.FUSION,
    ),
]
ExplainToAll = Annotated[
    bool,
    typer.Option(
        "--explain-to-all/--explain-to-admins",
        envvar=_envvar("EXPLAIN_TO_ALL"),
        help="Who may ask for explanations, which show the laws of single models.",
        rich_help_panel=panels.FUSION,
    ),
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        envvar=_envvar("CHAT_TEMPLATE"),
        exists=True,
        dir_okay=False,
        help="Jinja chat template for models that have none of their own.",
        rich_help_panel=panels.CHATS,
    ),
]
ToolParserOption = Annotated[
    ToolParser,
    typer.Option(
        "--tool-parser",
        envvar=_envvar("TOOL_PARSER"),
        help="Form of tool calls: hermes, llama, or auto, which finds it out from the chat template.",
        rich_help_panel=panels.CHATS,
    ),
]
ReasoningParserOption = Annotated[
    ReasoningParser,
    typer.Option(
        "--reasoning-parser",
        envvar=_envvar("REASONING_PARSER"),
        help="Tell reasoning from answers: deepseek (<think>...</think>), none, or auto, which does so where the chat "
        "template has these marks.",
        rich_help_panel=panels.CHATS,
    ),
]


def chat_config(
    template: Path | None, tool_parser: ToolParser, reasoning_parser: ReasoningParser
) -> ChatConfig:
    """Reads the template, which must be one."""
    if template is None:
        return ChatConfig(None, tool_parser, reasoning_parser)
    from proxyserve.text.templates import ChatTemplate

    try:
        source = template.read_text(encoding="utf-8")
        ChatTemplate(source).reads("messages")
    except (OSError, UnicodeDecodeError, InvalidRequest) as error:
        raise typer.BadParameter(f"{template}: {error}", param_hint="--chat-template") from error
    return ChatConfig(source, tool_parser, reasoning_parser)


def parse_threads(text: str) -> int | Literal["auto"]:
    """`auto` or a number."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(
            f"'{text}' is neither auto nor a number of threads, 1 or more", param_hint="--threads"
        )
    return int(text)


def parse_quantize(text: str) -> Literal["int8", "int4"] | None:
    """`off`, `int8` or `int4`."""
    if text in ("off", "False"):  # YAML reads a bare off as false
        return None
    if text == "int8":
        return "int8"
    if text == "int4":
        return "int4"
    raise typer.BadParameter(f"'{text}' is none of off, int8 and int4", param_hint="--quantize")


def parse_speculate(text: str) -> Speculate:
    """`auto`, `off` or a number, which `EngineConfig` checks."""
    if text == "auto":
        return "auto"
    if text in ("off", "False"):  # YAML reads a bare off as false
        return "off"
    if not (text.isascii() and text.isdecimal()):
        raise typer.BadParameter(
            f"'{text}' is none of auto, off and a number of tokens", param_hint="--speculate"
        )
    return int(text)


def check_max_drafts(max_drafts: int | None, speculate: Speculate) -> int:
    """For `EngineConfig`. It limits what `auto` chooses; beside another `--speculate` it would say nothing."""
    if max_drafts is None:
        return EngineConfig().max_drafts
    if speculate != "auto":
        raise typer.BadParameter(
            f"it limits --speculate auto, and --speculate is {speculate}; leave one of the two out",
            param_hint="--max-drafts",
        )
    return max_drafts


def parse_preset(text: str) -> tuple[str, str]:
    """`NAME=JSON` -> its two parts."""
    name, equals, fusion = text.partition("=")
    if not (name and equals and fusion):
        raise typer.BadParameter(f"'{text}' is not of the form NAME=JSON", param_hint="--preset")
    return name, fusion


def parse_range(text: str) -> tuple[float, float]:
    """`-4:4` -> (-4.0, 4.0)."""
    low, colon, high = text.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not of the form LOW:HIGH, -4:4 say") from None
    if not colon or not bounds[0] <= 0.0 <= bounds[1]:
        raise typer.BadParameter(f"the range {text} must contain 0")
    return bounds
