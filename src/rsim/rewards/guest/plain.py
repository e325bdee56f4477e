"""Third-party verifiers hand answers to ``eval`` and to sympy's parser; here both take plain data and
formulas only.

No text of an answer ever runs as code in the process that judges it. Code that did could say "right" for
itself, whatever walls stand around the process.
"""

from __future__ import annotations

import ast
import sys
from typing import Any


def _nodes(names: str) -> tuple[type[ast.AST], ...]:
    return tuple(vars(ast)[name] for name in names.split())


_DATA = _nodes(
    "Expression Constant List Tuple Set Dict Load UnaryOp UAdd USub Invert BinOp Add Sub Mult Div FloorDiv "
    "Mod LShift RShift BitAnd BitOr BitXor"
)
_FORMULA = (*_DATA, *_nodes("Pow Compare Eq NotEq Lt LtE Gt GtE Name Call"))
# What sympy's own parser writes around texts, and what a formula may call beside sympy's functions.
_MAKERS = frozenset("Symbol Function Integer Float Rational".split())  # noqa: SIM905
_HELPERS = frozenset("sqrt cbrt root real_root factorial binomial abs Abs max min Max Min".split())  # noqa: SIM905


class NotPlainError(ValueError):
    """The text is more than data or a formula."""


def data(text: Any, *_: Any) -> Any:
    """Stands in for ``eval``: numbers, texts, their lists, tuples, sets and dicts, and arithmetic on them; no
    names.

    Raises:
        NotPlainError: anything else.
    """
    tree = _parsed(text)
    for node in ast.walk(tree):
        if not isinstance(node, _DATA):
            raise NotPlainError(type(node).__name__)
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})


def check_formula(code: str, names: dict[str, Any], more_names: dict[str, Any]) -> None:
    """What sympy's parser is about to evaluate may call mathematical functions on numbers, symbols and
    formulas.

    Args:
        names: what a name means to the parser; ``more_names`` is asked first.

    Raises:
        NotPlainError: an attribute, an index, a text outside ``Symbol('x')``, another function, a keyword
            argument, ...
    """
    tree = _parsed(code)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {call.func for call in calls}
    texts = {argument for call in calls if _name(call.func) in _MAKERS for argument in call.args}
    for node in ast.walk(tree):
        if not isinstance(node, _FORMULA):
            raise NotPlainError(type(node).__name__)
        if isinstance(node, ast.Call) and (node.keywords or not _may_be_called(node.func)):
            raise NotPlainError("call")
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and node not in texts:
            raise NotPlainError("text")
        if isinstance(node, ast.Name):
            meaning = more_names.get(node.id, names.get(node.id))
            if not (_is_function(node.id, meaning) if node in called else _is_value(meaning)):
                raise NotPlainError(node.id)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _may_be_called(function: ast.expr) -> bool:
    """A name, or ``Function('f')``."""
    return bool(_name(function)) or (isinstance(function, ast.Call) and _name(function.func) == "Function")


def _is_function(name: str, meaning: Any) -> bool:
    from sympy.core.function import FunctionClass  # type: ignore[import-untyped,unused-ignore]

    return name in _MAKERS or name in _HELPERS or isinstance(meaning, FunctionClass)


def _is_value(meaning: Any) -> bool:
    from sympy import Basic  # type: ignore[import-untyped,unused-ignore]

    return isinstance(meaning, Basic)


def _parsed(text: Any) -> ast.Expression:
    """The tree of an expression; anything else raises `NotPlainError`."""
    if not isinstance(text, str):
        raise NotPlainError(type(text).__name__)
    try:
        return ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise NotPlainError("syntax") from error


def guard_sympy() -> None:
    """Every text that sympy parses (``parse_expr``, ``sympify`` and all that call them) passes
    `check_formula` first."""
    from sympy.parsing import sympy_parser  # type: ignore[import-untyped,unused-ignore]

    write_code = sympy_parser.stringify_expr

    def checked(text: str, local_dict: Any, global_dict: Any, transformations: Any) -> str:
        code: str = write_code(text, local_dict, global_dict, transformations)
        check_formula(code, global_dict, local_dict)
        return code

    sympy_parser.stringify_expr = checked


def guard_evaluation(packages: tuple[str, ...]) -> None:
    """In all modules of ``packages`` ``eval`` is `data`; if they find another way to run a text, it is
    refused."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            vars(module)["eval"] = data

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "exec" and sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] in packages:
            raise NotPlainError("exec")

    sys.addaudithook(refuse)
