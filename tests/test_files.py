"""What people's files hold: read, or refused with the line, the column and what to do about it."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rsim.collecting.arms import PACKAGED, load_arms
from rsim.config import PRESETS, load_config
from rsim.data.load import load_problems
from rsim.errors import UserError
from rsim.policies import strategies
from rsim.policies.strategies import load_strategies

CHAT = [{"role": "user", "content": "3+4=?"}, {"role": "assistant", "content": "7"}]
SAID = [{"from": "human", "value": "3+4=?"}, {"from": "gpt", "value": "7"}]


def load(path, *records, columns=()):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_problems(str(path), "train", columns=columns)


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Windows editors and PowerShell write one: JSONL and TOML with it were "not valid", while CSV was read."""
    rows = '{"question": "3+4=?", "answer": "7"}\r\n\r\n{"question": "5=?", "answer": 5}\r\n'
    for name, text in {"d.jsonl": rows, "d.json": rows, "D.CSV": "question,answer\n3+4=?,7\n5=?,5\n"}.items():
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert [p.answer for p in load_problems(str(tmp_path / name), "train")] == ["7", "5"]
    sets = Path(strategies.__file__).with_name("sets")
    for file, read in {PRESETS / "nano.toml": load_config, sets / "default.toml": load_strategies, PACKAGED: load_arms}.items():
        (tmp_path / "f.toml").write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert read(str(tmp_path / "f.toml")) == read(str(file))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"prompt": "3+4=?", "completion": "7"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": CHAT, "answer": 7, "prompt_id": "x"},
        {"question": "3+4=?", "prompt": "no", "answer": "3 and 4: #### 7"},
        {"question": "3+4=?", "answer": r"3+4 is \boxed{6}, no, \boxed{7}"},
    ],
)
def test_files_as_people_have_them_need_no_column_map(tmp_path, record):
    (problem,) = load(tmp_path / "d.jsonl", record)
    assert (problem.question, problem.answer, problem.kind) == ("3+4=?", "7", "numeric")


def test_a_column_that_is_named_is_the_one(tmp_path):
    with pytest.raises(UserError, match="no column 'task', there are 'prompt', 'completion'"):
        load(tmp_path / "d.jsonl", {"prompt": "3+4=?", "completion": "7"}, columns=("question=task",))
    with pytest.raises(UserError, match=r"line 1: no column 'question', there are 'talk', 'to': .*data\.columns=.*--column"):
        load(tmp_path / "d.jsonl", {"talk": SAID, "to": 1})


