"""The playground page, in a real browser (`conftest.browser`) but for the first test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from rsim.serving.play import PlayRules
from rsim.serving.server import create_app
from rsim.serving.state import ServeConfig
from serving import serving
from tiny import named_planner

RULES = PlayRules(delimiter="\n", max_steps=5, step_tokens=48, max_tokens=240, answer_tokens=12)
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
LONG = "an-organisation/a-very-long-model-name-that-goes-on-and-on-7B-Instruct-Q4_K_M"


@pytest.fixture(scope="module")
def site():
    strategies = load_strategies("lab")
    planner = named_planner(strategies)
    with serving(create_app(ServeConfig(rules=RULES, api_key="k"), planner, load_reasoner("nano-s"), name="nano-s")) as url:
        yield url.removesuffix("v1")


def test_the_page_needs_nothing_from_elsewhere(site):
    with httpx.Client(base_url=site) as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?://|<style|style=|<script>|onclick", page.text)
        files = {name: client.get(name) for name in re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)}
        assert {served.status_code for served in files.values()} == {200}
        fonts = set(re.findall(r"url\(([^)]+)\)", files["page/katex/katex.min.css"].text))
        assert {client.get(f"page/katex/{font}").status_code for font in fonts} == {200}
        assert all(font.endswith(".woff2") for font in fonts)
        assert "Khan Academy" in client.get("page/katex/LICENSE").text


@pytest.mark.parametrize("size", [(1200, 900), (390, 844)], ids=["desk", "phone"])
def test_a_question_is_answered_side_by_side(browser, site, size):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(site)
    page.wait_for_selector("#state:has-text('key')")
    page.fill("#key", "k")
    page.keyboard.press("Tab")
    page.wait_for_selector("#model option", state="attached")
    page.check("#compare")
    page.fill("#question", "Ann has 33, finds 12 pens. how many?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#copy:enabled")
    planned, alone = page.locator("section").all()
    chips = planned.locator(".chip").all_text_contents()
    assert chips[-1] == "termination"
    assert len(chips) >= 2
    assert alone.locator(".chip").count() == 0
    assert re.search(r"\\boxed\{\d+\}", planned.locator("annotation").last.text_content()), "set by KaTeX"
    planned.locator("summary").first.click()
    assert planned.locator(".bars").first.locator(".bar").count() == 9
    page.click("#copy")
    page.wait_for_selector("#copy:text-is('Copied')")
    trace = page.evaluate("navigator.clipboard.readText()")
    assert '"strategy": "termination"' in trace
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    assert not problems
    context.close()


def test_it_can_be_used_by_keyboard_alone_and_errors_are_shown(browser, site):
    page = browser.new_page()
    page.goto(site)
    page.wait_for_selector("#state:has-text('key')")
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


def chunk(finish=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


STEP = {"injected": True, "strategy": "a-strategy-with-a-very-long-name-that-was-thought-out-by-somebody-else", "prompt": "So: \\boxed{",
        "probabilities": {"validation": 0.9, "a-strategy-with-a-very-long-name-that-was-thought-out-by-somebody-else": 0.1}}  # fmt: skip
ANSWERS = {
    "whole": [chunk(reasoning_content="Let me "), chunk(reasoning_content="see."), chunk(content="<th"), chunk(content="ink>inner"),
              chunk(content="</think>By $x^2$ and \\(\\frac{1}"), chunk(content="{2}\\), not $5 or $6, `$a$`:\n"),
              chunk(content="So: \\boxed{") | {"rsim": STEP}, chunk(content="12} <"), chunk("stop") | {"rsim": {"seconds": [0.1]}}],
    "code": [chunk(content="So:\n```python\n") | {"rsim": {"strategy": "validation", "prompt": "So:\n```python\n"}},
             chunk(content="print(1)\n```\n"), chunk(content="```output\n1\n```\n\n") | {"rsim": {"output": "```output\n1\n```\n\n"}},
             chunk(reasoning_content="\n\n"), chunk("stop")],
    "all": [chunk(content="x") | {"rsim": {"strategy": s, "prompt": "x"}} for s in load_strategies("lab").names],
    "empty": [chunk(content=""), chunk("stop")],
    "cut": [chunk(content="Half of")],
    "long": [chunk(content="As long as it"), chunk("length")],
}  # fmt: skip


@pytest.fixture
def page(browser, site, request):
    """The page at phone width in the dark, in front of answers that are made up: the question says which. ``sent`` are the
    requests that it made, ``problems`` what the browser complained of."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    opened = context.new_page()
    opened.sent, opened.problems, opened.up = [], [], True
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda told: opened.problems.append(told.text) if "Content Security" in told.text else None)

    def answer(route):
        asked = route.request.post_data_json
        opened.sent.append(asked)
        said = ANSWERS[asked["messages"][-1]["content"]]
        lines = "".join(f"data: {json.dumps(c)}\n\n" for c in said) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=lines)

    def models(route):
        if opened.up:
            route.fulfill(json={"data": [{"id": f"{LONG}-rsim"}, {"id": LONG}]})
        else:
            route.fulfill(status=502, json={"error": {"message": "the upstream is away"}})

    opened.route("**/v1/chat/completions", answer)
    opened.route("**/v1/models", models)
    yield opened
    context.close()


