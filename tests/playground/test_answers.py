"""Answers in a real browser: they stream, show what moved them, and follow a weight."""

from __future__ import annotations

import re
from typing import Any

from tests.playground.conftest import Opening, Tab, expect

RECORD = "birthplace: Nudreth\njob: writer\npet: wolf\nfood: cake\ninstrument: harp"


def answered(tab: Opening, **options: Any) -> Tab:
    """The demo's first example, answered on both sides."""
    opened = tab(**options)
    opened.send()
    opened.settled()
    return opened


def test_two_answers_stream_side_by_side(tab: Opening) -> None:
    page = answered(tab)
    assert page.text(0) == RECORD
    assert page.text(1) == "She has a wolf. She opens the locker with Benur."
    facts = page.answer(0).locator(".stats")
    for fact in ("first after", "tokens/s", "record.tuned", "mean KL", "flips4", "record 1"):
        expect(facts).to_contain_text(fact)
    expect(page.answer(1).locator(".notice")).to_contain_text("no chat template of its own")
    # What was asked is asked as is: nothing beside the answers was in need of room that was not there.
    assert page.page.evaluate("window.shifts") < 0.02


def test_a_flip_is_seen_and_explained(tab: Opening) -> None:
    page = answered(tab)
    flips = page.answer(0).locator(".t.flip")
    expect(flips).to_have_count(4)
    first = page.tokens().first
    assert {"p3", "flip"} <= set(first.get_attribute("class").split())
    assert "underline" in first.evaluate(
        "token => getComputedStyle(token).textDecorationLine"
    )  # not by colour alone
    first.hover()
    card = page.page.locator(".card")
    expect(card).to_contain_text("Flip: the base would have chosen She")
    expect(card).to_contain_text("116 times likelier")
    expect(card.locator("caption")).to_have_text(["fused", "base", "record.tuned", "record.untuned"])
    expect(card).to_contain_text("weight 1.00, pushed +4.33 nats")
    expect(card).to_contain_text("3.026")
    page.page.mouse.move(5, 5)
    expect(card).to_be_hidden()
    first.click()  # holds it
    page.page.mouse.move(5, 5)
    expect(card).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(card).to_be_hidden()


def test_a_moved_weight_writes_again(tab: Opening) -> None:
    page = answered(tab)
    page.weigh("record", 0.2)
    expect(page.answer(0).locator(".what")).to_have_text("proxy · record 0.2")
    expect(page.answer(0).locator(".tokens")).not_to_contain_text("birthplace")
    page.settled()
    assert page.text(1).startswith("She has a wolf")  # the other one is left alone
    page.weigh("record", 0)  # then the base is alone, and still on the same prompt
    expect(page.answer(0).locator(".tokens")).to_have_text(page.text(1))


def test_a_moved_weight_scores_the_same_text(tab: Opening) -> None:
    page = answered(tab)
    page.page.get_by_label("Score the same text at once").check()
    page.tokens().first.evaluate("token => token.own = true")
    page.weigh("record", 0.25)
    facts = page.answer(0).locator(".stats")
    expect(facts).to_contain_text("log p of the text")
    before = facts.inner_text()
    assert page.text(0) == RECORD
    page.tokens().first.hover()
    expect(page.page.locator(".card")).to_contain_text("weight 0.25, pushed +1.08 nats")
    page.weigh("record", 1)
    expect(facts).not_to_have_text(before)
    expect(page.page.locator(".card")).to_contain_text("weight 1.00, pushed +4.33 nats")
    assert page.tokens().first.evaluate("token => token.own"), "elements are kept"


def test_the_chart_follows_the_token_and_the_token_the_chart(tab: Opening) -> None:
    page = tab()
    page.page.locator(".side select").first.select_option("dynamic")
    page.send()
    page.settled()
    expect(page.answer(0).locator("figcaption")).to_contain_text("weight of record")
    # The line of the weight is no straight one: it is solved for each token.
    line = page.answer(0).locator(".u-cursor-x")
    places = []
    for at in (0, 4):
        page.tokens().nth(at).hover()
        page.page.wait_for_timeout(50)
        places.append(line.evaluate("line => new DOMMatrix(getComputedStyle(line).transform).e"))
    assert places[0] < places[1]
    page.page.mouse.move(5, 5)
    plot = page.answer(0).locator(".u-over").bounding_box()
    page.page.mouse.move(plot["x"] + plot["width"] * 0.99, plot["y"] + 20)
    expect(page.page.locator(".card")).to_contain_text(f"token {page.tokens().count()} of")
    expect(page.tokens().last).to_have_class(re.compile(r"\blooked\b"))


