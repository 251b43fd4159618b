"""`proxyserve` commands as forks of one process that has imported everything.

Importing torch and transformers takes seconds of processor time, which dozens of commands would each pay. The script
that stands for `proxyserve` on the path of a page's shell hands its arguments, folder, environment and streams over a
Unix socket to this process, and a fork of it runs the command's own `main` with them.

    python forked.py SOCKET       serves until its standard input ends
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

#: What commands import once they know what they are to do.
_HEAVY = (
    "transformers.models.llama.modeling_llama",
    "proxyserve.cli.formula",
    "proxyserve.cli.opening",
    "proxyserve.evaluation.likelihood",
)

#: What is installed as `proxyserve`. It passes on SIGTERM and SIGINT, and ends with the command's own status.
SCRIPT = """#!{python} -IS
import array, json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    streams = array.array("i", [0, 1, 2])
    line.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    line.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    answers = line.makefile()
    command = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(command, number))
    sys.exit(int(answers.readline()))
"""


def install(folder: Path, address: Path) -> None:
    """Put a `proxyserve` into `folder` that talks to the process at `address`."""
    script = folder / "proxyserve"
    script.write_text(SCRIPT.format(python=sys.executable, address=str(address)))
    script.chmod(0o755)


def serve(address: str) -> None:
    """Fork for each connection. There is one thread only: a fork may find the locks of others held for ever."""
    for module in _HEAVY:
        import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _keep(connection)


def _keep(connection: socket.socket) -> None:
    """Run one command in a child, and tell the script its process id and how it ended. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    streams = array.array("i", [-1, -1, -1])
    _, extra, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(len(streams) * streams.itemsize))
    streams = array.array("i", extra[0][2])
    said = b""
    while not said.endswith(b"\n"):
        said += connection.recv(1 << 16)
    arguments, folder, environment = json.loads(said)
    command = os.fork()
    if command == 0:
        connection.close()
        _become(arguments, folder, environment, streams)
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{command}\n".encode())
        _, status = os.waitpid(command, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(
    arguments: list[str], folder: str, environment: dict[str, str], streams: array.array[int]
) -> None:
    """Be the command. Does not return."""
    from proxyserve.cli.main import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["proxyserve", *arguments]
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