def asked(page, question, button="#ask"):
    page.fill("#question", question)
    page.click(button)
    page.wait_for_selector("#stop:disabled")
    return page.locator("section").last


def test_reasoning_is_folded_and_mathematics_is_set(page, site):
    page.goto(site)
    page.wait_for_selector("#model option", state="attached")
    answer = asked(page, "whole")
    folded = answer.locator("details.think")
    assert folded.locator(".text").all_text_contents() == ["Let me see.inner"]
    assert not folded.locator(".text").is_visible()
    assert answer.locator("annotation").all_text_contents() == ["x^2", "\\frac{1}{2}", "\\boxed{12}"]
    assert "not $5 or $6, `$a$`" in answer.inner_text()
    assert answer.locator("em").text_content() == "So: "
    assert answer.locator(".chip").count() == 1
    assert answer.inner_text().rstrip().split("\n")[-1].endswith("s")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "long names stay in their place"
    assert page.evaluate("document.fonts.check('1em KaTeX_Main')")
    assert not page.problems


def test_a_program_and_its_output_are_set_as_code(page, site):
    page.goto(site)
    page.wait_for_selector("#model option", state="attached")
    answer = asked(page, "code")
    assert answer.locator("code").all_text_contents() == ["print(1)", "1"]
    assert "```" not in answer.inner_text()
    assert answer.locator("details.think").count() == 0, "a delimiter is no reasoning"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(page, site, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(site)
    page.wait_for_selector("#model option", state="attached")
    for question in ("whole", "code", "all", "cut", "long"):
        asked(page, question, "#follow" if page.locator("section").count() else "#ask")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    ratios = page.evaluate(CONTRAST)
    assert sum(kind.startswith("SPAN.chip") for kind, _ in ratios) >= 9
    assert [found for found in ratios if found[1][0] < 4.5] == []


@pytest.mark.parametrize(
    ("question", "told", "kind"),
    [("empty", "an empty answer", "cut"), ("cut", "the answer broke off", "error"), ("long", "the limit of tokens", "cut")],
)
def test_cut_and_empty_answers_are_called_so(page, site, question, told, kind):
    page.goto(site)
    page.wait_for_selector("#model option", state="attached")
    foot = asked(page, question).locator(".foot")
    assert told in foot.inner_text()
    assert kind in foot.get_attribute("class").split()


def test_follow_up_turns_a_system_prompt_and_a_limit_are_sent(page, site):
    page.goto(site)
    page.wait_for_selector("#model option", state="attached")
    page.click("summary")
    page.fill("#system", "Be brief.")
    page.fill("#limit", "70")
    asked(page, "whole")
    asked(page, "cut", "#follow")
    assert page.locator(".turn").count() == 2
    first, second = page.sent
    system = {"role": "system", "content": "Be brief."}
    assert first["messages"] == [system, {"role": "user", "content": "whole"}]
    assert first["max_tokens"] == 70
    said = "By $x^2$ and \\(\\frac{1}{2}\\), not $5 or $6, `$a$`:\nSo: \\boxed{12} <"
    assert second["messages"][:3] == [*first["messages"], {"role": "assistant", "content": said}]
    assert second["messages"][3:] == [{"role": "user", "content": "cut"}]
    asked(page, "empty")
    assert page.locator(".turn").count() == 1, "Ask begins anew"
    assert page.sent[2]["messages"] == [system, {"role": "user", "content": "empty"}]
    assert page.locator("#follow").is_disabled()


def test_it_connects_again_when_the_upstream_is_back(page, site):
    page.up = False
    page.add_init_script("const later = setTimeout; window.setTimeout = (f, ms) => later(f, Math.min(ms, 50));")
    page.goto(site)
    page.wait_for_selector("#state:text-is('the upstream is away; trying again')")
    page.up = True
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#state").inner_text() == "model in this process"
