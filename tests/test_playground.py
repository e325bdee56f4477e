"""The playground page in a real browser. Needs Debian's chromium; `.ci/run` installs it and requires this test."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from rsim.serving.play import PlayRules
from rsim.serving.server import create_app
from rsim.serving.state import ServeConfig
from serving import serving
from tiny import named_planner

RULES = PlayRules(delimiter="\n", max_steps=5, step_tokens=48, max_tokens=240, answer_tokens=12)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert not os.environ.get("RSIM_REQUIRE_BROWSER"), "chromium is required here and not installed"
        pytest.skip("chromium is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site():
    strategies = load_strategies("lab")
    planner = named_planner(strategies)
    with serving(create_app(ServeConfig(rules=RULES, api_key="k"), planner, load_reasoner("nano-s"), name="nano-s")) as url:
        yield url.removesuffix("v1")


@pytest.mark.parametrize("size", [(1200, 900), (390, 844)], ids=["desk", "phone"])
def test_a_question_is_answered_side_by_side(browser, site, size):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(site)
    page.wait_for_function("document.getElementById('state').textContent.includes('key')")
    page.fill("#key", "k")
    page.keyboard.press("Tab")
    page.wait_for_selector("#model option", state="attached")
    page.check("#compare")
    page.fill("#question", "Ann has 33, finds 12 pens. how many?")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("!document.getElementById('copy').disabled")
    planned, alone = page.locator("section").all()
    chips = planned.locator(".chip").all_text_contents()
    assert chips[-1] == "termination"
    assert len(chips) >= 2
    assert alone.locator(".chip").count() == 0
    assert re.search(r"\\boxed\{\d+\}", planned.inner_text())
    planned.locator("summary").first.click()
    assert planned.locator(".bars").first.locator(".bar").count() == 9
    page.click("#copy")
    page.wait_for_function("document.getElementById('copy').textContent == 'Copied'")
    trace = page.evaluate("navigator.clipboard.readText()")
    assert '"strategy": "termination"' in trace
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    assert not problems
    context.close()


def test_it_can_be_used_by_keyboard_alone_and_errors_are_shown(browser, site):
    page = browser.new_page()
    page.goto(site)
    page.wait_for_function("document.getElementById('state').textContent.includes('key')")
    seen = []
    for _ in range(12):
        seen.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    order = [name for name in seen if name]
    assert order[:4] == ["question", "model", "planner", "compare"]
    assert "ask" in order
    page.focus("#ask")
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "API key" in page.locator(".error").inner_text()
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter((e) => !e.labels.length).length"
    )
    assert unlabelled == 0
    page.close()
