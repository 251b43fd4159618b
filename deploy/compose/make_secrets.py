#!/usr/bin/env python3
"""Make what compose.yaml mounts from `secrets/`: keys for a client, an operator and Prometheus, and Grafana's password.
Standard library only. Nothing that is there already is changed.

The folder is closed to other users of this machine; the files in it are not, since each container reads its own as a
user of its own.
"""

import hashlib
import secrets
import sys
from pathlib import Path

#: Name of a key -> its role, and the file that it is written to.
KEYS = {
    "client": ("user", "client-key"),
    "operator": ("admin", "admin-key"),
    "prometheus": ("monitor", "monitor-key"),
}


def main(folder: Path) -> int:
    if folder.exists():
        print(f"{folder} is there already; remove it to make new keys", file=sys.stderr)
        return 1
    folder.mkdir(mode=0o700)
    records = ["keys:"]
    for name, (role, file) in KEYS.items():
        key = f"sk-{secrets.token_urlsafe(32)}"
        records += [
            f"- name: {name}",
            f"  role: {role}",
            f"  sha256: {hashlib.sha256(key.encode()).hexdigest()}",
        ]
        _write(folder / file, key)
    _write(folder / "keys.yaml", "\n".join(records) + "\n")
    _write(folder / "grafana-password", secrets.token_urlsafe(16))
    return 0


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o644)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "secrets"))
