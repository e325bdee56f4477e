from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rsim.errors import UserError
from rsim.reporting.charts import Series, line_chart
from rsim.reporting.report import build_comparison, build_report

NAMES = ["validation", "termination"]
VOID = ("meta", "line", "circle", "polyline", "input", "wbr")


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_data(self, data):
        self.text += data

    def of_class(self, name):
        return [attrs for _, attrs in self.attributes if name in (attrs.get("class") or "").split()]


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def write_run(folder, question="1 < 2 & <script>alert(1)</script>"):
    folder.mkdir(exist_ok=True)
    step = {"accuracy": 0.5, "stage": "stage1", "lambda": 0.7, "reward/accuracy": 0.5, "reward/brief": 0.1, "strategy/validation": 0.6, "strategy/termination": 0.4,
            "sampled_tokens": 10, "seconds": 1.0, "tokens_per_second": 10.0, "planner/entropy": 1.2}  # fmt: skip
    held_out = {
        "eval/accuracy": 0.4,
        "eval/accuracy_low": 0.3,
        "eval/accuracy_high": 0.5,
        "eval/flexible": 0.4,
        "eval/tokens": 9.0,
    }
    records = [{"step": 0} | held_out, {"step": 1} | step, {"step": 2} | step | {"stage": "stage2"}, {"step": 2} | held_out]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    episode = {"step": 2, "question": question, "answer": "5", "predicted": None, "correct": False, "flags": ["forced"], "names": NAMES,
               "steps": [{"strategy": "validation", "prompt": "Is it so?", "text": "check </div>", "forced": False, "probabilities": [0.9, 0.1]},
                         {"strategy": "termination", "text": "", "forced": True, "probabilities": None}]}  # fmt: skip
    (folder / "episodes.jsonl").write_text(json.dumps(episode) + "\n")
    row = {"name": "a", "accuracy": 0.5, "low": 0.4, "high": 0.6, "flexible": 0.5, "tokens_per_question": 20.0}
    (folder / "table.json").write_text(json.dumps({"title": "t", "rows": [row]}))


def test_the_page_is_whole_and_stands_alone(tmp_path):
    write_run(tmp_path / "run")
    page = build_report(tmp_path / "run").read_text()
    tags = parse(page)
    assert tags.seen.count("svg") == 6, "accuracy, usage, reward, entropy, lambda, tokens/s"
    assert tags.seen.count("script") == 1, "the page's own"
    assert not [attrs for _, attrs in tags.attributes if "src" in attrs or "href" in attrs]
    assert "<script>alert(1)</script>" in tags.text
    assert not {"link", "img", "iframe"} & set(tags.seen)
    assert "stage2" in tags.text
    assert "40.0% → 40.0%" in tags.text
    assert page.count("class=chosen") == 1
    assert "no answer" in tags.text
    assert "Is it so?" in tags.text
    assert "1 of 1 shown" in tags.text


def test_a_run_without_a_table_gets_one_from_its_evaluations(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "table.json").unlink()
    text = parse(build_report(tmp_path / "run").read_text()).text
    assert "before training" in text
    assert "last, step 2" in text


def test_an_evaluation_folder_needs_no_training_records(tmp_path):
    write_run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "run" / "episodes.jsonl").unlink()
    tags = parse(build_report(tmp_path / "run", tmp_path / "deep" / "page.html").read_text())
    assert "svg" not in tags.seen
    assert "held-out accuracy" in tags.text


def test_the_row_of_rsim_is_bold_and_never_the_oracles(tmp_path):
    write_run(tmp_path / "run")
    row = {"low": 0.4, "high": 0.6, "flexible": 0.5, "tokens_per_question": 20.0}
    rows = [
        row | {"name": name, "accuracy": a}
        for name, a in (("trained + trained planner (rSIM)", 0.5), ("trained + oracle planner", 0.9))
    ]
    (tmp_path / "run" / "table.json").write_text(json.dumps({"title": "t", "rows": rows}))
    page = build_report(tmp_path / "run").read_text()
    assert page.count("class=headline") == 1
    assert "<tr class=headline><td>trained + trained planner (rSIM)" in page


