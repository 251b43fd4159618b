"""What goes wrong is said, and what had come is kept."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import quote, urlsplit

from tests.playground.conftest import Opening, Sites, expect


def view(**parts: object) -> str:
    return f"#view={quote(json.dumps(parts))}"


def test_an_unknown_expert(tab: Opening, sites: Sites) -> None:
    """From a link to another server."""
    sides = [{"model": "proxy", "weights": {"ghost": 1}}, {"model": "preset:gone"}]
    page = tab(sites.open + view(prompt="Kustin", sides=sides))
    page.expected.add(404)
    expect(page.page.locator(".weight", has_text="ghost")).to_contain_text("not on this server")
    page.send()
    page.settled("failed")
    expect(page.answer(0).get_by_role("alert")).to_contain_text("There is no expert 'ghost' here")
    expect(page.answer(1).get_by_role("alert")).to_contain_text("There is no model 'gone' here")
    page.weigh("ghost", 0)
    page.weigh("record", 1)  # it recovers by itself, as weights do
    expect(page.answer(0).locator(".tokens")).to_contain_text("birthplace")


def test_a_bad_value_names_its_field(tab: Opening) -> None:
    page = tab()
    page.expected.add(400)
    page.page.get_by_label("Weight of record as a number").fill("9")
    page.page.get_by_label("Weight of record as a number").press("Tab")
    page.send()
    expect(page.answer(0).get_by_role("alert")).to_contain_text("this server allows -4 to 4")
    page.page.get_by_text("Beside the rule").click()
    prompts = page.page.get_by_label("prompts")
    prompts.fill("{not json")
    prompts.press("Tab")
    expect(page.page.get_by_text("This is not JSON.")).to_be_visible()


@contextmanager
def broken_wire(url: str, events: int) -> Iterator[str]:
    """The address of a connection to `url` that is cut in each stream after so many events. In the end all are."""
    target = urlsplit(url)
    clients: list[socket.socket] = []

    def carry(client: socket.socket) -> None:
        with closing(client), socket.create_connection((target.hostname, target.port)) as server:
            threading.Thread(target=pump, args=(client, server), daemon=True).start()
            seen = 0
            while data := server.recv(65536):
                seen += data.count(b"data: {")
                if seen > events:
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def pump(client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):  # it was cut
            while data := client.recv(65536):
                server.sendall(data)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            clients.append(client)
            threading.Thread(target=carry, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        for client in clients:
            with suppress(OSError):  # it was cut before
                client.shutdown(socket.SHUT_RDWR)


def test_a_server_that_goes_away(tab: Opening, sites: Sites) -> None:
    with broken_wire(sites.open, events=6) as url:
        page = tab(url)
        page.send()
        page.settled("failed")
        expect(page.answer(0).get_by_role("alert")).to_contain_text("broke off")
        expect(page.answer(0).get_by_role("alert")).to_contain_text("is kept")
        assert page.text(0).startswith("birthplace: Nudreth")
    page.send()
    expect(page.answer(0).get_by_role("alert")).to_contain_text("cannot be reached")
    # Chromium says of its own accord that connections failed.
    page.complaints[:] = [said for said in page.complaints if "net::ERR_" not in said]
