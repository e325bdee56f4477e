"""People's own files and hub sets: from rows with named columns to problems.

Without the columns ``question`` and ``answer`` a record may have ``prompt`` and ``completion``, or ``messages`` for both. A
chat, ``[{"role": ..., "content": ...}]``, may stand where a text does: as a question it is its one user turn, behind the
system's text if there is one; as an answer it is its one assistant turn. What is no problem is refused, by row and column.
"""

from __future__ import annotations

import ast
import csv
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from rsim.answers.extract import boxed, parse_number
from rsim.errors import UserError, first_line
from rsim.game.problem import Kind, Problem
from rsim.models.prompts import plain_text

_COLUMNS = ("question", "answer", "id", "kind")
_USUAL = {
    "question": ("prompt", "messages"),
    "answer": ("completion", "messages"),
}  # where ours is not there
_SAID_BY = {"question": "user", "answer": "assistant"}
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of them, as in {"from": ..., "value": ...}
_CHAT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1""")
_META: dict[str, tuple[Any, str]] = {"tolerance": (int | float, "a number"), "options": (list, "a list of texts")}
_META |= dict.fromkeys(("scale", "prefix", "reference", "entry_point", "extra_tests"), (str, "a text"))
_JSON = {bool: "a boolean", list: "a list", dict: "an object", type(None): "missing (null)", str: "empty"}

Records = Iterator[tuple[str, Any]]  # (place, record) of every row; places name the line, for errors


def file_records(path: Path) -> Records:
    """The rows of a file, whose ending says how it is read; a byte order mark is skipped."""
    if not path.is_file():
        raise UserError(f"data file not found: {path}", "check the path")
    try:
        yield from READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", f"save it as UTF-8; {error}") from error


def _jsonl(path: Path) -> Records:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parsed(line, place)


def _json(path: Path) -> Records:
    """A list of records, also in an object, ``{"data": [...]}``; one record; or a record a line as in JSONL."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        if text.lstrip().startswith("["):
            _parsed(text, str(path))
        yield from _jsonl(path)
        return
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{path}, record {number}", record


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise UserError(f"{place}: not valid JSON", first_line(error).partition(": line ")[0]) from error


def _csv(path: Path) -> Records:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)  # a quote that is never closed would swallow the rest of the file
        try:
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    how_many = "more" if None in row else "fewer"
                    raise UserError(f"{place}: {how_many} cells than columns", "put texts with commas in quotes")
                yield place, {k: _cell(v, f"{place}: column {k!r}") for k, v in row.items()}
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}", str(error)) from error


def _cell(text: Any, where: str) -> Any:
    """What a cell stands for, where there are no types: a chat, or a missing value that became a text on its way ("nan")."""
    if text in ("nan", "NaN"):
        return math.nan
    if not isinstance(text, str) or not _CHAT.match(text):
        return text
    try:
        return ast.literal_eval(text) if "'" in text[:3] else json.loads(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} is no whole chat", 'write it as JSON, [{"role": ..., "content": ...}]') from error


def _parquet(path: Path) -> Records:
    parquet = imported("pyarrow.parquet", "pyarrow")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file", first_line(error)) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def hub_records(name: str, split: str) -> Records:
    """The rows of a data set ``NAME`` or ``NAME:SUBSET`` of the Hugging Face hub."""
    datasets = imported("datasets", "datasets")
    name, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split={"dev": "validation"}.get(split, split))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load hf:{name}", first_line(error)) from error
    for number, row in enumerate(rows):
        yield f"hf:{name}, row {number}", row


def problems_of(records: Records, source: str, columns: tuple[str, ...]) -> list[Problem]:
    """The problems in the rows of ``source``; ``columns`` as `rsim.data.load.load_problems` has them.

    Raises:
        UserError: there are none, or a row is no problem.
    """
    mapping = _column_map(columns)
    problems: dict[str, Problem] = {}
    places: dict[str, str] = {}
    for place, record in records:
        problem = _problem(record, place, mapping)
        if problem.id in problems:
            doubled = f"{place}: column {mapping['id']!r} is {problem.id!r}, as in {places[problem.id].rpartition(', ')[2]}"
            raise UserError(doubled, "give each record an id of its own, or leave the column out")
        problems[problem.id], places[problem.id] = problem, place
    if not problems:
        raise UserError(f"{source} is empty", 'write one {"question": ..., "answer": ...} per line')
    return list(problems.values())


def _column_map(columns: tuple[str, ...]) -> dict[str, str]:
    mapping = {name: name for name in _COLUMNS}
    for column in columns:
        ours, sep, theirs = column.partition("=")
        if not sep or ours not in _COLUMNS or not theirs:
            raise UserError(f"data.columns: {column!r}", f"write ours=theirs, where ours is one of {', '.join(_COLUMNS)}")
        mapping[ours] = theirs
    return mapping


