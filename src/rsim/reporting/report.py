"""``rsim report``: one HTML page, complete in itself, from the files of the folders of runs and evaluations."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rsim.errors import UserError, first_line
from rsim.reporting.curves import charts_section
from rsim.reporting.episodes import Episode, before_and_after, episodes_section, pairs_section
from rsim.reporting.settings import settings_of, settings_section
from rsim.runs.folder import json_lines
from rsim.settings import read_toml


@dataclass(frozen=True)
class _Run:
    """What a run's or an evaluation's folder holds."""

    name: str
    records: list[dict[str, Any]]
    episodes: list[Episode]
    facts: dict[str, Any]
    table: dict[str, Any]
    settings: dict[str, str]


def build_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page (default ``RUN/report.html``) and returns its path.

    Raises:
        UserError: ``run`` is no folder with metrics, a file in it is damaged, or the page cannot be written.
    """
    read = _read(run, "")
    title = str(read.facts.get("name") or read.name)
    body = [
        *(_head(title, read.facts), _tiles(read.records), _table(read.table)),
        *(charts_section({read.name: read.records}), settings_section({read.name: read.settings})),
        *(before_and_after(read.episodes), episodes_section(read.episodes)),
    ]
    return _write(title, body, out or run / "report.html")


def build_comparison(runs: list[Path], out: Path | None = None) -> Path:
    """Writes a page about several runs or evaluations (default: ``comparison.html`` in the first one's folder).

    Raises:
        UserError: as `build_report`.
    """
    folders = [run.resolve() for run in runs]
    alike = len({folder.name for folder in folders}) < len(folders)  # evaluations are all called "eval"
    read = [_read(run, f"{f.parent.name}/{f.name}" if alike else f.name) for run, f in zip(runs, folders, strict=True)]
    if len({run.name for run in read}) < len(read):
        raise UserError(f"{', '.join(map(str, runs))} name one folder twice", "name each once")
    rows = [row | {"name": f"{run.name}: {row['name']}"} for run in read for row in run.table.get("rows", [])]
    titles = dict.fromkeys(run.table["title"] for run in read if run.table)
    title = " and ".join(run.name for run in read)
    body = [
        *(_head(title, {}), _table({"title": "; ".join(titles), "rows": rows} if rows else {})),
        *(settings_section({run.name: run.settings for run in read}), charts_section({r.name: r.records for r in read})),
        pairs_section("The same questions", {run.name: _counted(run.episodes) for run in read}),
    ]
    return _write(title, body, out or runs[0] / "comparison.html")


def _read(run: Path, name: str) -> _Run:
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"no metrics in {run}", "give the folder of a run or of an evaluation")
    records = json_lines(run / "metrics.jsonl")
    config = run / "config.toml"
    return _Run(
        name or run.resolve().name,
        records,
        json_lines(run / "episodes.jsonl") if (run / "episodes.jsonl").is_file() else [],
        _json(run / "run.json"),
        _json(run / "table.json") or _before_and_after(records),
        settings_of(read_toml(config) if config.is_file() else {}, _json(run / "settings.json")),
    )


def _counted(episodes: list[Episode]) -> list[Episode]:
    """Of several samples of a question in an evaluation the one that counts."""
    from rsim.evaluation.evaluate import vote  # loads torch, which a page about one run does without

    samples: dict[tuple[int, str], list[Episode]] = defaultdict(list)
    for number, episode in enumerate(episodes):
        samples[episode.get("index", number), episode["question"]].append(episode)
    return [vote(one) for one in samples.values()]


def _write(title: str, body: list[str], target: Path) -> Path:
    css, script = (Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>rsim: {escape(title)}</title><style>{css}</style><main>{''.join(body)}</main>"
        f"<script>{script}</script></html>\n"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}", error.strerror or str(error)) from error
    return target


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged", first_line(error)) from error
    return read


def _head(title: str, facts: dict[str, Any]) -> str:
    shown = []
    if facts:
        shown = [f"seed {facts['seed']}", f"commit {facts['git_commit'][:10]}", f"started {facts['started']}"]
        shown += [f"{name} {version}" for name, version in facts["versions"].items()]
        shown += [f"changed after step {change['step']}: {', '.join(change['keys'])}" for change in facts.get("changed", [])]
    return f'<h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(shown))}</p>'


def _tiles(records: list[dict[str, Any]]) -> str:
    held_out = [r for r in records if "eval/accuracy" in r]
    steps = [r for r in records if "accuracy" in r]
    tiles = []
    if len(held_out) > 1:
        tiles.append((f"{held_out[0]['eval/accuracy']:.1%} → {held_out[-1]['eval/accuracy']:.1%}", "held-out accuracy, greedy"))
        tiles.append((f"{max(r['eval/accuracy'] for r in held_out):.1%}", "best held-out accuracy"))
    elif held_out:
        tiles.append((f"{held_out[0]['eval/accuracy']:.1%}", "held-out accuracy"))
    if steps:
        tiles.append((f"{steps[-1]['step']:,}", "training steps"))
        tiles.append((f"{steps[-1]['sampled_tokens']:,}", "reasoner tokens sampled"))
        tiles.append((f"{sum(r['seconds'] for r in steps):,.0f} s", "in training steps"))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _before_and_after(records: list[dict[str, Any]]) -> dict[str, Any]:
    """A table in the form of ``table.json`` from the held-out evaluations of a run that has none."""
    held_out = [r for r in records if "eval/accuracy" in r]
    if len(held_out) < 2:
        return {}
    best = max(held_out, key=lambda r: r["eval/accuracy"])
    shown = {
        "before training": held_out[0],
        f"best, step {best['step']}": best,
        f"last, step {held_out[-1]['step']}": held_out[-1],
    }
    keys = {
        "accuracy": "accuracy",
        "low": "accuracy_low",
        "high": "accuracy_high",
        "flexible": "flexible",
        "tokens_per_question": "tokens",
    }
    rows = [{"name": name} | {key: r[f"eval/{metric}"] for key, metric in keys.items()} for name, r in shown.items()]
    return {"title": "Before and after, held-out questions, greedy", "rows": rows}


def _table(table: dict[str, Any]) -> str:
    if not table:
        return ""
    lines = []
    for row in table["rows"]:
        low, high, value = row["low"], row["high"], row["accuracy"]
        bar = f'<span><i style="left:{low:.1%};width:{high - low:.1%}"></i><b style="left:{value:.1%}"></b></span>'
        lines.append(
            f"<tr{' class=headline' if 'rSIM' in row['name'] else ''}><td>{escape(row['name'])}</td>"
            f'<td class="number">{value:.1%}</td><td class="range">{bar}</td>'
            f'<td class="number">{low:.1%} to {high:.1%}</td><td class="number">{row["flexible"]:.1%}</td>'
            f'<td class="number">{row["tokens_per_question"]:.1f}</td></tr>'
        )
    heads = (
        "<th class=number>accuracy",
        "<th class=range>",
        "<th class=number>95% bootstrap interval",
        "<th class=number>flexible",
        "<th class=number>tokens / question",
    )
    head = "<th></th>" + "".join(f"{h}</th>" for h in heads)
    return f'<h2>{escape(table["title"])}</h2><div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