def test_settings_show_models_data_rewards_and_what_is_not_usual(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text(
        'name = "x"\n[models]\nreasoner = "a/b"\n[rewards]\ncustom = ["my.py:brief"]\nformat = 0.1\n'
        '[train]\ngroup = 3\n[[stages]]\nname = "one"\nsteps = 5\n'
    )
    text = parse(build_report(tmp_path / "run").read_text()).text
    shown, everything = text.split("All settings")
    for key in ("models.reasonera/b", "rewards.custommy.py:brief", "train.group3", "name one, steps 5"):
        assert key in shown
    assert "rewards.format" not in shown
    assert "rewards.format0.1" in everything


def test_episodes_can_be_filtered_and_their_number_is_told(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "episodes.jsonl"
    episode = json.loads(path.read_text())
    path.write_text("".join(json.dumps(episode | {"step": i, "correct": i == 3}) + "\n" for i in range(30)))
    monkeypatch.setattr("rsim.reporting.episodes._SHOWN", 28)
    tags = parse(build_report(tmp_path / "run").read_text())
    assert "28 of 30 shown" in tags.text
    cards = tags.of_class("episode")
    assert [card["data-verdict"] for card in cards].count("right") == 1
    assert cards[0]["data-used"] == "termination|validation"
    assert "validation (1 of 28 right)" in tags.text
    options = [attrs["value"] for tag, attrs in tags.attributes if tag == "option"]
    assert options == ["", "wrong", "right", "", "termination", "validation"]


def test_held_out_questions_are_shown_before_and_after(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "episodes.jsonl"
    episode = json.loads(path.read_text()) | {"held_out": True}
    played = [episode | {"step": s, "question": q, "correct": q == "b" and s > 0} for s in (0, 5, 10) for q in ("a", "b")]
    path.write_text("".join(json.dumps(e) + "\n" for e in played))
    tags = parse(build_report(tmp_path / "run").read_text())
    assert "step 0 → step 10" in tags.text
    verdicts = [card["data-verdict"] for card in tags.of_class("episode")]
    assert verdicts[:2] == ["wrong → right", "wrong → wrong"]
    assert len(verdicts) == 2 + 6


def test_several_runs_are_compared(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, question="1+1=?")
        (tmp_path / name / "config.toml").write_text(f"seed = 0\n[train]\nplanner_lr = {0.1 if name == 'a' else 0.2}\n")
    tags = parse(build_comparison([tmp_path / "a", tmp_path / "b"]).read_text())
    assert (tmp_path / "a" / "comparison.html").is_file()
    assert re.search("a: a.*b: a", tags.text), "a row for each row of their tables"
    assert "Settings that differ" in tags.text
    assert "train.planner_lr0.10.2" in tags.text.split("All settings")[0]
    assert "seed" not in tags.text.split("Settings that differ")[1].split("All settings")[0]
    assert tags.seen.count("svg") == 7, "held-out and sampled accuracy, two rewards, entropy, lambda, tokens/s"
    assert [card["data-verdict"] for card in tags.of_class("episode")] == ["wrong → wrong"]
    with pytest.raises(UserError, match="twice"):
        build_comparison([tmp_path / "a", tmp_path / "a"])


def test_rewards_of_ones_own_are_in_the_chart(tmp_path):
    write_run(tmp_path)
    assert re.search("Reward parts, batch mean.*?brief 0.1", parse(build_report(tmp_path).read_text()).text)


def test_of_several_samples_the_compared_one_is_the_vote(tmp_path):
    """As in the table above it, and in `rsim compare`."""
    for name, said in (("a", "556"), ("b", "556")):
        write_run(tmp_path / name)
        first = json.loads((tmp_path / name / "episodes.jsonl").read_text())
        lines = [first | {"index": 0, "sample": i, "predicted": p, "correct": p == "5"} for i, p in enumerate(said)]
        (tmp_path / name / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tags = parse(build_comparison([tmp_path / "a", tmp_path / "b"]).read_text())
    assert [card["data-verdict"] for card in tags.of_class("episode")] == ["right → right"]


def test_charts_have_labels_whole_steps_and_the_values_of_each_step():
    chart = line_chart("T", [Series("s", [(0, 0.25), (1, 0.5), (2, 0.75)], "#000")], [], "share of steps")
    tags = parse(chart)
    assert "training step" in tags.text
    assert "share of steps" in tags.text
    assert re.findall(r'text-anchor="middle">([\d.]+)<', chart) == ["0", "1", "2"]
    places = json.loads(next(attrs["data-places"] for tag, attrs in tags.attributes if tag == "svg"))
    assert [(step, values) for _, step, values in places] == [("0", ["25.0%"]), ("1", ["50.0%"]), ("2", ["75.0%"])]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_filters_work_charts_tell_values_and_all_fits_a_phone(browser, tmp_path, scheme):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "episodes.jsonl"
    episode = json.loads(path.read_text())
    path.write_text("".join(json.dumps(episode | {"step": i, "correct": i == 3}) + "\n" for i in range(30)))
    report = build_report(tmp_path / "run")
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((one) => one.scrollWidth <= one.clientWidth)")
    page.select_option(".verdict", "right")
    assert page.locator(".count").inner_text() == "1 of 30 shown"
    assert page.locator(".episode:visible").count() == 1
    page.select_option(".verdict", "")
    page.select_option(".used", "validation")
    page.fill(".find", "IS IT SO?check")
    assert page.locator(".episode:visible").count() == 30
    page.fill(".find", "elsewhere")
    assert page.locator(".count").inner_text() == "0 of 30 shown"
    page.fill(".find", "")
    chart = page.locator("figure").first
    chart.locator("svg").hover(position={"x": 60, "y": 40})
    assert chart.locator("figcaption").inner_text() == "Accuracy step 0"
    assert chart.locator("li b").all_inner_texts() == ["–", "40.0%"]
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    ratios = page.evaluate((Path(__file__).parent / "contrast.js").read_text())
    assert [found for found in ratios if found[1][0] < 4.5] == []
    context.close()
