"""Listening, and stopping without losing anybody's answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from proxyserve.api.app import create_app
from proxyserve.api.errors import StartupError
from proxyserve.api.protocol import ProtocolConfig
from proxyserve.api.state import ServerState
from proxyserve.api.telemetry import open_tracing
from proxyserve.config import ServerConfig
from proxyserve.errors import RankLost

if TYPE_CHECKING:
    from proxyserve.engine.loop import AsyncEngine
    from proxyserve.experts.manager import ExpertManager

logger = logging.getLogger("proxyserve.api")

#: How long answers that were cut off may take to say so, and idle connections to close.
_FAREWELL_SECONDS = 5

#: Key files are looked at once a second.
_KEY_TICKS = 10


def run_server(engine: AsyncEngine, config: ServerConfig, experts: ExpertManager | None = None) -> None:
    """Start `engine`, serve until SIGTERM or SIGINT, drain, close `engine`. Call it on the main thread, with an engine
    that was not started yet. `experts` changes its experts on behalf of the control plane.

    At the first signal `/ready` turns to 503, new work is refused, and what runs may go on for
    `config.drain_seconds`; then, or at a second signal, what is left ends with an error. Raises StartupError if the
    address cannot or must not be listened on, the certificate cannot be used, or traces cannot be sent; RankLost if a
    process that has a part of the base ends, and with it the server.
    """
    check_binding(config)
    check_tls(config)
    tracing = open_tracing(config.otlp_endpoint)
    with ExitStack() as stack:
        if tracing is not None:
            stack.callback(tracing.close)
        app = create_app(engine, config, experts, tracing)
        ports = [config.port, *([] if config.admin_port is None else [config.admin_port])]
        listeners = [stack.enter_context(listen(config.host, port)) for port in ports]
        engine.start()
        try:
            DrainingServer(app).run(listeners)
        finally:
            engine.close()
    if engine.lost:
        raise RankLost(f"The server has lost a part of the base: {engine.failure}. Start it again.")


def check_binding(config: ServerConfig) -> None:
    """Without keys anyone who can connect can use the server, so nobody else may be able to connect. Raises
    StartupError."""
    if config.api_key_file is None and config.admin_key_file is None and not _is_loopback(config.host):
        raise StartupError(
            f"Listening on {config.host} needs keys, since others can reach it: give --api-key-file, or use "
            "--host 127.0.0.1."
        )


def check_tls(config: ServerConfig) -> None:
    """Raises StartupError if the certificate and its key cannot be used."""
    if config.tls_certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_certificate, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise StartupError(
            f"The certificate {config.tls_certificate} and the key {config.tls_key} cannot be used: {error}. Both must "
            "be PEM files, the key without a password and of that certificate."
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes a free one. Raises StartupError if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"{host} is no address to listen on: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port."
        ) from error
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn, but with the listener open while it drains, so that load balancers see `/ready` change."""

    def __init__(self, app: FastAPI) -> None:
        self._state: ServerState = app.state.proxyserve
        config = self._state.config
        super().__init__(
            ProtocolConfig(
                app,
                config.limits,
                access_log=False,  # its lines hold query strings
                lifespan="off",
                log_config=None,  # whoever runs the server decides where logs go
                log_level="warning",
                server_header=False,
                ssl_certfile=config.tls_certificate,
                ssl_keyfile=config.tls_key,
                timeout_graceful_shutdown=_FAREWELL_SECONDS,
                ws="none",
            )
        )
        self._drain_seconds = config.drain_seconds
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler. uvicorn's own would raise the signal again at the end, and the process would not exit
        with 0."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._hurry.set)  # a signal alone does not wake the loop
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Comes ten times a second."""
        if counter % _KEY_TICKS == 0:
            self._state.keys.refresh()
        return await super().on_tick(counter) or self._state.engine.lost

    async def main_loop(self) -> None:
        """Runs until the first signal and on until drained; then uvicorn closes the listener and the connections."""
        self._loop = asyncio.get_running_loop()
        await super().main_loop()
        self._state.engine.drain()
        logger.warning("draining; at most %g seconds are left for running requests", self._drain_seconds)
        answered = asyncio.ensure_future(self._all_answered())
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait(
            {answered, hurried}, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        hurried.cancel()
        self._state.stopping.set()
        await asyncio.wait({answered}, timeout=_FAREWELL_SECONDS)
        self._state.grammars.close()

    async def _all_answered(self) -> None:
        """Return once the engine is idle and what it made has been sent, which can take longer."""
        await self._state.engine.drained()
        while self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
