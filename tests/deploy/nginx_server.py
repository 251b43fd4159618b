"""nginx with the example configuration, on free ports and with a certificate of its own."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.api.live import wait_until
from tests.tools import need

NAME = "inference.example.com"

_MAIN = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/proxyserve.conf;
}}
"""


@dataclass(frozen=True)
class Nginx:
    address: tuple[str, int]
    certificate: Path
    access_log: Path

    def client(self) -> httpx.Client:
        trust = ssl.create_default_context(cafile=str(self.certificate))
        url = "https://{}:{}".format(*self.address)
        return httpx.Client(base_url=url, verify=trust, timeout=20.0, trust_env=False)


def configure(example: Path, folder: Path, port: int, upstream: str) -> Path:
    """The example with this test's ports and paths. Raises AssertionError where it has not what is replaced."""
    text = example.read_text()
    for old, new in (
        ("server 127.0.0.1:8000;", f"server {upstream};"),
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port} ssl http2;"),
        ("/etc/nginx/tls", str(folder)),
        ("/var/log/nginx", str(folder)),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "proxyserve.conf").write_text(text)
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(folder=folder))
    options = (
        f"-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={NAME}".split()
    )
    names = ["-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1"]
    files = ["-keyout", folder / "proxyserve.key", "-out", folder / "proxyserve.crt"]
    subprocess.run([need("openssl"), "req", *options, *names, *files], check=True, capture_output=True)
    return main


@contextmanager
def run_nginx(main: Path, port: int) -> Iterator[Nginx]:
    folder = main.parent
    nginx = Nginx(("127.0.0.1", port), folder / "proxyserve.crt", folder / "proxyserve.log")
    with (folder / "stderr").open("wb") as output:
        process = subprocess.Popen([need("nginx"), "-e", "stderr", "-c", main], stderr=output)
        try:
            wait_until(lambda: process.poll() is not None or (folder / "nginx.pid").exists())
            assert process.poll() is None, (folder / "stderr").read_text()
            yield nginx
        finally:
            process.terminate()
            process.wait(20)
