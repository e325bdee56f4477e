"""Answers that are programs: the fenced blocks of a text, and the tests that a problem's fields make.

A problem of kind *code* has tests as text (its ``answer``), and in ``meta`` may have

- ``cases``: a list of ``{"input": ..., "output": ...}``. With ``entry_point`` (a function, or
  ``Solution.method``) an input is a list of arguments and the output what comes back; without, the input is
  what the program reads from its standard input and the output what it prints;
- ``extra_tests``: more tests as text;
- ``extra_inputs`` and ``reference``: lists of arguments (or Python literals of such lists, as text) for which
  the program must return what the reference returns;
- ``tolerance``: the relative error that floats may have (1e-6, if nothing is said).
"""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from rsim.game.problem import Problem
from rsim.rewards.sandbox import Result, run_tests

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})[^\S\n]*([^\n`]*?)[^\S\n]*$")
_PYTHON = re.compile(r"(?:python|py)?[\d.]*(?:\s.*)?", re.IGNORECASE | re.DOTALL)

_HELPERS = """
import ast as _ast, copy as _copy, json as _json
def _same(given, wanted, near={near}):
    if isinstance(wanted, bool) or isinstance(given, bool):
        return given is wanted
    if isinstance(wanted, float) and isinstance(given, (int, float)):
        return given == wanted or given != given and wanted != wanted or (
            abs(given - wanted) <= near * max(1.0, abs(wanted)))
    if isinstance(wanted, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(given) == len(wanted) and all(_same(g, w) for g, w in zip(given, wanted))
    if isinstance(wanted, dict) and isinstance(given, dict):
        return given.keys() == wanted.keys() and all(_same(given[k], wanted[k]) for k in wanted)
    return type(given) is type(wanted) and given == wanted
def _printed(given, wanted):
    lines = [[line.split() for line in text.rstrip().splitlines()] for text in (given, wanted)]
    def number(word):
        try:
            return float(word)
        except ValueError:
            return word
    def alike(g, w):
        return g == w or ("." in w or "e" in w) and _same(number(g), number(w))
    return len(lines[0]) == len(lines[1]) and all(
        len(g) == len(w) and all(map(alike, g, w)) for g, w in zip(*lines))
"""
_FUNCTION = """
for _case in _json.loads({cases}):
    assert _same({call}(*_case["input"]), _case["output"])
"""
_SCRIPT = """
for _case in _json.loads({cases}):
    assert _printed(run_script(_case["input"]), _case["output"])
"""
_REFERENCE = """
_names = {{"__name__": "reference"}}
exec({reference}, _names)
for _given in _json.loads({inputs}):
    _given = _ast.literal_eval(_given) if isinstance(_given, str) else _given
    _wanted = eval({call!r}, _names)(*_copy.deepcopy(_given))
    assert _same({call}(*_given), _wanted)
"""


def code_blocks(text: str) -> list[str]:
    """The contents of the closed fenced blocks in Python, or in no named language, in order.

    >>> code_blocks("So:\\n```Python3\\nx = 1\\n```\\n```sh\\nls\\n```")
    ['x = 1\\n']
    """
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if opened is None:
            opened, lines = fence, []
        elif fence and not fence[3] and fence[2].startswith(opened[2]):
            if _PYTHON.fullmatch(opened[3]):
                block = "".join(f"{each}\n" for each in lines)
                blocks.append(textwrap.dedent(block) if opened[1] else block)
            opened = None
        else:
            lines.append(line)
    return blocks


def tests_of(problem: Problem) -> str:
    """The whole program of tests."""
    meta = problem.meta
    cases, inputs = meta.get("cases", []), meta.get("extra_inputs", [])
    name = str(meta.get("entry_point", ""))
    call = name.replace("Solution.", "Solution().", 1)
    tests = [problem.answer, str(meta.get("extra_tests", ""))]
    if cases or inputs:
        tests.append(_HELPERS.format(near=float(meta.get("tolerance", 1e-6))))
    if cases:
        tests.append((_FUNCTION if name else _SCRIPT).format(cases=_written(cases), call=call))
    if inputs:
        reference = meta.get("prefix", "") + meta["reference"]
        tests.append(_REFERENCE.format(reference=repr(reference), inputs=_written(inputs), call=call))
    return "\n".join(tests)


def _written(value: Any) -> str:
    return repr(json.dumps(value))


def run_answer(problem: Problem, answer: str, *, unsafe: bool = False) -> Result:
    """The problem's tests, run against a program or the body that completes the problem's prompt."""
    prefix, name = problem.meta.get("prefix", ""), problem.meta.get("entry_point")
    program = prefix + answer
    if prefix and name and f"def {name}" in answer:  # the whole function, not its body alone
        program = f"{prefix}    pass\n\n{answer}"
    shadowed = tuple(problem.meta.get("shadowed", ()))
    script = bool(problem.meta.get("cases")) and not name
    return run_tests(program, tests_of(problem), shadowed=shadowed, script=script, unsafe=unsafe)
