"""The TypeScript client in a real browser: the same modules as in Node, found by an import map."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import pytest

from tests.clients.node_packages import NodePackages
from tests.tools import need

PAGE = """<!doctype html>
<script type="importmap">
  {"imports": {"openai": "/node_modules/openai/index.mjs", "@proxyserve/client": "/dist/index.js"}}
</script>
<script type="module">
  const tell = (what) => fetch("/told", { method: "POST", body: JSON.stringify(what) });
  try {
    const { fusion, ProxyServe } = await import("@proxyserve/client");
    const client = new ProxyServe({ baseURL: "SERVER", dangerouslyAllowBrowser: true });
    const stream = await client.streamChat({
      model: "atlas",
      messages: [{ role: "user", content: "Which instrument does Kustin play?" }],
      temperature: 0,
      fusion: fusion.proxy({ qa: 1 }, { explain: 1 }),
    });
    const experts = [];
    for await (const token of stream.tokens()) experts.push(token.contributions[0].expert);
    await tell({ text: stream.text, experts: [...new Set(experts)], ready: await client.ready() });
  } catch (error) {
    await tell({ error: String(error) });
  }
</script>
"""

#: The page is of another origin than the server, which has no `--cors-origin` here; that is tested with the server.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    "--enable-logging=stderr",
    *("--disable-background-networking", "--disable-component-update", "--disable-web-security"),
)


@pytest.mark.slow
def test_it_streams_in_a_browser(live_url: str, node_packages: NodePackages, tmp_path: Path) -> None:
    chromium = need("chromium")
    (node_packages.client / "page.html").write_text(PAGE.replace("SERVER", live_url))
    command = [str(chromium), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    log = tmp_path / "log"
    with served(node_packages.client) as (url, told), log.open("wb") as output:
        browser = subprocess.Popen([*command, f"{url}/page.html"], stdout=output, stderr=subprocess.STDOUT)
        try:
            seen = told.get(timeout=60)
        except Empty:
            pytest.fail(f"the page says nothing: {log.read_text(errors='replace')}")
        finally:
            browser.kill()
            browser.wait()
    assert seen == {"text": " harp", "experts": ["qa"], "ready": {"ready": True}}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Queue[dict[str, object]]]]:
    """The files of `folder` at an address, and what is posted to it."""
    told: Queue[dict[str, object]] = Queue()

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

        def do_POST(self) -> None:
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", told
        server.shutdown()
        thread.join()