@pytest.mark.parametrize(
    "text", ['{"question": "q"}\n', '{"question": "q", "answer"', '{"question": "q", "answer": 7}\n', "[1]\n"]
)
def test_a_known_set_in_another_form_is_one_line(tmp_path, text):
    """A column that was not there, or a file that was cut, was a traceback."""
    for name in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text(text)
    with pytest.raises(UserError, match="gsm8k is not gsm8k as it is known here") as refused:
        load_problems("gsm8k", "test", data_dir=str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_known_set_whose_file_was_cut_is_one_line(tmp_path):
    whole = gzip.compress(b'{"question_id": 1}\n' * 50)
    (tmp_path / "mmlu_pro").mkdir()
    for text in (whole[:-20], whole[:12] + b"\xff" * 20 + whole[32:]):
        (tmp_path / "mmlu_pro" / "test.jsonl.gz").write_bytes(text)
        with pytest.raises(UserError, match="mmlu_pro is not mmlu_pro as it is known here"):
            load_problems("mmlu_pro", "test", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"tolerance": "0.1"}, "meta.tolerance is '0.1': write a number"),
        ({"options": [1, 2]}, "meta.options is [1, 2]: write a list of texts"),
        ({"scale": ["x"]}, "meta.scale is ['x']: write a text"),
        ({"tolerance": None, "options": None, "mine": 3}, ""),
    ],
)
def test_what_grading_reads_of_meta_is_checked(tmp_path, meta, said):
    """The first answer fell over it, in mid-run."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "A", "kind": "choice", "meta": meta}) + "\n")
    if said:
        with pytest.raises(UserError, match=re.escape(said)):
            load_problems(str(path), "test")
    else:
        assert [p.meta for p in load_problems(str(path), "test")] == [{"mine": 3}], "Parquet fills up with nulls"


def test_json_files_are_lists_of_records_or_a_record_a_line(tmp_path):
    """``.json`` was an unknown data set."""
    records = [{"question": "3+4=?", "answer": 7}, {"question": "q", "answer": "x"}]
    for text in (json.dumps(records, indent=1), "\n".join(map(json.dumps, records))):
        (tmp_path / "d.json").write_text(text)
        assert [(p.answer, p.id) for p in load_problems(str(tmp_path / "d.json"), "dev")] == [("7", "d-1"), ("x", "d-2")]
    for whole in ({"version": 1, "data": records[:1]}, records[0]):  # these were "not valid JSON" in their first line
        (tmp_path / "d.json").write_text(json.dumps(whole, indent=1))
        assert [(p.answer, p.id) for p in load_problems(str(tmp_path / "d.json"), "dev")] == [("7", "d-1")]
    (tmp_path / "d.json").write_text(json.dumps({"examples": records}, indent=1))
    with pytest.raises(UserError, match="record 1: no column 'question', there are 'examples'"):
        load_problems(str(tmp_path / "d.json"), "dev")
    (tmp_path / "d.json").write_text('[{"question": "q"')
    with pytest.raises(UserError, match="not valid JSON"):
        load_problems(str(tmp_path / "d.json"), "train")
    with pytest.raises(UserError, match=r"\.jsonl, \.json, \.csv, \.parquet"):
        load_problems("d.xlsx", "train")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (math.nan, "is nan: a missing value"),
        (math.inf, "is inf"),
        (True, "is a boolean: write the answer as a text or a number"),
        (["7"], "is a list"),
        ({"value": "7"}, "is an object"),
        (None, r"is missing \(null\)"),
        (" ", "is empty"),
        ("\ud83d", r"half of a character \(\\ud83d"),
    ],
)
def test_an_answer_that_is_none_is_named_by_what_it_is(tmp_path, answer, said):
    """NaN, as pandas writes a missing value, became the gold answer "nan"; of a boolean or a list the error said that the field
    was empty; half of a surrogate pair ended in a traceback."""
    good = {"question": "3+4=?", "answer": 7}
    with pytest.raises(UserError, match=rf"d\.jsonl, line 2: column 'answer'.* {said}"):
        load(tmp_path / "d.jsonl", good, good | {"answer": answer})


def test_half_a_character_and_a_missing_value_are_found_in_other_places_too(tmp_path):
    for record, said in (
        ({"question": "\udc00 7=?", "answer": 7}, "column 'question' has half of a character"),
        ({"question": "7=?", "answer": 7, "id": "\udc00"}, "line 1: column 'id' has half of a character"),
        ({"question": math.nan, "answer": 7}, "column 'question' is nan"),
    ):
        with pytest.raises(UserError, match=said):
            load(tmp_path / "d.jsonl", record)
    table = pyarrow.table({"question": ["7=?", "8=?"], "answer": [7.0, math.nan]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"row 2: column 'answer' is nan"):
        load_problems(str(tmp_path / "d.parquet"), "train")
    (tmp_path / "d.csv").write_text("question,answer\n7=?,7\n8=?,nan\n")
    with pytest.raises(UserError, match=r"line 3: column 'answer' is nan"):
        load_problems(str(tmp_path / "d.csv"), "train")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"question": "q", "answer": ' + "1" * 5000 + "}"])
def test_json_beyond_what_can_be_read_is_one_line(tmp_path, line):
    """Both were tracebacks."""
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(UserError, match="line 1: not valid JSON") as refused:
        load_problems(str(tmp_path / "d.jsonl"), "train")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "3+4=?", "completion": "7"}, ("question=prompt", "answer=completion")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, ("question=prompt", "answer=completion")),
        ({"messages": CHAT}, ("question=messages", "answer=messages")),
        ({"conversations": SAID}, ("question=conversations", "answer=conversations")),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "3+4=?"}]}], "answer": 7}, ("question=prompt",)),
    ],
)
def test_prompts_completions_and_chats(tmp_path, record, columns):
    """They were refused as empty fields, whatever they held."""
    assert [(p.question, p.answer) for p in load(tmp_path / "d.jsonl", record, columns=columns)] == [("3+4=?", "7")]


def test_the_systems_text_of_a_chat_comes_before_the_question(tmp_path):
    """Also the developer's, as OpenAI calls it now: it was left out."""
    columns = ("question=messages", "answer=messages")
    for role in ("system", "developer"):
        record = {"messages": [{"role": role, "content": "Add."}, *CHAT]}
        assert load(tmp_path / "d.jsonl", record, columns=columns)[0].question == "Add.\n\n3+4=?"


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (CHAT + CHAT, "a chat with 2 user turns"),
        (CHAT[1:], "a chat with 0 user turns"),
        (CHAT[::-1], "a chat that begins with the assistant"),
        ([*CHAT, {"role": "tool", "content": "7"}], "a chat with a turn of 'tool'"),
        ([{"text": "3+4=?"}], "a chat with a turn of None"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "parts that are texts"),
        ([{"role": "user", "content": None}], "content must be a text"),
    ],
)
def test_a_chat_that_is_no_single_question_is_refused(tmp_path, turns, said):
    with pytest.raises(UserError, match=rf"line 1: column 'messages'.*{said}"):
        load(tmp_path / "d.jsonl", {"messages": turns, "answer": 7}, columns=("question=messages",))


