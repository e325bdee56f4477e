"""Fields of dataclasses that say what they mean and which values they may have."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rsim.errors import UserError, first_line

T = TypeVar("T")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def setting(default: T, help: str, **limits: float | str) -> T:
    """A field with its help and, in ``limits``, what `check_setting` holds it to: ``at_least``, ``above``, ``at_most``,
    ``below``, and a ``remedy`` in place of the usual one; an ``unbounded`` field may be infinite."""
    kept: Any = dataclasses.field(default=default, metadata={"help": help, **limits})
    return typing.cast(T, kept)


def check_setting(field: dataclasses.Field[Any], value: Any, path: str) -> None:
    """Raises `UserError`, naming ``path``, where ``value`` is out of the field's range, or no finite number."""
    limits = field.metadata
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and "unbounded" not in limits)):
        raise UserError(f"{path} = {value}", "must be a finite number")
    if any(name in limits and not holds(value, limits[name]) for name, holds in _HOLDS.items()):
        raise UserError(f"{path} = {value}", limits.get("remedy") or _range(limits))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a file; a byte order mark before it is skipped. Raises `UserError` where it is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML", first_line(error)) from error


def _range(limits: Mapping[str, Any]) -> str:
    low, high = limits.get("at_least", limits.get("above")), limits.get("at_most", limits.get("below"))
    if low is not None and high is not None:
        return f"must lie between {low} and {high}"
    return f"must be above {low}" if "above" in limits else f"must be at least {low}"


def flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A table's values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return found


def to_table(config: Any) -> dict[str, Any]:
    """The inverse of `rsim.config.from_table`: plain dicts, lists and values, keys as written in TOML."""
    table: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        key = f.name.rstrip("_")
        if dataclasses.is_dataclass(value):
            table[key] = to_table(value)
        elif isinstance(value, tuple):
            table[key] = [to_table(v) if dataclasses.is_dataclass(v) else v for v in value]
        else:
            table[key] = value
    return table


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)  # JSON's strings are TOML's too
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {literal(one)}" for key, one in value.items()) + "}"
    return repr(float(value)) if isinstance(value, float) else repr(value)  # NumPy's would say that it is NumPy's
