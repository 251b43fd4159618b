"""One engine over the demo family, two servers over it, one browser: shared by all tests of the playground."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxyserve.api.app import create_app
from proxyserve.api.server import DrainingServer, listen
from proxyserve.cli.opening import Opened, open_server
from proxyserve.cli.settings import ExpertSettings, ServeSettings
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.demo.family import family_paths
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.models.family import ExpertSource
from tests.api.admin_fakes import with_keys
from tests.api.live import wait_until
from tests.tools import need

playwright = pytest.importorskip("playwright.sync_api")

#: As root in a container, and without a word to anybody else.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 20_000  # milliseconds
STATUS = re.compile(r"the server responded with a status of (\d+)")

#: Adds up how far things have moved that nobody had touched.
WATCH_SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""

HOUSE = '{"rule": "dynamic", "experts": {"qa": 1}}'


@pytest.fixture(scope="package")
def opened() -> Iterator[Opened]:
    family = family_paths()
    settings = ServeSettings(
        engine=EngineConfig(
            dtype="float32", threads=1, max_batch=8, max_batch_tokens=64, kv_memory=64 * 2**20
        ),
        server=ServerConfig(),
        policy=FusionPolicy(),
        presets={"house": HOUSE},
        calibrations={},
        experts=ExpertSettings(roots=(family.base.parent,)),
    )
    experts = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    with open_server(family.base, experts, settings, served_name=None, progress=lambda _: None) as everything:
        everything.engine.start()
        yield everything
        everything.engine.close()


@contextmanager
def serving(opened: Opened, listeners: list[Any], config: ServerConfig) -> Iterator[None]:
    server = DrainingServer(create_app(opened.engine, config, opened.experts))
    thread = threading.Thread(target=server.run, args=(listeners,), name="test-playground")
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join(30)


@dataclass(frozen=True)
class Sites:
    """Addresses: `open` has no keys; `guarded` has, and its control plane is at `admin`."""

    open: str
    guarded: str
    admin: str


@pytest.fixture(scope="package")
def sites(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    # All stop at the end only: the first that does drains the engine.
    with ExitStack() as stack:
        free, users, admins = (stack.enter_context(listen("127.0.0.1", 0)) for _ in range(3))
        ports = [each.getsockname()[1] for each in (free, users, admins)]
        stack.enter_context(serving(opened, [free], ServerConfig(port=ports[0])))
        keyed = with_keys(tmp_path_factory.mktemp("keys"))
        config = ServerConfig(
            port=ports[1],
            admin_port=ports[2],
            api_key_file=keyed.api_key_file,
            admin_key_file=keyed.admin_key_file,
        )
        stack.enter_context(serving(opened, [users, admins], config))
        yield Sites(*(f"http://127.0.0.1:{port}/" for port in ports))


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    program = need("chromium")
    with (
        playwright.sync_playwright() as started,
        started.chromium.launch(executable_path=program, args=ARGUMENTS) as running,
    ):
        yield running


@dataclass
class Tab:
    """A page of the playground, and what must not happen in it."""

    page: Any
    expected: set[int] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def answer(self, side: int = 0) -> Any:
        return self.page.locator(f'.pane[data-side="{side}"]')

    def tokens(self, side: int = 0) -> Any:
        return self.answer(side).locator(".t")

    def text(self, side: int = 0) -> str:
        text: str = self.answer(side).locator(".tokens").evaluate("box => box.textContent")
        return text

    def send(self) -> None:
        self.page.get_by_role("button", name="Send").click()

    def settled(self, status: str = "done", sides: int = 2) -> None:
        """Wait until all answers are over."""
        expect(self.page.locator(f".pane[data-status={status}]")).to_have_count(sides)
        self.page.wait_for_timeout(60)  # the frame that shows the last tokens

    def weigh(self, expert: str, weight: float, side: int = 0) -> None:
        """Move a slider as a pointer does, in one go."""
        slider = self.page.locator(".side").nth(side).get_by_role("slider", name=expert)
        slider.evaluate(
            "(input, weight) => { input.value = weight;"
            " input.dispatchEvent(new Event('input', {bubbles: true})); }",
            weight,
        )


Opening = Callable[..., Tab]


@pytest.fixture(scope="package")
def usual(browser: Any) -> Iterator[Any]:
    """A desktop window. It is one for all, so that the page's files are loaded once."""
    with new_context(browser) as context:
        yield context


def new_context(browser: Any, **options: Any) -> Any:
    context = browser.new_context(**{"viewport": {"width": 1360, "height": 980}, **options})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.add_init_script(WATCH_SHIFTS)
    return context


@pytest.fixture
def tab(browser: Any, usual: Any, sites: Sites) -> Iterator[Opening]:
    """Opens pages. Each ends with no error in its console but the statuses in `expected`, and with no request to
    another host."""
    with ExitStack() as stack:
        tabs: list[Tab] = []

        def open_tab(
            url: str | None = None, *, ready: str = ".play, .experts", expected: int = 0, **options: Any
        ) -> Tab:
            context = stack.enter_context(new_context(browser, **options)) if options else usual
            page = stack.enter_context(context.new_page())
            page.set_default_timeout(PATIENCE)
            tab = Tab(page, {expected})
            tabs.append(tab)

            def heard(message: Any) -> None:
                status = STATUS.search(message.text)
                if message.type in ("error", "warning") and not (
                    status and int(status.group(1)) in tab.expected
                ):
                    tab.complaints.append(message.text)

            def asked(request: Any) -> None:
                if not request.url.startswith("http://127.0.0.1:"):
                    tab.complaints.append(f"asked another host: {request.url}")

            page.on("console", heard)
            page.on("pageerror", lambda error: tab.complaints.append(str(error)))
            page.on("request", asked)
            page.goto(url or sites.open)
            page.locator(ready).first.wait_for()
            return tab

        yield open_tab
        for tab in tabs:
            assert tab.complaints == []


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


@pytest.fixture(scope="package", autouse=True)
def patient() -> None:
    playwright.expect.set_options(timeout=PATIENCE)


@pytest.fixture
def family() -> Path:
    return family_paths().base.parent
