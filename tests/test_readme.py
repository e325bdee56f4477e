"""The README's snippets are run as they stand, and what they say is held against rsim eval."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from rsim.config import load_config
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.training.run import train

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train.steps": 2,
    "train.questions": 8,
    "train.group": 4,
    "train.eval_every": 0,  # the best checkpoint is the last one: the first one's planner always chooses the same
    "cold_start.episodes": 0,
    "data.eval_size": 8,
    "train.trackers": [],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs/nano in it, trained for two steps."""
    folder = tmp_path_factory.mktemp("readme")
    train(load_config("nano", SHORT | {"out": folder / "runs" / "nano"}))
    return folder


def test_the_plug_in_snippet_answers_as_rsim_eval_does(here, monkeypatch):
    monkeypatch.chdir(here)
    (snippet,) = (b for b in blocks("python") if "planner.wrap" in b)
    evaluate_into(here / "e", EvalSettings("runs/nano/checkpoints/best", limit=24))
    records = [json.loads(line) for line in (here / "e" / "episodes.jsonl").read_text().splitlines()]
    assert len({tuple(s["strategy"] for s in r["steps"]) for r in records}) > 1
    asked = [r["question"] for r in records]
    said = io.StringIO()
    with redirect_stdout(said):
        snippet = snippet.replace('print(planned.generate("85-(12+5)+26=?").text)', "print(planned.generate('85-(12+5)+26=?').text)\n"
                                  "    answers = planned.generate(asked)")  # fmt: skip
        names = {"asked": asked}
        exec(snippet, names)
    assert "boxed" in said.getvalue()
    for answer, record in zip(names["answers"], records, strict=True):
        steps = [(s["strategy"], s["text"], s["forced"]) for s in answer.steps]
        assert steps == [(s["strategy"], s["text"], s["forced"]) for s in record["steps"]]
        assert answer.usage.completion_tokens == record["sampled_tokens"]


def test_the_other_python_snippets_run(here, monkeypatch):
    monkeypatch.chdir(here)
    for snippet in blocks("python"):
        if "planner.wrap" not in snippet:
            exec(snippet.replace('"train.steps": 10', repr(SHORT)[1:-1]), {})
    assert (here / "runs" / "mine" / "checkpoints" / "final").is_dir()


def test_the_config_in_the_readme_is_one(tmp_path):
    (toml,) = blocks("toml")
    (tmp_path / "mine.toml").write_text(toml)
    config = load_config(str(tmp_path / "mine.toml"))
    assert [stage.lambda_ for stage in config.stages] == [0.7, 0.3]


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) < 900, "about 700 words, tables and code among them"
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target


def test_the_config_in_the_readme_has_rates_for_whole_llms(tmp_path):
    """The defaults are the nano models'."""
    (toml,) = blocks("toml")
    (tmp_path / "mine.toml").write_text(toml)
    train, preset = load_config(str(tmp_path / "mine.toml")).train, load_config("qwen2.5-0.5b-math").train
    assert (train.reasoner_lr, train.planner_lr) == (preset.reasoner_lr, preset.planner_lr)
