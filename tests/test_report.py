from __future__ import annotations

import json
from html.parser import HTMLParser

from rsim.reporting.report import build_report

NAMES = ["validation", "termination"]


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("line", "circle", "polyline"):
            return
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_data(self, data):
        self.text += data


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def write_run(folder, question="1 < 2 & <script>alert(1)</script>"):
    folder.mkdir(exist_ok=True)
    step = {"accuracy": 0.5, "stage": "stage1", "lambda": 0.7, "reward/accuracy": 0.5, "strategy/validation": 0.6, "strategy/termination": 0.4,
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
               "steps": [{"strategy": "validation", "text": "check </div>", "forced": False, "probabilities": [0.9, 0.1]},
                         {"strategy": "termination", "text": "", "forced": True, "probabilities": None}]}  # fmt: skip
    (folder / "episodes.jsonl").write_text(json.dumps(episode) + "\n")
    row = {"name": "a", "accuracy": 0.5, "low": 0.4, "high": 0.6, "flexible": 0.5, "tokens_per_question": 20.0}
    (folder / "table.json").write_text(json.dumps({"title": "t", "rows": [row]}))


def test_the_page_is_whole_and_stands_alone(tmp_path):
    write_run(tmp_path / "run")
    page = build_report(tmp_path / "run").read_text()
    tags = parse(page)
    assert tags.seen.count("svg") == 6, "accuracy, usage, reward, entropy, lambda, tokens/s"
    assert "script" not in tags.seen
    assert "<script>alert(1)</script>" in tags.text
    assert not {"link", "img", "iframe"} & set(tags.seen)
    assert "stage2" in tags.text
    assert "40.0% → 40.0%" in tags.text
    assert page.count("class=chosen") == 1
    assert "no answer" in tags.text


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
