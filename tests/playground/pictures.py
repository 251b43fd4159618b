"""Makes the pictures of docs/playground.md from a running `proxyserve demo`:

python -m tests.playground.pictures http://127.0.0.1:8000/
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.playground.conftest import ARGUMENTS
from tests.tools import need

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
DESKTOP = {"width": 1360, "height": 940}
PHONE = {"width": 390, "height": 844}


def save(page: Any, name: str) -> None:
    """Packed as tightly as PNG goes."""
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    picture.save(FOLDER / f"playground_{name}.png", optimize=True)


def answered(browser: Any, url: str, **options: Any) -> Any:
    page = browser.new_page(**options)
    page.goto(url)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".pane[data-status=done]")).to_have_count(2)
    page.wait_for_timeout(500)
    return page


def main(url: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=need("chromium"), args=ARGUMENTS) as browser,
    ):
        page = answered(browser, url, viewport=DESKTOP, color_scheme="light")
        page.locator(".tokens .t").first.click()
        page.mouse.move(5, 5)
        save(page, "light")

        page = browser.new_page(viewport=DESKTOP, color_scheme="dark")
        page.goto(url)
        page.locator(".side select").first.select_option("dynamic")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".pane[data-status=done]")).to_have_count(2)
        page.wait_for_timeout(500)
        save(page, "dark")

        page = answered(browser, url, viewport=PHONE, color_scheme="light", has_touch=True, is_mobile=True)
        page.locator(".tokens .t").first.tap()
        save(page, "phone")

        page = browser.new_page(viewport=DESKTOP, color_scheme="light")
        page.goto(f"{url}#experts")
        expert = page.locator("[data-expert=qa]")
        expert.get_by_role("button", name="Swap").click()
        expert.get_by_label("Tuned", exact=True).fill("experts/bio")
        expert.get_by_label("Untuned", exact=True).fill("small")
        expert.get_by_role("button", name="Swap qa").click()
        expect(expert.get_by_role("status")).to_contain_text("now serves")
        save(page, "experts")
        expert.get_by_role("button", name="Roll back").click()
        expect(expert.get_by_role("status")).to_contain_text("serves again")


if __name__ == "__main__":
    main(sys.argv[1])
