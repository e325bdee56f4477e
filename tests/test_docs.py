"""What the pages of docs/ and the README name exists: files, tests, modules and functions, keys of configs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import rsim
from rsim.config import Config, StageConfig
from rsim.settings import to_table

ROOT, SOURCE = Path(__file__).parents[1], Path(rsim.__file__).parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md"))]
WRITTEN = [p for p in PAGES if p.name != "results.md" and p.parent.name != "results"]  # the others are made from measurements
ROOMS = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()} - {"__init__", "__main__"}
FILES = re.compile(rf"(?:src|tests|studies|{'|'.join(sorted(ROOMS))})/[\w./*-]+")
DOTTED = re.compile(r"\w+(\.\w+)+(?<!\.py)(?<!\.(?:toml|html|json))")  # a name in Python or a key, no file
TABLE = to_table(Config())
KEYS = {f"{table}.{key}" for table, keys in TABLE.items() if isinstance(keys, dict) for key in keys} | set(TABLE)
TABLES = {key.partition(".")[0] for key in KEYS if "." in key}


def spans(page: Path) -> list[str]:
    """What stands between backticks, outside of blocks of code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


@cache
def members(file: Path) -> dict[str, set[str]]:
    """What a module defines, and under each class what that has; names as they are written, nothing is imported."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for name in names(node):
            stored = (n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
            body = node.body if isinstance(node, ast.ClassDef) else []
            found[name] = {name for child in body for name in names(child)} | set(stored if body else ())
    return found


def names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def resolves(name: str) -> bool:
    """Whether ``room.module.Class.member``, or less of it, is there."""
    place, parts = SOURCE, name.removeprefix("rsim.").split(".")
    while parts and (place / parts[0]).is_dir():
        place = place / parts.pop(0)
    if not parts:
        return True
    file = place / f"{parts.pop(0)}.py"
    known: set[str] | dict[str, set[str]] = members(file) if file.is_file() else {}
    if not parts or not file.is_file():
        return file.is_file()
    return parts[0] in known and (len(parts) == 1 or parts[1] in members(file)[parts[0]])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.name)
def test_what_a_page_names_exists(page):
    missing = []
    for span in spans(page):
        path, _, test = span.partition("::")
        if FILES.fullmatch(path) and "." in path:
            file = next((base / path for base in (ROOT, SOURCE) if (base / path).exists()), None)
            missing += [span] if file is None or (test and test not in members(file)) else []
        elif DOTTED.fullmatch(span) and span.removeprefix("rsim.").partition(".")[0] in ROOMS | TABLES:
            missing += [] if span in KEYS or resolves(span) else [span]
    assert missing == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.name)
def test_keys_of_configs_are_known(page):
    text = page.read_text(encoding="utf-8")
    said = re.findall(r"--set '?([\w.]+)=", text) + [m[1] for s in spans(page) if (m := re.match(r"([a-z_]+\.[a-z_]+) = ", s))]
    said += [f"stages.{m[1]}" for s in spans(page) if (m := re.match(r"((?:train_)\w+) = ", s))]
    stage = {f"stages.{key}" for key in to_table(StageConfig())}
    assert [key for key in said if key not in KEYS | stage] == []
