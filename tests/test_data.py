from __future__ import annotations

import json

import pytest

from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.lab.expressions import parse, value_of
from rsim.lab.problems import split_of


def write(path, records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def gsm8k(tmp_path):
    record = {"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 1,004"}
    write(tmp_path / "gsm8k" / "train.jsonl", [record | {"question": f"train {i}?"} for i in range(520)])
    write(tmp_path / "gsm8k" / "test.jsonl", [record | {"question": f"test {i}?"} for i in range(5)])
    return str(tmp_path)


def test_gsm8k_splits_do_not_overlap(gsm8k, monkeypatch):
    splits = {s: load_problems("gsm8k", s, data_dir=gsm8k) for s in ("train", "dev", "test")}
    assert {s: len(p) for s, p in splits.items()} == {"train": 20, "dev": 500, "test": 5}
    questions = [p.question for ps in splits.values() for p in ps]
    assert len(set(questions)) == len(questions)
    assert splits["test"][0].answer == "1004"
    monkeypatch.setenv("RSIM_DATA", gsm8k)
    assert load_problems("gsm8k", "test") == splits["test"]


def test_limit_draws_by_seed(gsm8k):
    a, b, c = (load_problems("gsm8k", "dev", data_dir=gsm8k, limit=50, seed=s) for s in (0, 0, 1))
    assert a == b != c
    assert len(a) == 50
    assert len({p.question for p in a}) == 50


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        [{"question": "1+1?", "answer": 2}, {"question": "q", "answer": "x", "id": 7, "meta": {"level": 1}}],
    )
    problems = load_problems(path, "train")
    assert [(p.answer, p.id, p.meta) for p in problems] == [("2", "d-1", {}), ("x", "7", {"level": 1})]


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty"), ("\n\n", "empty"), ("{", "line 1: not valid JSON"), ('{"question": "q"}\n', "line 1"), ('{"question": "q", "answer": " "}', "answer"),
    ("[1]\n", "line 1"), ('{"question": "q", "answer": "1"}\n{"question": 5}\n', "line 2"), ('{"question": "q", "answer": true}', "answer"),
])  # fmt: skip
def test_bad_files_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_problems(str(path), "train")


def test_other_bad_input(tmp_path, monkeypatch):
    monkeypatch.delenv("RSIM_DATA", raising=False)
    for source, split, extra, message in [
        ("gsm8k", "test", {}, "RSIM_DATA"), ("gsm8k", "test", {"data_dir": "/nowhere"}, "no data folder"),
        ("gsm8k", "test", {"data_dir": str(tmp_path)}, "not found"), ("gsm9k", "test", {}, "unknown data set"),
        ("lab", "validation", {"limit": 5}, "unknown split"), ("lab", "test", {}, "no end"), ("none.jsonl", "train", {}, "not found"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_problems(source, split, **extra)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "1"}')
    with pytest.raises(UserError, match="UTF-8"):
        load_problems(str(tmp_path / "latin.jsonl"), "train")


def test_lab_splits_are_disjoint_by_expression():
    seen = {s: {p.meta["expression"] for p in load_problems("lab", s, limit=2000, seed=seed)}
            for seed, s in enumerate(("train", "dev", "test"))}  # fmt: skip
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]


def test_lab_problems_are_distinct_right_and_repeatable():
    problems = load_problems("lab", "test", limit=500, seed=3)
    assert len({p.question for p in problems}) == 500
    assert problems == load_problems("lab", "test", limit=500, seed=3)
    assert problems[:100] == load_problems("lab", "test", limit=100, seed=3)
    for p in problems:
        expression = parse(p.meta["expression"])
        assert str(value_of(expression)) == p.answer
        assert split_of(expression) == "test"
    assert {p.meta["family"] for p in problems} == {"arithmetic", "story", "equation", "comparison", "calendar"}
