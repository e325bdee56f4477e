"""From a data set's name or file to a list of problems: ``lab``, ``gsm8k`` or a JSONL file.

GSM8K has no development split of its own: the last 500 training questions are kept apart as ``dev``.
"""

from __future__ import annotations

import json
import os
import random
from itertools import islice
from pathlib import Path
from typing import Any

from rsim.data.problem import Problem
from rsim.errors import UserError
from rsim.lab.expressions import render
from rsim.lab.problems import SPLITS, sample_problems

_GSM8K_DEV = 500


def load_problems(source: str, split: str, *, data_dir: str = "", limit: int = 0, seed: int = 0) -> list[Problem]:
    """Problems of ``source``.

    Args:
        source: ``lab`` (made on the spot), ``gsm8k`` (under ``data_dir``) or the path of a JSONL file, whose lines hold
            ``question`` and ``answer`` (and may hold ``id`` and ``meta``); a file has one split, used for all.
        split: ``train``, ``dev`` or ``test``.
        data_dir: folder of the data sets; empty: ``$RSIM_DATA``.
        limit: at most so many, drawn with ``seed``; 0: all. ``lab`` has no end and needs a limit.

    Raises:
        UserError: no such data, split or folder; an empty or malformed file.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}", f"use one of {', '.join(SPLITS)}")
    if source == "lab":
        if limit < 1:
            raise UserError("the lab's problems have no end", "give a number: data.train_size, data.eval_size or --limit")
        return _lab(split, limit, seed)
    if source == "gsm8k":
        problems = _gsm8k(_folder(data_dir) / "gsm8k", split)
    elif source.endswith(".jsonl"):
        problems = _jsonl(Path(source), "question", "answer")
    else:
        raise UserError(f"unknown data set {source!r}", "use lab, gsm8k or the path of a .jsonl file")
    if limit and limit < len(problems):
        chosen = sorted(random.Random(f"limit:{seed}").sample(range(len(problems)), limit))
        problems = [problems[i] for i in chosen]
    return problems


def _lab(split: str, limit: int, seed: int) -> list[Problem]:
    """The first ``limit`` different problems of the seed's stream."""
    seen: set[str] = set()

    def fresh() -> Any:
        for problem in sample_problems(split, seed):
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem

    return [
        Problem(p.question, str(p.answer), f"lab-{split}-{seed}-{i}", {"family": p.family, "expression": render(p.expression)})
        for i, p in enumerate(islice(fresh(), limit))
    ]


def _folder(data_dir: str) -> Path:
    chosen = data_dir or os.environ.get("RSIM_DATA", "")
    if not chosen:
        raise UserError("no data folder", "set $RSIM_DATA or data.data_dir to the folder that holds gsm8k/")
    if not Path(chosen).is_dir():
        raise UserError(f"no data folder {chosen}", "set $RSIM_DATA or data.data_dir to the folder that holds gsm8k/")
    return Path(chosen)


def _gsm8k(folder: Path, split: str) -> list[Problem]:
    problems = _jsonl(folder / ("test.jsonl" if split == "test" else "train.jsonl"), "question", "answer")
    problems = [Problem(p.question, p.answer.rpartition("####")[2].strip().replace(",", ""), p.id, p.meta) for p in problems]
    return {"test": problems, "train": problems[:-_GSM8K_DEV], "dev": problems[-_GSM8K_DEV:]}[split]


def _jsonl(path: Path, question: str, answer: str) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"data file not found: {path}", "check the path")
    problems = []
    with path.open(encoding="utf-8", errors="strict") as lines:
        for number, line in enumerate(_text_lines(lines, path), 1):
            if line.strip():
                problems.append(_parse(line, question, answer, path, number))
    if not problems:
        raise UserError(f"{path} is empty", 'write one {"question": ..., "answer": ...} per line')
    return problems


def _text_lines(lines: Any, path: Path) -> Any:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", str(error)) from error


def _parse(line: str, question: str, answer: str, path: Path, number: int) -> Problem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not valid JSON", error.msg) from error
    texts = [record.get(key) for key in (question, answer)] if isinstance(record, dict) else [None]
    if not all(isinstance(t, str | int | float) and not isinstance(t, bool) and str(t).strip() for t in texts):
        raise UserError(f"{path}, line {number}", f"needs the fields {question!r} and {answer!r}, neither empty")
    meta = record.get("meta", {})
    name = str(record.get("id", f"{path.stem}-{number}"))
    return Problem(str(texts[0]), str(texts[1]), name, meta if isinstance(meta, dict) else {})
