from __future__ import annotations

import json
import os
import random
import re
import subprocess
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from rsim.data import sources
from rsim.data.leaks import question_hash, shared_questions
from rsim.data.load import load_problems, with_replay
from rsim.data.origins import fetch_lines
from rsim.data.sources import SOURCES
from rsim.errors import UserError
from rsim.lab.problems import parse, split_of
from rsim.rewards.grade import check
from tiny import full


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


@pytest.mark.parametrize("name", SOURCES)
def test_fetch_names_every_file_that_a_reader_opens(name, tmp_path, monkeypatch):
    folder, opened = tmp_path / "my data" / SOURCES[name].folder, []
    for reader in ("_lines", "_json"):
        monkeypatch.setattr(sources, reader, lambda path: opened.append(path) or [])
    SOURCES[name].read(folder)
    lines = fetch_lines(name, str(tmp_path / "my data"))
    assert subprocess.run(["sh", "-n"], input="\n".join(lines), text=True, check=False).returncode == 0
    if "END" in lines:
        compile("\n".join(lines[lines.index("python - <<'END'") + 1 : -1]), name, "exec")
    said = [line.replace("{split}", split) for line in lines for split in ("train", "test")]
    assert all(any(str(path) in line for line in said) for path in opened), (opened, lines)
    folder.mkdir(parents=True)
    for path in opened:
        path.touch()
    assert fetch_lines(name, str(tmp_path / "my data")) == [f"# {SOURCES[name].title}: in {folder} already"]


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
    seen = {s: {p.meta["terms"] for p in load_problems("lab", s, limit=2000, seed=seed)}
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
        terms = parse(p.meta["terms"])
        assert str(sum(term.value for term in terms)) == p.answer
        assert split_of(terms) == "test"
    assert {p.meta["family"] for p in problems} == {"arithmetic", "story", "equation", "calendar"}


def test_csv_and_parquet_with_a_column_map(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "d.csv").write_text('problem,gold,id\n"2+2, or?",4,a\nwhat?,x+1,b\n')
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["2+2, or?", "what?"], "gold": ["4", "x+1"]}), tmp_path / "d.parquet")
    columns = ("question=problem", "answer=gold")
    for name in ("d.csv", "d.parquet"):
        problems = load_problems(str(tmp_path / name), "train", columns=columns)
        assert [(p.question, p.answer, p.kind) for p in problems] == [("2+2, or?", "4", "numeric"), ("what?", "x+1", "latex")]
    with pytest.raises(UserError, match="'question'"):
        load_problems(str(tmp_path / "d.csv"), "train")
    with pytest.raises(UserError, match="ours=theirs"):
        load_problems(str(tmp_path / "d.csv"), "train", columns=("problem",))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file"):
        load_problems(str(tmp_path / "bad.parquet"), "train")


def test_kinds_in_a_file(tmp_path):
    good = write(
        tmp_path / "k.jsonl",
        [{"question": "q", "answer": "B", "kind": "choice"}, {"question": "q2", "answer": "Paris", "kind": "text"}],
    )
    assert [p.kind for p in load_problems(good, "train")] == ["choice", "text"]
    for record, message in (
        ({"answer": "1", "kind": "number"}, "kind is 'number'"),
        ({"answer": "BB", "kind": "choice"}, "letter"),
    ):
        path = write(tmp_path / "bad.jsonl", [{"question": "q"} | record])
        with pytest.raises(UserError, match=message):
            load_problems(path, "train")


