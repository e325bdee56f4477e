"""One reader for each data set: from the folder of the data sets to ``{split: problems}``.

Only splits that do not overlap are given: where a set has no development split, the end of its training split is kept apart.
Nothing is fetched from anywhere; `rsim.data.load` finds the folder.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsim.answers.extract import boxed
from rsim.errors import UserError
from rsim.game.problem import Problem

Splits = dict[str, list[Problem]]
_DEV = 500  # training problems kept apart where there is no development split


@dataclass(frozen=True)
class Source:
    """A data set: what it is, where its folder must lie, and how it is read."""

    title: str
    folder: str
    splits: tuple[str, ...]
    read: Callable[[Path], Splits]


def read_gsm8k(folder: Path) -> Splits:
    def problem(record: dict[str, Any], name: str) -> Problem:
        gold = record["answer"].rpartition("####")[2].strip().replace(",", "")
        return Problem(record["question"], gold, name)

    train = _numbered(_lines(folder / "train.jsonl"), "gsm8k-train", problem)
    return _with_dev(train) | {"test": _numbered(_lines(folder / "test.jsonl"), "gsm8k-test", problem)}


def read_math(folder: Path) -> Splits:
    """Two training problems whose solution boxes nothing are left out."""

    def problem(record: dict[str, Any], name: str) -> Problem:
        boxes = boxed(record["solution"])
        gold = boxes[-1] if boxes else _loose_box(record["solution"])
        return Problem(record["problem"], gold, record["id"], {"level": record["level"], "subject": record["type"]}, "latex")

    train = [p for p in _numbered(_lines(folder / "train.jsonl"), "", problem) if p.answer != "{}"]
    return _with_dev(train) | {"test": _numbered(_lines(folder / "test.jsonl"), "", problem)}


def _loose_box(solution: str) -> str:
    """Two training solutions write ``\\boxed 2`` without braces."""
    return solution.rpartition("\\boxed")[2].strip().split("$")[0].strip()


def read_math500(folder: Path) -> Splits:
    def problem(record: dict[str, Any], name: str) -> Problem:
        meta = {"level": f"Level {record['level']}", "subject": record["subject"]}
        return Problem(record["problem"], record["answer"], record["unique_id"], meta, "latex")

    return {"test": _numbered(_json(folder / "math500_test.json"), "", problem)}


def read_aqua(folder: Path) -> Splits:
    def problem(record: dict[str, Any], name: str) -> Problem:
        options = [option.partition(")")[2].strip() for option in record["options"]]
        return choice_problem(record["question"], options, record["correct"], name)

    return {split: _numbered(_lines(folder / f"{split}.json"), f"aqua-{split}", problem) for split in ("dev", "test")}


def read_mmlu_pro(folder: Path) -> Splits:
    def problem(record: dict[str, Any], name: str) -> Problem:
        meta = {"subject": record["category"]}
        return choice_problem(
            record["question"], record["options"], record["answer"], f"mmlu-pro-{record['question_id']}", meta
        )

    return {"test": _numbered(_lines(folder / "test.jsonl.gz"), "", problem)}


def read_theoremqa(folder: Path, *, pictures: bool = False) -> Splits:
    """Questions that need their picture are left out, unless ``pictures`` asks for them."""

    def problem(record: dict[str, Any], name: str) -> Problem:
        meta = {"subject": record["field"], "subfield": record["subfield"]}
        gold, kind = record["Answer"], record["Answer_type"]
        if kind == "bool":
            return Problem(record["Question"], str(gold), record["id"], meta, "text")
        if kind == "option":
            return Problem(record["Question"], str(gold).strip("()").upper(), record["id"], meta, "choice")
        if kind.startswith("list"):
            return Problem(record["Question"], str(gold), record["id"], meta, "latex")
        return Problem(record["Question"], str(gold), record["id"], meta | {"tolerance": 0.01 if kind == "float" else 0.0})

    records = [r for r in _json(folder / "theoremqa_test.json") if pictures or r["Picture"] is None]
    return {"test": _numbered(records, "", problem)}


def read_svamp(folder: Path) -> Splits:
    def problem(record: dict[str, Any], name: str) -> Problem:
        question = f"{record['Body'].rstrip(' .')}. {record['Question']}"
        return Problem(question, f"{record['Answer']:g}", record["ID"], {"subject": record["Type"]})

    return {"test": _numbered(_json(folder / "SVAMP.json"), "", problem)}


def read_tatqa(folder: Path) -> Splits:
    """Finance questions on a table with text; the public gold files are dev (trained on here) and test."""

    def problems(file: str) -> list[Problem]:
        return [
            _tatqa_problem(page, q)
            for page in _json(folder / file)
            for q in page["questions"]
            if q["answer_type"] != "multi-span"
        ]

    train, test = problems("tatqa_dataset_dev.json"), problems("tatqa_dataset_test_gold.json")
    return {"train": train[:-200], "dev": train[-200:], "test": test}


def _tatqa_problem(page: dict[str, Any], question: dict[str, Any]) -> Problem:
    table = "\n".join(" | ".join(cell.strip() for cell in row) for row in page["table"]["table"])
    text = "\n".join(p["text"].strip() for p in page["paragraphs"])
    unit = f" (in {question['scale']})" if question["scale"] else ""
    asked = f"{table}\n\n{text}\n\n{question['question']}{unit}"
    gold = question["answer"]
    meta = {"subject": question["answer_type"], "scale": question["scale"]}
    if question["answer_type"] == "span":
        return Problem(asked, str(gold[0] if isinstance(gold, list) else gold), question["uid"], meta, "text")
    return Problem(asked, str(gold), question["uid"], meta | {"tolerance": 0.005})


def read_humaneval(folder: Path) -> Splits:
    """The tests of three tasks call a helper that the prompt defines: they have that definition, whatever the answer says."""

    def problem(record: dict[str, Any], name: str) -> Problem:
        given = _statements(record["prompt"], lambda s: getattr(s, "name", "") != record["entry_point"])
        tests = f"{given}\n{record['test']}\ncheck({record['entry_point']})\n"
        meta = {"prefix": record["prompt"], "reference": record["canonical_solution"], "entry_point": record["entry_point"]}
        asked = f"Complete this Python function. Give the whole function in one code block.\n\n{record['prompt']}"
        return Problem(asked, tests, record["task_id"], meta, "code")

    return {"test": _numbered(_lines(folder / "HumanEval.jsonl.gz"), "", problem)}


def read_mbpp(folder: Path) -> Splits:
    """The splits of the MBPP paper by task number; the first ten, its prompt examples, are left out.

    The tests of one task need a module that only the reference imports: what it imports, the tests import themselves.
    """

    def problem(record: dict[str, Any], name: str) -> Problem:
        imports = _statements(record["code"], lambda s: isinstance(s, ast.Import))
        tests = "\n".join([imports, record["test_setup_code"], *record["test_list"]])
        asked = f"{record['text']}\nThe function must pass, for example: {record['test_list'][0]}\nGive it in one code block."
        shadowed = re.findall(r"^def (\w+)", record["code"], re.MULTILINE)  # one task defines a function named ``sum``
        meta = {"reference": record["code"], "number": record["task_id"], "shadowed": tuple(shadowed)}
        return Problem(asked, tests, f"mbpp-{record['task_id']}", meta, "code")

    everything = _numbered(_lines(folder / "mbpp.jsonl"), "", problem)
    bounds = {"test": range(11, 511), "dev": range(511, 601), "train": range(601, 975)}
    return {split: [p for p in everything if p.meta["number"] in numbers] for split, numbers in bounds.items()}


def _statements(program: str, wanted: Callable[[ast.stmt], bool]) -> str:
    """Those of its top-level statements that are ``wanted``, as a program."""
    return "\n".join(ast.unparse(statement) for statement in ast.parse(program).body if wanted(statement))


SOURCES = {
    "gsm8k": Source("GSM8K, grade-school word problems", "gsm8k", ("train", "dev", "test"), read_gsm8k),
    "math": Source("MATH, competition problems, levels 1 to 5", "MATH", ("train", "dev", "test"), read_math),
    "math500": Source("MATH-500, a part of MATH test", "math500", ("test",), read_math500),
    "aqua": Source("AQuA-RAT, algebra with five options", "aqua_rat", ("dev", "test"), read_aqua),
    "mmlu_pro": Source("MMLU-Pro, fourteen subjects, up to ten options", "mmlu_pro", ("test",), read_mmlu_pro),
    "theoremqa": Source("TheoremQA, university theorems", "theoremqa", ("test",), read_theoremqa),
    "svamp": Source("SVAMP, one-step word problems", "svamp", ("test",), read_svamp),
    "tatqa": Source("TAT-QA, finance: tables and text", "tatqa", ("train", "dev", "test"), read_tatqa),
    "humaneval": Source("HumanEval, Python functions", "humaneval", ("test",), read_humaneval),
    "mbpp": Source("MBPP, basic Python programs", "mbpp", ("train", "dev", "test"), read_mbpp),
}


def choice_problem(question: str, options: list[str], letter: str, name: str, meta: dict[str, Any] | None = None) -> Problem:
    """A question with its options written under it as ``(A) ...``, and what is asked for."""
    lines = [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]
    return Problem(
        "\n".join([question, *lines, "Answer with the letter of one option."]),
        letter,
        name,
        (meta or {}) | {"options": options},
        "choice",
    )


def _with_dev(train: list[Problem]) -> Splits:
    return {"train": train[:-_DEV], "dev": train[-_DEV:]}


def _numbered(records: Any, stem: str, problem: Callable[[dict[str, Any], str], Problem]) -> list[Problem]:
    return [problem(record, f"{stem}-{number}") for number, record in enumerate(records, 1)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).split("\n") if line.strip()]


def _json(path: Path) -> Any:
    return json.loads(_text(path))


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"data file not found: {path}", "check data.data_dir or $RSIM_DATA (rsim data fetch NAME)")
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
