"""Experts by hub id (`org/name` or `org/name@revision`), brought into the local cache of `huggingface_hub`.

    python -m proxyserve.experts.hub ID       prints the folder, or one line about why not

The download runs in a process of its own: the server's has the hub switched off, and its interpreter is busy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from proxyserve.errors import LoadError

#: A download that hangs must not keep all other experts from being loaded for ever.
_PATIENCE_SECONDS = 3600
#: What a model or an adapter is made of; no pickles, no code.
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]


def fetch(hub_id: str) -> Path:
    """The folder of its snapshot. Raises LoadError if it cannot be had."""
    command = [sys.executable, "-m", "proxyserve.experts.hub", hub_id]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"'{hub_id}' did not come from the hub within {_PATIENCE_SECONDS} s") from None
    lines = done.stdout.split("\n")
    if done.returncode != 0 or len(lines) < 2:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LoadError(f"'{hub_id}' cannot be had from the hub: {reason[:300]}")
    return Path(lines[-2])


def _download(hub_id: str) -> str:
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    return snapshot_download(name, revision=revision or None, allow_patterns=_PATTERNS)


if __name__ == "__main__":
    try:
        print(_download(sys.argv[1]))
    except Exception as error:  # of many kinds: no network, no such model, no right to it
        sys.exit(" ".join(str(error).split()) or type(error).__name__)