def test_hub_sets_are_asked_for_by_name_subset_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        if name == "gone":
            raise FileNotFoundError("no such set\nmore lines")
        return [{"problem": "1+1?", "gold": 2}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = ("question=problem", "answer=gold")
    assert [p.answer for p in load_problems("hf:org/name:main", "dev", columns=columns)] == ["2"]
    load_problems("hf:org/name", "test", columns=columns)
    assert asked == [("org/name", "main", "validation"), ("org/name", None, "test")]
    with pytest.raises(UserError, match=r"cannot load hf:gone: no such set$"):
        load_problems("hf:gone", "test")


def test_gym_splits_are_disjoint_and_repeatable():
    splits = {s: load_problems("gym:chain_sum", s, limit=60, seed=1) for s in ("train", "dev", "test")}
    questions = [p.question for ps in splits.values() for p in ps]
    assert len(set(questions)) == 180
    assert splits["dev"] == load_problems("gym:chain_sum", "dev", limit=60, seed=1)
    with pytest.raises(UserError, match="no task"):
        load_problems("gym:nothing", "test", limit=1)


def test_a_mixture_has_its_shares_and_splits(tmp_path):
    source = "75% lab:story, 25% gym:gcd?max_value=99"
    splits = {s: load_problems(source, s, limit=40, seed=1) for s in ("train", "dev", "test")}
    for split, problems in splits.items():
        assert Counter(p.kind for p in problems) == {"numeric": 30, "gym": 10}
        assert problems == load_problems(source, split, limit=40, seed=1)
        assert [p.kind for p in problems] != sorted((p.kind for p in problems), reverse=True)  # shuffled
    assert not {p.question for p in splits["train"]} & {p.question for p in splits["dev"] + splits["test"]}
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "1+1?", "answer": 2}\n')
    for wrong, limit, said in (
        ("75% lab, 15% gym:gcd", 40, "90% together"), ("0% lab, 100% gym:gcd", 40, "ask for more"), (source, 0, "ask for more"),
        (source, 1, "ask for more"), (f"50% lab, 50% {few}", 10, "few.jsonl has 1 problems"), ("50% lab, 50% nothing", 10, "'nothing'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_problems(wrong, "train", limit=limit)


def test_mixtures_name_their_sources_apart_and_do_not_overlap():
    found = load_problems("50% lab:story , 50% lab:calendar", "dev", limit=40, seed=1)
    assert len({p.id for p in found}) == 40
    with pytest.raises(UserError, match="questions twice"):
        load_problems("50% lab, 50% lab:story", "dev", limit=400)


def test_seeds_of_a_gym_task_share_hardly_a_question():
    first, second = ({p.question for p in load_problems("gym:chain_sum", "test", limit=50, seed=s)} for s in (0, 1))
    assert len(first & second) < 5


def test_a_spreadsheets_mark_a_huge_field_and_a_task_without_its_entry(tmp_path):
    file = tmp_path / "marked.csv"
    file.write_text("question,answer\n1+1?,2\n", encoding="utf-8-sig")
    assert [p.answer for p in load_problems(str(file), "test")] == ["2"]
    file.write_text(f"question,answer\n{'1' * 200_000},2\n")
    with pytest.raises(UserError, match="field limit"):
        load_problems(str(file), "test")
    file = tmp_path / "gym.jsonl"
    file.write_text('{"question": "q", "answer": "2", "kind": "gym"}\n')
    with pytest.raises(UserError, match=r"meta\.task"):
        load_problems(str(file), "test")
    with pytest.raises(UserError, match="gym:gcd"):
        load_problems("gym:gcd?max_value=1.5", "test", limit=2)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("What is 1,000+1?,1001", "line 2: more cells than columns: put texts with commas in quotes"),
        ("What is 3+4?", "line 2: fewer cells than columns"),
        ('3+4=?,"7\n4+5=?,9', ": unexpected end of data"),
    ],
)
def test_a_csv_row_is_as_long_as_its_header(tmp_path, lines, said):
    path = tmp_path / "d.csv"
    path.write_text(f"question,answer\n{lines}\n")
    with pytest.raises(UserError, match=re.escape(said)):
        load_problems(str(path), "test")


def test_the_sizes_of_a_gym_task_can_be_set():
    found = load_problems("gym:chain_sum?min_terms=2&max_terms=3&min_digits=2&max_digits=2", "dev", limit=20, seed=1)
    numbers = [re.findall(r"\d+", p.question) for p in found]
    assert {len(n) for n in numbers} == {2, 3}
    assert all(len(digits) == 2 for n in numbers for digits in n)
    for wrong in ("size_of_terms=3", "max_terms", "max_terms=many", "min_terms=5&max_terms=3"):
        with pytest.raises(UserError, match="gym:chain_sum"):
            load_problems(f"gym:chain_sum?{wrong}", "dev", limit=1)


def test_what_test_asks_is_taken_out_of_dev_and_train(tmp_path):
    record = {"answer": "#### 4"}
    write(tmp_path / "gsm8k" / "train.jsonl", [record | {"question": f"How many are {i}?"} for i in range(600)])
    write(
        tmp_path / "gsm8k" / "test.jsonl", [record | {"question": q} for q in ("how many  are 5", "HOW MANY ARE 590?", "new?")]
    )
    sizes = {s: len(load_problems("gsm8k", s, data_dir=str(tmp_path))) for s in ("train", "dev", "test")}
    assert sizes == {"train": 99, "dev": 499, "test": 3}


