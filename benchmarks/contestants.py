"""Who takes part: how each server is started, and how it is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxyserve.bench.load.drive import Target

EXPERT = "expert"
#: Most requests at once, of any server.
SEATS = 64
#: Of transformers' cache: tokens per block, and most tokens that it computes at once.
_BLOCK = 32
_MOST_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Models:
    """Folders of the models that everybody gets, and how their weights are computed with: float32 or bfloat16.
    `context` in tokens: prompt and answer of the longest request."""

    base: Path
    tuned: Path
    untuned: Path
    dtype: str
    context: int


@dataclass(frozen=True, slots=True)
class Server:
    """A process to start. `command` lacks host and port. `extra` are fields for its requests; `texts`: it takes no
    token ids. `quiet`: it measures while it starts, so nothing else may start beside it. `missing` says what has to be
    there before it can be started."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    texts: bool = False
    quiet: bool = False
    missing: str | None = None

    def command_at(self, port: int) -> list[str]:
        """Listening on this machine alone."""
        return [*self.command, "--host", "127.0.0.1", "--port", str(port)]

    def target(self, port: int) -> Target:
        """Greedy, as long as asked for."""
        return Target(f"http://127.0.0.1:{port}", extra={"temperature": 0, **self.extra}, timeout=120.0)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A line of the table: `model` as asked from `server`, by name. `fused`: base and expert; otherwise the base alone.
    `peer`: the best of these is what everybody is held against."""

    name: str
    server: str
    model: str
    fused: bool = False
    peer: bool = False


#: The plain Hugging Face loop, which runs in this process.
LOOP = Contestant("Hugging Face loop, fused", "", "", fused=True)


def servers(models: Models, peers: Path) -> list[Server]:
    """All of them; `peers` is what setup_peers.sh filled."""
    return [_vllm(models, peers), _llama(models, peers), _transformers(models), *_ours(models)]


def contestants(models: Models) -> list[Contestant]:
    """In the order of their turns."""
    return [
        Contestant("proxyserve, base", "proxyserve", "base"),
        Contestant("proxyserve, fused, no drafts", "proxyserve", f"base+{EXPERT}", fused=True),
        Contestant("proxyserve, fused", "proxyserve, drafts", f"base+{EXPERT}", fused=True),
        Contestant("vLLM, base", "vLLM", "base", peer=True),
        Contestant("llama.cpp, base", "llama.cpp", "base", peer=True),
        Contestant("transformers serve, base", "transformers serve", str(models.base), peer=True),
        LOOP,
    ]


def _ours(models: Models) -> list[Server]:
    def server(name: str, speculate: str) -> Server:
        command = (
            *(sys.executable, "-m", "proxyserve", "serve", str(models.base), "--served-name", "base"),
            *("--expert", f"{EXPERT}={models.tuned},{models.untuned}", "--dtype", models.dtype),
            *("--device", "cpu", "--threads", "1", "--speculate", speculate, "--no-prefix-cache"),
            *("--max-batch", str(SEATS), "--kv-memory", "1GiB", "--log-level", "warning"),
        )
        return Server(name, command, quiet=True)

    return [server("proxyserve", "off"), server("proxyserve, drafts", "auto")]


def _vllm(models: Models, peers: Path) -> Server:
    python = peers / "vllm" / "bin" / "python"
    command = (
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(models.base)),
        *("--served-model-name", "base", "--dtype", models.dtype, "--enforce-eager"),
        *("--max-model-len", str(models.context), "--max-num-seqs", str(SEATS), "--no-enable-prefix-caching"),
    )
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_SGL_KERNEL": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return Server("vLLM", command, environment, missing=_missing(python))


def _llama(models: Models, peers: Path) -> Server:
    server = peers / "llama" / "bin" / "llama-server"
    command = (
        *(str(server), "--model", str(gguf_of(models)), "--alias", "base", "--threads", "1"),
        *("--threads-batch", "1", "--parallel", str(SEATS), "--ctx-size", str(SEATS * models.context)),
        *(
            "--no-kv-unified",
            "--no-cache-prompt",
            "--cache-ram",
            "0",
            "--no-slots",
            "--no-webui",
            "--offline",
        ),
    )
    return Server("llama.cpp", command, missing=_missing(server))


def _transformers(models: Models) -> Server:
    program = Path(sys.executable).with_name("transformers")
    command = (
        *(str(program), "serve", str(models.base), "--continuous-batching", "--device", "cpu"),
        *("--dtype", models.dtype, "--log-level", "error"),
        # By default its cache takes nine tenths of the memory that is free.
        *("--cb-block-size", str(_BLOCK), "--cb-num-blocks", str(2 * SEATS * -(-models.context // _BLOCK))),
        *("--cb-max-batch-tokens", str(_MOST_TOKENS)),
    )
    # It has no `ignore_eos`: a generation config without an end does the same.
    extra = {"ignore_eos": None, "stream_options": None, "generation_config": "{}"}
    return Server("transformers serve", command, extra=extra, texts=True, missing=_missing(program))


def _missing(program: Path) -> str | None:
    return (
        None
        if program.is_file()
        else f"not installed: no {program.parent.parent.name}/{program.parent.name}/{program.name}"
    )


def gguf_of(models: Models) -> Path:
    """The file that llama.cpp reads."""
    return models.base.with_suffix(".gguf")


def write_gguf(models: Models, peers: Path) -> str | None:
    """Make `gguf_of(models)` with what is in llama.cpp's environment. Why that was not possible, or None."""
    script = Path(__file__).with_name("gguf_file.py")
    python = peers / "llama" / "bin" / "python"
    command = [str(python), str(script), str(models.base), str(gguf_of(models)), "--dtype", models.dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"the GGUF file could not be written: {error}"
    if done.returncode == 0:
        return None
    return f"the GGUF file could not be written: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
