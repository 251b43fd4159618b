"""Settings, resolved once at start-up and frozen. The CLI and the tests build these; nothing reads the environment
later."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

KernelChoice = Literal["auto", "torch", "triton"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
ToolParser = Literal["auto", "hermes", "llama"]
ReasoningParser = Literal["auto", "deepseek", "none"]
PairsChoice = Literal["auto", "together", "apart"]
Speculate = int | Literal["auto", "off"]

#: How many tokens a text may go ahead of what is verified: state that must come back is kept for as many.
MOST_DRAFTS = 32

#: As browsers send it: no path, and no capitals.
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs.

    `dtype` "auto" is bfloat16 on a GPU; on a CPU it is float32, or, where all weights are stored in one half-precision
    dtype, whichever of the two is clearly faster, else that; "fastest" takes the faster of float32 and bfloat16.
    `max_batch` is the most requests that run at once, `max_batch_tokens` the most tokens one model computes per step
    (long prompts are cut into chunks of at most that many), `prefill_tokens` the most tokens of prompts among these
    while other requests decode, beside two for each of those (None: 32 on a CPU, no such limit on a GPU),
    `max_scored_rows` the most rows of logits, of all models together, that a step computes to score prompts and drafts
    (the memory plan sets theirs aside). `kv_memory` is in bytes for the KV caches of all models together; None lets the
    plan choose. `threads` "auto" takes as many cores as are worth it, by a measurement; None leaves torch's own choice.
    `kernels` names the backend of the logit arithmetic: "torch", "triton", or "auto", which is triton on a CUDA device.
    `pairs` says whether models that differ in their weights only run "together" in one forward, or "apart"; "auto"
    measures which is faster. `cuda_graphs`: on a CUDA device, steps of decoding are recorded when a model comes and
    then replayed, which costs start-up time and memory. `quantize` stores the linear layers of a local base in so many
    bits. `tensor_parallel` divides a local base over so many processes, one for each GPU, or, where there is none, over
    processes on the CPU; it goes with neither of the former two.

    `speculate` says how many tokens are drafted ahead for each request, and verified together: that many where it can
    be done, "off" for none, or "auto" for as many as measured acceptance and times make worth it, at most `max_drafts`
    (which says nothing of the others).
    """

    device: str = "auto"
    dtype: str = "auto"
    max_batch: int = 64
    max_batch_tokens: int = 512
    prefill_tokens: int | None = None
    max_scored_rows: int = 256
    kv_memory: int | None = None
    block_size: int = 16
    prefix_cache: bool = True
    threads: int | Literal["auto"] | None = None
    quantize: Literal["int8", "int4"] | None = None
    tensor_parallel: int = 1
    kernels: KernelChoice = "auto"
    cuda_graphs: bool = True
    speculate: Speculate = "auto"
    max_drafts: int = 8
    pairs: PairsChoice = "auto"

    @property
    def most_drafts(self) -> int:
        """Tokens that are drafted ahead for one request at most."""
        if self.speculate == "off":
            return 0
        return self.max_drafts if self.speculate == "auto" else self.speculate

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_batch_tokens", "max_scored_rows", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kernels not in ("auto", "torch", "triton"):
            raise ValueError(f"kernels must be auto, torch or triton, not '{self.kernels}'")
        if self.speculate not in ("auto", "off") and not (
            isinstance(self.speculate, int) and 1 <= self.speculate <= MOST_DRAFTS
        ):
            raise ValueError(
                f"speculate must be auto, off, or a number from 1 to {MOST_DRAFTS}, not '{self.speculate}'"
            )
        if not 1 <= self.max_drafts <= MOST_DRAFTS:
            raise ValueError(
                f"max_drafts must be from 1 to {MOST_DRAFTS}, not {self.max_drafts}; "
                "to draft nothing, set speculate to off"
            )
        if self.pairs not in ("auto", "together", "apart"):
            raise ValueError(f"pairs must be auto, together or apart, not '{self.pairs}'")
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, not {self.tensor_parallel}")
        if self.tensor_parallel > 1 and self.quantize is not None:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} and quantize {self.quantize} exclude each other: quantised "
                "weights are not divided; leave one of them out"
            )
        if self.prefill_tokens is not None and self.prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, not {self.prefill_tokens}")
        if self.max_batch_tokens < self.max_batch:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch ({self.max_batch}), "
                "so that every running request can advance in each step"
            )


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How the log is written, to standard error."""

    format: LogFormat = "text"
    level: LogLevel = "info"


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Caps on structured output.

    On one grammar: `max_length` in characters (of a schema: as JSON without spaces), `max_depth` of a schema's nesting,
    and how many properties, values in `enum`, and choices it has. `max_regex_length` is also the longest choice.

    On compiling it, in a process of its own: seconds, and bytes beside what the vocabulary takes. At most `max_waiting`
    grammars wait for that; `max_cached` of those that passed are kept, of about `max_cached_bytes` together.

    On each step of one choice, in the library's units: `step_fuel` for its lexer (about 14000 a millisecond),
    `step_items` for its parser (20000 a millisecond); and on what a choice keeps, `lexer_states` (about 1 kB each).
    """

    max_length: int = 256 * 1024
    max_depth: int = 64
    max_properties: int = 5000
    max_enum: int = 5000
    max_regex_length: int = 4096
    max_choices: int = 1024
    compile_seconds: float = 4.0
    compile_memory: int = 512 * 2**20
    max_waiting: int = 64
    max_cached: int = 256
    max_cached_bytes: int = 256 * 2**20
    step_fuel: int = 50_000
    step_items: int = 20_000
    lexer_states: int = 100_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps on what one request, or all waiting requests together, may ask for. Each has its own error message.
    `max_choices` are those of all prompts (or texts to score) together; `max_prompt_logprobs` are values in a whole
    response; `max_tokenized_characters` and `max_tokenized_ids` are for the tokenizer's routes. `header_seconds` and
    `body_seconds` are how long a request's headers and its body may take to come,
    `max_unread_tokens` how far the engine may be ahead of whoever reads a stream. All must be above 0."""

    max_n: int = 16
    max_choices: int = 256
    max_stop: int = 16
    max_stop_length: int = 200
    max_logit_bias: int = 1024
    max_bad_words: int = 128
    max_logprobs: int = 20
    max_logprob_token_ids: int = 128
    max_prompt_logprobs: int = 1_000_000
    max_batched_prompts: int = 256
    max_body_bytes: int = 8 * 2**20
    max_tokenized_characters: int = 2**20
    max_tokenized_ids: int = 2**18
    max_tools: int = 128
    max_tool_bytes: int = 256 * 1024
    max_tool_depth: int = 32
    max_template_variables: int = 16
    max_template_variable_length: int = 4096
    max_waiting_requests: int = 1024
    max_waiting_tokens: int = 1_000_000
    max_connections: int = 900  # below the 1024 open files that most systems allow a process
    max_headers: int = 100
    max_header_bytes: int = 32 * 2**10
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    max_unread_tokens: int = 16_384
    grammar: GrammarLimits = field(default_factory=GrammarLimits)

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{limit.name} must be above 0, not {value}")


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """How conversations are rendered and answers read. `template` is the source of a chat template for models that have
    none of their own. `tool_parser` is the form of tool calls, `reasoning_parser` whether answers may begin with
    reasoning between `<think>` and `</think>`; "auto" finds it out from each request's template."""

    template: str | None = None
    tool_parser: ToolParser = "auto"
    reasoning_parser: ReasoningParser = "auto"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where and for whom the HTTP server listens. No key file at all means no keys: loopback addresses only, and
    whoever connects is the administrator. Keys of `admin_key_file` may do everything that keys of `api_key_file` may,
    and more. With `admin_port` the control plane is on that port only, and nothing for users is.
    `drain_seconds` is how long running requests may take to finish after SIGTERM, `load_wait_seconds` how long a
    request may wait for an expert that must be loaded first, `request_timeout` how long one may take in all, None for
    any time. Web pages of `cors_origins` may read answers. With `tls_certificate` (a chain of them, PEM) and `tls_key`
    the server speaks HTTPS alone. Traces go to the collector at `otlp_endpoint`, a URL that takes OTLP over HTTP; None
    makes none. `playground`: whether the page to try things out is served at `/`."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    admin_port: int | None = None
    drain_seconds: float = 30.0
    load_wait_seconds: float = 30.0
    request_timeout: float | None = None
    cors_origins: tuple[str, ...] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    otlp_endpoint: str | None = None
    playground: bool = True
    limits: Limits = field(default_factory=Limits)
    chat: ChatConfig = field(default_factory=ChatConfig)

    def __post_init__(self) -> None:
        if self.admin_port is not None and self.admin_port in (0, self.port):
            raise ValueError("admin_port must be another port than port, and not 0")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; give both or none")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' is no origin; write https://HOST or https://HOST:PORT, in small letters and without a "
                    "path ('*' is not possible: name those who may)"
                )