def test_of_a_worked_solution_in_gsm8ks_way_the_gold_answer_is_its_end(tmp_path):
    """As ``hf:openai/gsm8k`` and files made of it have it; with all of the solution as gold no answer was right."""
    solved = {"question": "Ann has 48, and half of it.", "answer": "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"}
    problem = load(tmp_path / "d.jsonl", solved)[0]
    assert (problem.answer, problem.kind) == ("72", "numeric")
    assert load(tmp_path / "d.jsonl", solved | {"kind": "text"})[0].answer == solved["answer"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (math.nan, "line 2: column 'id' is nan"),
        (True, "line 2: column 'id' is a boolean"),
        (["b"], "line 2: column 'id' is a list"),
        ("a", "line 2: column 'id' is 'a', as in line 1"),
    ],
)
def test_an_id_is_a_records_own(tmp_path, given, said):
    """Records of one id were one problem in reports; NaN became the text "nan"."""
    rows = [{"question": "1+1", "answer": 2, "id": name} for name in ("a", given)]
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        load(tmp_path / "d.jsonl", *rows)
    assert refused.value.remedy
    rows[1]["id"] = 0
    assert [p.id for p in load(tmp_path / "d.jsonl", *rows)] == ["a", "0"]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_a_chat_in_a_cell_of_a_csv_file(tmp_path, write):
    """As JSON, or as pandas writes it."""
    file, chat = tmp_path / "a.csv", [{"role": "system", "content": 'Be it\'s "short".'}, {"role": "user", "content": "1+1?"}]
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([["question", "answer"], [write(chat), 2], ["[{1}, {2}]: how many sets?", 2]])
    problems = load_problems(str(file), "train")
    assert [p.question for p in problems] == ['Be it\'s "short".\n\n1+1?', "[{1}, {2}]: how many sets?"]
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([["question", "answer"], [write(chat)[:60], 2]])
    with pytest.raises(UserError, match="line 2: column 'question' is no whole chat"):
        load_problems(str(file), "train")


def test_meta_may_be_json_in_a_cell(tmp_path):
    """It was passed over, and the tolerance with it."""
    path = tmp_path / "q.csv"
    path.write_text('question,answer,meta\nq,2,"{""tolerance"": 0.1}"\nr,3,web\n')
    assert [p.meta for p in load_problems(str(path), "test")] == [{"tolerance": 0.1}, {}]
    path.write_text('question,answer,meta\nq,2,"{""tolerance"": 0."\n')
    with pytest.raises(UserError, match="line 2: meta: not valid JSON"):
        load_problems(str(path), "test")