def test_question_hash():
    assert question_hash("What is  2+2 ?") == question_hash("what is 2+2")
    assert question_hash("What is 2+2?") != question_hash("What is 2-2?")
    assert question_hash("x\u00b2") == question_hash("x2"), "Unicode forms are made alike"


SHARED = Path(os.environ.get("RSIM_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here: set RSIM_DATA")
@pytest.mark.parametrize("name", SOURCES)
def test_the_real_sets(name):
    counts = {"gsm8k": (6973, 500, 1319), "math": (6993, 500, 5000), "math500": (500,), "aqua": (254, 254), "mmlu_pro": (12032,), "theoremqa": (747,),
              "svamp": (1000,), "tatqa": (1251, 200, 1453), "humaneval": (164,), "mbpp": (374, 90, 500)}  # fmt: skip
    splits = {s: load_problems(name, s, data_dir=str(SHARED)) for s in SOURCES[name].splits}
    assert tuple(len(ps) for ps in splits.values()) == counts[name]
    for a, b in combinations(splits.values(), 2):
        assert shared_questions(a, b) == []
    for problems in splits.values():
        assert all(p.question.strip() and p.answer.strip() and p.id for p in problems)
        assert len({p.id for p in problems}) == len(problems)
    sample = random.Random(0).sample(splits[SOURCES[name].splits[-1]], 20)
    for p in sample:
        if p.kind != "code":
            assert check(p, f"So it is \\boxed{{{p.answer}}}.")[1].right, p


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here: set RSIM_DATA")
def test_math500_lies_in_math_test_alone():
    subset = load_problems("math500", "test", data_dir=str(SHARED))
    assert len(shared_questions(load_problems("math", "test", data_dir=str(SHARED)), subset)) == 500
    assert shared_questions(load_problems("math", "train", data_dir=str(SHARED)), subset) == []


def test_lab_families_and_replay():
    story = load_problems("lab:story", "train", limit=40, seed=0)
    assert {p.meta["family"] for p in story} == {"story"}
    both = load_problems("lab:story+equation", "test", limit=60, seed=0)
    assert {p.meta["family"] for p in both} == {"story", "equation"}
    with pytest.raises(UserError, match="unknown data set 'gym'"):
        load_problems("gym", "train", limit=1)
    with pytest.raises(UserError, match="no family 'novel'"):
        load_problems("lab:novel", "train", limit=1)
    equation, calendar = (load_problems(f"lab:{f}", "train", limit=40, seed=0) for f in ("equation", "calendar"))
    mixed = with_replay(story, [equation, calendar], 0.25, seed=0)
    count = Counter(p.meta["family"] for p in mixed)
    assert count == {"story": 30, "equation": 5, "calendar": 5}
    assert mixed == with_replay(story, [equation, calendar], 0.25, seed=0)
    with pytest.raises(UserError, match="replay_share"):
        with_replay(story, [equation[:3]], 0.5, seed=0)


def test_gym_tasks_that_seed_numpy_load_at_any_seed():
    for seed in range(5):
        assert load_problems("gym:pool_matrix", "dev", limit=2, seed=seed)[0].answer


@full
def test_integrals_that_the_library_cannot_solve_are_left_out():
    problems = load_problems("gym:intermediate_integration", "dev", limit=40)
    assert not any("Integral(" in problem.answer for problem in problems)


def test_integrals_that_are_not_solved_are_left_out(monkeypatch):
    entries = [{"question": f"Integrate {i}x.", "answer": "Integral(x)" if i % 2 else str(i)} for i in range(200)]
    monkeypatch.setattr("reasoning_gym.create_dataset", lambda *_, **__: entries)
    problems = load_problems("gym:intermediate_integration", "dev", limit=5)
    assert all(int(problem.answer) % 2 == 0 for problem in problems)


def test_code_problems_may_have_cases_instead_of_tests(tmp_path):
    path = tmp_path / "code.jsonl"

    def load(**meta):
        path.write_text(json.dumps({"question": "Add.", "kind": "code", "meta": meta}))
        return load_problems(str(path), "train")

    assert load(cases=[{"input": "1 2", "output": "3"}])[0].answer == "pass"
    assert load(cases=[{"input": [1], "output": 3}], entry_point="f")[0].meta["entry_point"] == "f"
    for broken in (
        {"cases": [{"input": [1], "output": 3}]},
        {"cases": [{"input": "1"}]},
        {"cases": 3},
        {"extra_inputs": [[1]]},
        {},
    ):
        with pytest.raises(UserError):
            load(**broken)
