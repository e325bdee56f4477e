"""Mutants: the source with one small change each, which some test must notice.

`KNOWN` names mutants that tests once let pass; `drawn` makes others from the syntax tree. A `Tree` runs the tests of a module
against a mutant in a copy of the project. Left out is code that keeps strangers' programs in or ends processes
(`rewards.sandbox`, `programs`, `symbolic`): its tests are attacks, and a mutant might let one out.
"""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_TABLE = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text(encoding="utf-8"))
TESTS: dict[str, list[str]] = _TABLE["tests"]  # of each module that is mutated
KNOWN: list[dict[str, str]] = _TABLE["known"]
_PAIRS = [
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot), (ast.Add, ast.Sub),
    (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or),
]  # fmt: skip
_SWAPS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])} | {ast.Pow: ast.Mult}
_WORDS = {"min": "max", "any": "all", "minimum": "maximum", "cumsum": "cumprod"}
_WORDS |= {b: a for a, b in _WORDS.items()}


@dataclass(frozen=True)
class Mutant:
    """``text`` is all of ``file``, a path below src/rsim; ``what``: what was changed."""

    file: str
    what: str
    text: str


def known() -> list[Mutant]:
    """Raises `ValueError` where the source has moved on and a mutant of the list can no longer be made."""
    found = []
    for entry in KNOWN:
        text = (ROOT / "src/rsim" / entry["file"]).read_text(encoding="utf-8")
        if text.count(entry["old"]) != 1:
            raise ValueError(f"{entry['file']} has {text.count(entry['old'])} places for the mutant {entry['what']!r}")
        found.append(Mutant(entry["file"], entry["what"], text.replace(entry["old"], entry["new"])))
    return found


def drawn(count: int, seed: int) -> list[Mutant]:
    return random.Random(seed).sample([mutant for file in sorted(TESTS) for mutant in mutants_of(file)], count)


def mutants_of(file: str) -> Iterator[Mutant]:
    source = (ROOT / "src/rsim" / file).read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(source) if byte == ord("\n"))]
    for node in _nodes(ast.parse(source)):
        for place, new in _changed(node):
            begin = starts[place.lineno - 1] + place.col_offset  # columns count bytes
            end = starts[place.end_lineno - 1] + place.end_col_offset
            what = f"{file}:{place.lineno}: {' '.join(ast.unparse(place).split())[:60]} -> {new[:60]}"
            yield Mutant(file, what, (source[:begin] + new.encode() + source[end:]).decode())


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What may be changed: no annotations, decorators, f-strings, error messages or `setting`s."""
    for name, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            said = name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr | ast.Raise)
            limits = isinstance(node, ast.Call) and ast.unparse(node.func) == "setting"
            if isinstance(node, ast.AST) and not said and not limits:
                yield node
                yield from _nodes(node)


def _changed(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The mutants of one node: what is replaced, and by which source."""
    match node:
        case ast.Compare(left, [op], [right]):
            yield node, f"({ast.unparse(ast.Compare(left, [_SWAPS[type(op)]()], [right]))})"
        case ast.BinOp(left, op, right) if type(op) in _SWAPS:
            yield node, f"({ast.unparse(ast.BinOp(left, _SWAPS[type(op)](), right))})"
        case ast.BoolOp(op, values):
            yield node, f"({ast.unparse(ast.BoolOp(_SWAPS[type(op)](), values))})"
        case ast.UnaryOp(_, operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield node, str(not value)
        case ast.Constant(int(value) | float(value)):
            yield node, str(value + 1)
        case ast.Name(name) if name in _WORDS:
            yield node, _WORDS[name]
        case ast.Attribute(value, name) if name in _WORDS:
            yield node, f"({ast.unparse(value)}).{_WORDS[name]}"
        case ast.If(test) | ast.IfExp(test) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield test, f"(not {ast.unparse(test)})"
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield node, "pass"


class Tree:
    """A copy of the project in ``folder``, one file of which is another's at a time; processes are forks of this one, which
    has imported what takes long."""

    def __init__(self, folder: Path) -> None:
        self.folder, leave = folder, shutil.ignore_patterns("__pycache__")
        for name in ("src", "tests", "studies"):
            shutil.copytree(ROOT / name, folder / name, ignore=leave)
        shutil.copy(ROOT / "pyproject.toml", folder)
        importlib.import_module("rsim.training.trainer")
        importlib.import_module("hypothesis")

    def notices(self, file: str, text: str, limit: float) -> bool:
        """Whether a test of ``file`` fails, or takes longer than ``limit`` seconds, when its text is ``text``."""
        place = self.folder / "src/rsim" / file
        original = place.read_text(encoding="utf-8")
        place.write_text(text, encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(target=self._tests, args=(file,))
        process.start()
        process.join(limit)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
        process.join()
        place.write_text(original, encoding="utf-8")
        return process.exitcode != 0

    def _tests(self, file: str) -> None:
        os.setsid()
        os.chdir(self.folder)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("rsim", "studies", "tiny", "tests")]:
            del sys.modules[name]
        sys.path[:0] = [str(self.folder / "src"), str(self.folder)]
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "PYTHONDONTWRITEBYTECODE": "1"}
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        os._exit(pytest.main([*options, f"src/rsim/{file}", *(f"tests/{name}.py" for name in TESTS[file])]))