def test_everything_is_reached_by_keyboard(tab: Opening) -> None:
    page = tab()
    keys = page.page.keyboard
    page.page.locator(".prompt").focus()
    keys.press("Control+A")
    keys.type("Which instrument does Kustin play?")
    slider = page.page.get_by_role("slider", name="qa").first
    slider.focus()
    for _ in range(20):
        keys.press("ArrowRight")
    assert slider.evaluate("input => input.value") == "1"
    record = page.page.get_by_role("slider", name="record").first
    record.focus()
    for _ in range(20):
        keys.press("ArrowLeft")
    keys.press("Control+Enter")
    page.settled()
    assert page.text(0) == " harp"
    expect(page.page.get_by_role("status").first).to_contain_text("Answer A has 2 tokens.")
    # By the tab key alone from the prompt to the first answer's tokens.
    page.page.locator(".prompt").focus()
    for _ in range(12):
        keys.press("Tab")
        if page.page.evaluate("document.activeElement.className") == "tokens":
            break
    assert page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("ArrowRight")
    card = page.page.locator(".card")
    expect(card).to_contain_text("token 1 of 2")
    keys.press("ArrowRight")
    expect(card).to_contain_text("token 2 of 2")
    expect(card.locator("[aria-live=polite]")).to_contain_text("Flip")
    keys.press("Escape")
    expect(card).to_be_hidden()


def test_escape_stops_a_stream(tab: Opening) -> None:
    page = long_answer(tab)
    page.page.keyboard.press("Escape")
    page.settled("stopped")
    count = page.tokens(1).count()
    page.page.wait_for_timeout(300)
    assert page.tokens(1).count() == count < 400


def test_an_answer_in_the_place_of_one_that_runs(tab: Opening) -> None:
    """The end of the first is not taken for that of the second."""
    page = long_answer(tab)
    seen = page.answer(1).evaluate_handle(
        """pane => {
          const seen = [];
          const look = () => seen.push(pane.dataset.status);
          new MutationObserver(look).observe(pane, { attributeFilter: ["data-status"] });
          return seen;
        }"""
    )
    page.send()
    page.tokens(1).nth(3).wait_for()
    expect(page.page.get_by_role("button", name="Stop")).to_be_enabled()
    page.page.keyboard.press("Escape")
    page.settled("stopped")
    assert seen.json_value() == ["stopped"]  # once, by the key


def long_answer(tab: Opening) -> Tab:
    """Hot and long, so that there is something to stop; it has begun."""
    page = tab()
    page.page.get_by_role("radio", name="Completion").check()
    page.page.get_by_label("max tokens").fill("400")
    page.page.get_by_label("temperature").evaluate(
        "input => { input.value = 2; input.dispatchEvent(new Event('input')); }"
    )
    page.page.get_by_label("seed").fill("3")
    page.page.get_by_label("seed").press("Tab")
    page.send()
    page.tokens(1).nth(3).wait_for()
    return page


def test_text_of_models_and_users_is_text(tab: Opening) -> None:
    attack = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script> & <b>"
    page = tab()
    page.page.get_by_role("radio", name="Completion").check()
    page.page.locator(".prompt").fill(attack)
    page.page.get_by_role("button", name="Score the text").click()
    page.settled()
    assert page.text(0) == attack
    expect(page.page.locator(".tokens img, .tokens script, .tokens b")).to_have_count(0)
    page.page.get_by_role("radio", name="Chat").check()
    page.send()
    page.settled()
    page.page.get_by_role("button", name="Go on").click()
    expect(page.page.locator(".turns li b")).to_have_text(attack)
    page.tokens().first.hover()
    assert page.page.title() == "proxyserve playground"
    assert page.page.locator(".turns img, .card img").count() == 0


def test_a_view_is_shared_by_its_address(tab: Opening) -> None:
    page = tab()
    page.page.locator(".side").nth(1).locator("select").first.select_option("preset:house")
    page.weigh("record", 0.5)
    page.weigh("qa", -0.25)
    page.page.get_by_label("seed").fill("7")
    page.page.get_by_label("seed").press("Tab")
    page.page.wait_for_timeout(400)
    address = page.page.url
    other = tab(address)
    expect(other.answer(0).locator(".what")).to_have_text("proxy · record 0.5 · qa -0.25")
    expect(other.answer(1).locator(".what")).to_have_text("house")
    expect(other.page.get_by_label("seed")).to_have_value("7")
    # A link that somebody has cut off or made up opens the page all the same.
    for broken in ("#view=%7B%22mode", '#view={"mode":3,"sides":[{"model":"<b>"}],"turns":[1]}'):
        tab(page.page.url.partition("#")[0] + broken)


def test_every_rule_has_a_form_that_works(tab: Opening) -> None:
    page = tab()
    page.expected.add(400)
    page.page.get_by_text("Two answers side by side").click()
    page.page.get_by_label("max tokens").fill("3")
    page.page.get_by_label("max tokens").press("Tab")
    rules = page.page.locator(".side select").first.locator("option").all_inner_texts()
    assert {"atlas alone", "house", "proxy", "dynamic", "formula"} <= set(rules)
    for rule in rules:
        page.page.locator(".side select").first.select_option(label=rule)
        if rule == "guidance":
            page.page.get_by_label("negative prompt").fill("Task: who?")
            page.page.get_by_label("scale").fill("2")
            page.page.get_by_label("scale").press("Tab")
        page.send()
        if rule == "edit":  # has no calibration here, and says so
            page.settled("failed", 1)
            expect(page.answer().get_by_role("alert")).to_contain_text("calibrat")
        else:
            page.settled("done", 1)
            assert 1 <= page.tokens().count() <= 3, rule
