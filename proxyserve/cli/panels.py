"""The headings under which options stand in help texts."""

from __future__ import annotations

#: Of the commands that talk to a running server.
SERVER = "Server"
SAMPLING = "Sampling"
#: Of `serve` and `demo`, in this order.
MODELS = "Models"
NETWORK = "Network and keys"
COMPUTING = "Computing"
MEMORY = "Memory"
FUSION = "Fusion"
EXPERTS = "Experts that come and go"
LIMITS = "Limits"
CHATS = "Chats"
LOGS = "Logs and traces"
REMOTE = "Base on another server"
