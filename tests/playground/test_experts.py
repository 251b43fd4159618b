"""The page of experts, and what keys may see of it."""

from __future__ import annotations

from tests.api.admin_fakes import ADMIN_KEY, USER_KEY
from tests.playground.conftest import Opening, Sites, Tab, expect


def give_key(page: Tab, key: str) -> None:
    page.page.get_by_label("API key").fill(key)
    page.page.get_by_role("button", name="Use").click()


def test_an_expert_is_swapped_and_rolled_back(tab: Opening, sites: Sites) -> None:
    page = tab(f"{sites.open}#experts")
    page.expected.add(400)
    bio = page.page.locator("[data-expert=bio]")
    expect(bio.locator(".generation").first).to_have_text("generation 1")
    # What is shown while it goes on is kept, as it may be gone before anybody looks.
    page.page.evaluate(
        "window.seen = new Set(); const look = () => {"
        " const text = document.querySelector('.change')?.textContent; if (text) seen.add(text);"
        " requestAnimationFrame(look); }; look()"
    )
    bio.get_by_role("button", name="Swap").click()
    bio.get_by_label("Tuned", exact=True).fill("experts/guard")
    bio.get_by_label("Untuned", exact=True).fill("small")
    bio.get_by_role("button", name="Swap bio").click()
    expect(bio.get_by_role("status")).to_have_text("Generation 2 now serves.")
    seen = page.page.evaluate("[...seen]")
    assert any("asking" in text for text in seen), seen
    assert any("generation 2:" in text for text in seen), seen
    expect(bio.locator(".generation").first).to_have_text("generation 2")
    expect(bio.locator("tbody th")).to_have_text(["2", "1"])

    # The next answer is the new generation's.
    page.page.get_by_role("link", name="Playground").click()
    page.weigh("record", 0)
    page.weigh("bio", 1)
    page.send()
    page.settled()
    expect(page.answer(0).locator(".stats")).to_contain_text("bio 2")

    page.page.get_by_role("link", name="Experts").click()
    bio.get_by_role("button", name="Swap").click()
    bio.get_by_label("Tuned", exact=True).fill("experts/nothing")
    bio.get_by_role("button", name="Swap bio").click()
    expect(bio.get_by_role("alert")).to_have_text(
        "tuned.path: There is no such folder or file under --expert-root."
    )
    expect(bio.locator(".generation").first).to_have_text("generation 2")

    bio.get_by_role("button", name="Roll back").click()
    expect(bio.get_by_role("status")).to_have_text("Generation 1 serves again.")


def test_an_expert_is_loaded_and_unloaded(tab: Opening, sites: Sites) -> None:
    page = tab(f"{sites.open}#experts")
    page.expected |= {400, 404}
    form = page.page.get_by_role("form", name="Load an expert")
    form.get_by_label("Name").fill("no good")
    form.get_by_label("Tuned", exact=True).fill("experts/qa")
    form.get_by_role("button", name="Load").click()
    expect(form.get_by_role("alert")).to_contain_text("cannot be a name")
    form.get_by_label("Name").fill("qa-2")
    form.get_by_label("Untuned", exact=True).fill("small")
    form.get_by_role("button", name="Load").click()
    fresh = page.page.locator("[data-expert=qa-2]")
    expect(fresh.locator(".badge").first).to_have_text("published")
    fresh.get_by_role("button", name="Unload").click()
    fresh.get_by_role("button", name="sure?").click()  # nothing goes at one click
    expect(fresh).to_have_count(0)


def test_keys(tab: Opening, sites: Sites) -> None:
    page = tab(sites.guarded, ready="form.wanted", expected=401)
    give_key(page, "sk-wrong")
    expect(page.page.get_by_role("alert")).to_contain_text("needs a key")
    give_key(page, USER_KEY)
    page.page.locator(".play").wait_for()
    assert page.page.evaluate("[sessionStorage.length, Object.values(localStorage).join()]") == [1, ""]
    # A user may not ask for explanations here: plain text, and a sentence why.
    page.send()
    page.settled()
    assert page.text(0).startswith("birthplace: Nudreth")
    expect(page.answer(0).locator(".notice").first).to_contain_text("may not ask for explanations")
    expect(page.answer(0).locator(".flip")).to_have_count(0)
    # The control plane has a port of its own.
    page.page.get_by_role("link", name="Experts").click()
    link = page.page.locator(".experts a")
    expect(link).to_have_attribute("href", f"{sites.admin}#experts")

    there = tab(sites.admin, ready="form.wanted", expected=401)
    give_key(there, USER_KEY)
    expect(there.page.locator(".experts .notice")).to_contain_text("administrator's key")
    there.page.get_by_role("button", name="Key").click()
    give_key(there, ADMIN_KEY)
    expect(there.page.locator("[data-expert=qa] .badge").first).to_have_text("published")
    expect(there.page.get_by_role("link", name="Playground")).to_have_count(
        0
    )  # nothing runs models on this port