def _problem(record: Any, place: str, columns: dict[str, str]) -> Problem:
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record is {_what(record)}", 'write {"question": ..., "answer": ...}')
    meta = _meta(record.get("meta"), place)
    kind: Any = record.get(columns["kind"]) or ""
    if kind and kind not in get_args(Kind):
        raise UserError(place, f"kind is {kind!r}: use one of {', '.join(get_args(Kind))}")
    if kind == "code" and _has_cases(meta, place):
        record = {columns["answer"]: "pass", **record}  # the cases are tests enough
    question, answer = (_text(record, place, ours, columns[ours]) for ours in ("question", "answer"))
    if not kind:
        # Of a worked solution: in GSM8K's way, or what its last box holds.
        answer = answer.rpartition("####")[2].strip() or answer
        answer = (boxed(answer) or [answer])[-1]
        kind = "numeric" if parse_number(answer) is not None else "latex"
    if kind == "gym" and not {"task", "entry"} <= set(meta):
        raise UserError(place, "kind gym needs meta.task and meta.entry, what reasoning-gym's verifier grades by")
    if kind == "choice" and not re.fullmatch("[A-J]", answer):
        raise UserError(place, f"the answer to a choice must be a letter from A to J, not {answer!r}")
    name = record.get(columns["id"])
    if name is None or name == "":
        name = re.sub(r"(\.\w+)?, (line|row|record) ", "-", place.rpartition("/")[2])
    return Problem(question, answer, _plain(name, f"{place}: column {columns['id']!r}", "id"), meta, kind)


def _meta(given: Any, place: str) -> dict[str, Any]:
    """What a record's ``meta`` holds; what is null there (as Parquet fills up) is left out.

    Raises:
        UserError: what grading reads (``_META``) is of another type, over which it would fall in mid-run.
    """
    if isinstance(given, str) and given.lstrip().startswith("{"):  # a cell of a CSV file
        given = _parsed(given, f"{place}: meta")
    meta = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    for name, (kind, said) in _META.items():
        value = meta.get(name)
        fits = value is None or (isinstance(value, kind) and not isinstance(value, bool))
        if not fits or (name == "options" and not all(isinstance(option, str) for option in value or [])):
            raise UserError(f"{place}: meta.{name} is {value!r}", f"write {said}")
    return meta


def _text(record: dict[str, Any], place: str, ours: str, column: str) -> str:
    """The record's ``column`` as a text that is a question or an answer."""
    if column == ours:
        column = next((name for name in (ours, *_USUAL[ours]) if name in record), ours)
    if column not in record:
        found, flag = ", ".join(map(repr, record)) or "none", f"{ours}=COLUMN"
        remedy = f"name the one that it is: --set 'data.columns=[\"{flag}\"]' (rsim data validate: --column {flag})"
        raise UserError(f"{place}: no column {column!r}, there are {found}", remedy)
    value, where = record[column], f"{place}: column {column!r}"
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = _said(value, where, _SAID_BY[ours])
    return _plain(value, where, ours)


def _plain(value: Any, where: str, ours: str) -> str:
    """A text or a number, as a text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}", "a missing value, as pandas writes it: fill it in, or leave the record out")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where} is {_what(value)}", f"write the {ours} as a text or a number")
    return _whole(str(value), where)


def _said(turns: list[dict[str, Any]], where: str, role: str) -> str:
    """What ``role`` says in a chat in which it speaks once; before the user's text comes the system's."""
    said: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for turn in turns:
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        speaker = _ROLES.get(str(speaker), speaker)
        if speaker not in said:
            raise UserError(f"{where} is a chat with a turn of {speaker!r}", f"only {', '.join(said)} may speak")
        if speaker == "user" and said["assistant"] and not said["user"]:
            raise UserError(f"{where} is a chat that begins with the assistant", "begin with the user")
        said[speaker].append(plain_text(content, where))
    if len(said[role]) != 1:
        raise UserError(f"{where} is a chat with {len(said[role])} {role} turns", "rsim asks one question: keep one")
    return "\n\n".join([*(said["system"] if role == "user" else []), *said[role]])


def _whole(text: str, where: str) -> str:
    """``text``, which must be made of whole characters: halves of them can neither be tokenised nor written down."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where} has half of a character ({half}, a lone surrogate)", "write the character whole") from error
    return text


def _what(value: Any) -> str:
    return _JSON.get(type(value), f"of type {type(value).__name__}")


def _has_cases(meta: dict[str, Any], place: str) -> bool:
    """Whether a code problem has cases or inputs of its own (`rsim.rewards.code`); raises `UserError` where they are broken."""
    cases, inputs, name = meta.get("cases", []), meta.get("extra_inputs", []), meta.get("entry_point")
    kind = list if name else str
    if not isinstance(cases, list) or not all(
        isinstance(c, dict) and isinstance(c.get("input"), kind) and "output" in c for c in cases
    ):
        raise UserError(
            f"{place}: cases",
            'each is {"input": ..., "output": ...}; input is a list of arguments, or without entry_point a text',
        )
    if inputs and not (name and isinstance(meta.get("reference"), str) and isinstance(inputs, list)):
        raise UserError(f"{place}: extra_inputs", "a list that needs entry_point and reference, a program")
    return bool(cases or inputs)


def imported(module: str, package: str) -> Any:
    """The module, which comes with ``package``; raises `UserError` where that is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(f"this needs the package {package}", f"pip install {package}")
    return importlib.import_module(module)
