"""What a run or an evaluation was made with, as a table in a report."""

from __future__ import annotations

from html import escape
from typing import Any

from rsim.config import Config
from rsim.settings import flat, to_table

# Shown in any case; other keys of a config where they are not as usual.
_FIRST = ("models.reasoner", "models.planner", "models.strategies", "data.train", "data.eval", "stages", "rewards.accuracy")
_ELSEWHERE = ("strategies", "data_written")  # of an evaluation's settings: a whole file, a time


def settings_of(config: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, str]:
    """Keys and values as texts, in the order of ``config`` (a run's config.toml) or ``evaluation`` (its settings.json)."""
    means = {k: v for k, v in evaluation.get("means", {}).items() if k not in _ELSEWHERE}
    told = {k: v for k, v in evaluation.items() if k not in ("means", "models")}
    settings = {k: v for k, v in {**config, **told, **means}.items() if k not in ("name", "out")}
    return {key: _text(value) for key, value in flat(settings).items()}


def settings_section(runs: dict[str, dict[str, str]]) -> str:
    """Models, data, stages and what is not as usual, and behind a fold all else; of several runs, what they differ in."""
    keys = list(dict.fromkeys(key for settings in runs.values() for key in settings))
    if not keys:
        return ""
    if len(runs) > 1:
        shown = [key for key in keys if len({settings.get(key, "") for settings in runs.values()}) > 1]
        title = "Settings that differ"
    else:
        usual = {key: _text(value) for key, value in flat(to_table(Config())).items()}
        shown = [key for key in keys if key in _FIRST or any(s[key] != usual.get(key, "") for s in runs.values())]
        title = "Settings"
    more = f"<details><summary>All settings</summary>{_table(keys, runs)}</details>"
    return f"<h2>{title}</h2>{_table(shown, runs) if shown else '<p>none</p>'}{more}"


def _table(keys: list[str], runs: dict[str, dict[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in runs) if len(runs) > 1 else ""
    lines = [f"<tr><th></th>{head}</tr>"] if head else []
    for key in keys:
        cells = "".join(f"<td>{escape(settings.get(key, '')) or '—'}</td>" for settings in runs.values())
        name = escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="settings">{"".join(lines)}</table></div>'


def _text(value: Any) -> str:
    """A setting for people: a list of tables (the stages) has a line for each."""
    if isinstance(value, list):
        tables = any(isinstance(entry, dict) for entry in value)
        return ("\n" if tables else ", ").join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)
