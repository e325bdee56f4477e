"""Rules as a file beside a planner (``rules.toml``), and rules that are overridden by name."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from datetime import date

from rsim.errors import UserError
from rsim.rules import PlayRules
from rsim.settings import check_setting

RULE_FIELDS = tuple(f.name for f in dataclasses.fields(PlayRules))


def from_table(table: dict[str, object], where: str) -> PlayRules:
    """Rules from plain values; those that are not there are the defaults. Errors, `UserError`, name ``where``."""
    for name, value in table.items():
        if name not in RULE_FIELDS:
            raise UserError(f"{where}: there is no rule {name!r}", f"known: {', '.join(RULE_FIELDS)}")
        default = getattr(PlayRules, name)
        fits = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not fits:
            raise UserError(f"{where}: {name} = {value!r}", f"must be of type {type(default).__name__}")
        check_setting(PlayRules.__dataclass_fields__[name], value, f"{where}: {name}")
        if name == "paraphrase" and value not in ("random", "first"):
            raise UserError(f"{where}: paraphrase = {value!r}", "use random or first")
    if table.get("delimiter") == "":
        raise UserError(f"{where}: delimiter is empty", 'use e.g. "\\n\\n"')
    check_day(str(table.get("day", PlayRules.day)), f"{where}: day")
    return PlayRules(**table)  # type: ignore[arg-type]


def check_day(day: str, path: str) -> None:
    """Raises `UserError`, naming ``path``, where ``day`` is none."""
    try:
        date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"{path} = {day!r}", "write a day as YYYY-MM-DD") from error


def from_toml(text: str, where: str) -> PlayRules:
    """The rules that `to_toml` wrote. Raises `UserError` as `from_table` does, or for text that is no TOML."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML", str(error)) from error
    return from_table(table, where)


def to_toml(rules: PlayRules) -> str:
    """The rules as a file, saved beside a planner. JSON's strings, numbers and booleans are TOML's too."""
    return "".join(f"{name} = {json.dumps(getattr(rules, name))}\n" for name in RULE_FIELDS)


def overridden(rules: PlayRules, **changes: object) -> PlayRules:
    """``rules`` (or what extends them) as plain `PlayRules`, but for ``changes``, by name; what is None stays.

    Raises:
        UserError: there is no such rule, or its value is of the wrong type or out of range.
    """
    stated = {name: value for name, value in changes.items() if value is not None}
    return from_table({name: getattr(rules, name) for name in RULE_FIELDS} | stated, "rules")
