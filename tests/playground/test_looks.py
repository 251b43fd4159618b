"""Small and dark screens, long answers, and what readers of screens need."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.playground.conftest import Opening, Sites, expect
from tests.playground.test_answers import RECORD, answered

#: Everything that can be used has a name, names are unique where they are referred to, and headings do not skip levels.
AUDIT = """() => {
  const found = [];
  const named = (element) => element.getAttribute("aria-label") || element.getAttribute("aria-labelledby")
    || element.labels?.length || element.textContent.trim() || element.title;
  for (const element of document.querySelectorAll("button, a[href], input, select, textarea, [role=img], [role=group]"))
    if (!named(element)) found.push(`no name: ${element.outerHTML.slice(0, 90)}`);
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids) if (ids.filter((other) => other === id).length > 1) found.push(`twice: ${id}`);
  for (const element of document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]"))
    for (const name of ["aria-describedby", "aria-labelledby", "for"])
      for (const id of (element.getAttribute(name) ?? "").split(" ").filter(Boolean))
        if (!document.getElementById(id)) found.push(`points nowhere: ${id}`);
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3")) {
    const own = Number(heading.tagName[1]);
    if (own > level + 1) found.push(`skips a level: ${heading.textContent}`);
    level = own;
  }
  if (document.documentElement.lang !== "en") found.push("no language");
  return found;
}"""

#: The least contrast of visible text with what is behind it, as WCAG counts it.
CONTRAST = """(selector) => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  let least = [99, ""];
  for (const element of document.querySelectorAll(selector)) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.matches(":disabled, option, .unseen, .unseen *")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 120)];
  }
  return least;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(tab: Opening, sites: Sites, scheme: str) -> None:
    page = answered(tab, color_scheme=scheme)
    page.tokens().first.click()
    paper = page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(int(part) for part in paper.strip("rgb()").split(",")) < 200) is (scheme == "dark")
    assert page.page.evaluate(AUDIT) == []
    contrast, where = page.page.evaluate(CONTRAST, "body *")
    assert contrast >= 4.5, where
    page.page.get_by_role("link", name="Experts").click()
    page.page.locator(".expert").first.wait_for()
    assert page.page.evaluate(AUDIT) == []
    contrast, where = page.page.evaluate(CONTRAST, "body *")
    assert contrast >= 4.5, where


def test_a_theme_is_chosen_and_kept(tab: Opening) -> None:
    page = tab(color_scheme="light")
    button = page.page.get_by_role("button", name="Theme")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.page.evaluate(paper)
    button.click()
    button.click()
    dark = page.page.evaluate(paper)
    assert dark != light
    page.page.reload()
    page.page.locator(".play").wait_for()
    assert page.page.evaluate(paper) == dark


def test_it_fits_a_phone(tab: Opening, sites: Sites) -> None:
    page = answered(tab, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.text(0) == RECORD
    wide = "document.documentElement.scrollWidth"
    assert page.page.evaluate(wide) == 360
    page.tokens().first.tap()
    card = page.page.locator(".card")
    expect(card).to_contain_text("Flip")
    box, token = card.bounding_box(), page.tokens().first.bounding_box()
    assert box["x"] == 0 and box["width"] == 360 and round(box["y"] + box["height"]) == 740
    assert token["y"] + token["height"] <= box["y"], "the card hides the token that it is about"
    page.page.get_by_role("button", name="Close").click()
    page.page.get_by_text("The request as code").click()
    assert page.page.evaluate(wide) == 360
    small = page.page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => b.checkVisibility() && b.offsetHeight < 28).length"
    )
    assert small == 0
    page.page.get_by_role("link", name="Experts").click()
    page.page.locator(".expert").first.wait_for()
    assert page.page.evaluate(wide) == 360


def long_answer(tokens: int) -> str:
    """A stream of so many tokens, each explained, as the server writes it."""

    def law(token: str, logprob: float) -> dict[str, Any]:
        top = [{"token": f"{token}{at}", "token_id": at, "logprob": logprob - at} for at in range(5)]
        return {"logprob": logprob, "top": top}

    def event(at: int) -> dict[str, Any]:
        word = f" word{at}"
        said = {
            "token": word,
            "token_id": at,
            "fused": law(word, -0.1),
            "lanes": {name: law(word, -1.0 - at % 3) for name in ("base", "qa.tuned", "qa.untuned")},
            "weights": {"qa": at % 7 / 5},
            "push": {"qa": 0.4},
            "kl": at % 5 / 4,
            "flip": at % 11 == 0,
            "gated": False,
        }
        delta = {"content": word}
        return {
            "choices": [{"index": 0, "delta": delta, "token_ids": [at], "explain": [said]}],
            "usage": None,
        }

    frames = [f"data: {json.dumps(event(at))}\n\n" for at in range(tokens)]
    end = {"choices": [], "usage": {"lane_tokens": {"atlas": tokens}}, "fusion": {"generations": {"qa": 1}}}
    return "".join(frames) + f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n"


def test_long_answers_are_appended(tab: Opening) -> None:
    """Longer than the demo's context, so the stream is made up; the page cannot tell."""
    page = tab()
    page.page.get_by_text("Two answers side by side").click()
    body = long_answer(2000)
    page.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    page.page.evaluate(
        "window.changes = 0; new MutationObserver((list) => { for (const entry of list)"
        " changes += entry.addedNodes.length + entry.removedNodes.length; })"
        ".observe(document.querySelector('.tokens'), { childList: true })"
    )
    begun = time.monotonic()
    page.send()
    expect(page.tokens()).to_have_count(2000)
    page.settled("done", 1)
    assert time.monotonic() - begun < 15
    assert page.page.evaluate("changes") == 2000, "each token is put there once, and stays"
    assert page.page.evaluate("window.shifts") < 0.02
    box = page.answer().locator(".tokens")
    assert (
        box.evaluate("box => box.scrollHeight - box.scrollTop - box.clientHeight") < 40
    )  # it follows the end
