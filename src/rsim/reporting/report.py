"""``rsim report RUN``: one HTML page, complete in itself, from the files of a run's or an evaluation's folder."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from rsim.errors import UserError
from rsim.reporting.charts import Series, area_chart, colour, line_chart

_EPISODES = 24  # shown, the newest first

_REWARDS = ("accuracy", "format", "follow", "terminal", "penalty")
_ENDINGS = ("terminated", "forced", "truncated", "reasoner_ended")


def _both(metric: str) -> dict[str, str]:
    """A metric of each agent."""
    return {f"{agent}/{metric}": agent for agent in ("planner", "reasoner")}


# (title, {metric: label}, unit) of every line chart; metrics that a run did not log are left out.
_CHARTS: list[tuple[str, dict[str, str], str]] = [
    ("Reward parts (batch mean)", {f"reward/{part}": part for part in _REWARDS}, ""),
    ("Return of each agent", _both("return"), ""),
    ("Entropy (nats per action)", _both("entropy"), ""),
    ("Lambda", {"lambda": "lambda"}, ""),
    ("Tokens per episode", {"length/sampled": "sampled", "length/injected": "injected"}, ""),
    ("Steps per episode", {"length/steps": "steps"}, ""),
    ("How episodes end", {f"flags/{flag}": flag.replace("_", " ") for flag in _ENDINGS}, "share"),
    ("Trainer / sampler ratio", _both("ratio"), ""),
    ("Clip fraction", _both("clip_fraction"), "share"),
    ("Groups of like returns", _both("alike_groups"), ""),
    ("Skipped groups", _both("skipped_groups"), ""),
    ("Gradient norm before clipping", _both("grad_norm"), ""),
    ("Sampled tokens per second", {"tokens_per_second": "tokens/s"}, ""),
]


def build_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page (default ``RUN/report.html``) and returns its path.

    Raises:
        UserError: ``run`` is no folder with metrics, a file in it is damaged, or the page cannot be written.
    """
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"no metrics in {run}", "give the folder of a run or of an evaluation")
    records = _json_lines(run / "metrics.jsonl")
    episodes = _json_lines(run / "episodes.jsonl")
    facts = _json(run / "run.json")
    table = _json(run / "table.json")
    title = str(facts.get("name") or run.resolve().name)
    table = table or _before_and_after(records)
    body = [_head(title, facts), _tiles(records), _table(table), _curves(records), _episodes(episodes)]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>rsim: {escape(title)}</title><style>{css}</style><main>{''.join(body)}</main></html>\n"
    )
    target = out or run / "report.html"
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
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged", error.msg) from error
    return read


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is damaged", error.msg) from error
    return records


def _head(title: str, facts: dict[str, Any]) -> str:
    shown = []
    if facts:
        shown = [f"seed {facts['seed']}", f"commit {facts['git_commit'][:10]}", f"started {facts['started']}"]
        shown += [f"{name} {version}" for name, version in facts["versions"].items()]
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
    best = max(row["accuracy"] for row in table["rows"])
    lines = []
    for row in table["rows"]:
        low, high, value = row["low"], row["high"], row["accuracy"]
        bar = f'<span><i style="left:{low:.1%};width:{high - low:.1%}"></i><b style="left:{value:.1%}"></b></span>'
        lines.append(
            f"<tr{' class=headline' if value == best else ''}><td>{escape(row['name'])}</td>"
            f'<td class="number">{value:.1%}</td><td class="range">{bar}</td>'
            f'<td class="number">{low:.1%} to {high:.1%}</td><td class="number">{row["flexible"]:.1%}</td>'
            f'<td class="number">{row["tokens_per_question"]:.1f}</td></tr>'
        )
    heads = ("", "accuracy", "95% bootstrap interval", "", "flexible", "tokens / question")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f'<h2>{escape(table["title"])}</h2><div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _curves(records: list[dict[str, Any]]) -> str:
    steps = [r for r in records if "accuracy" in r]
    held_out = [r for r in records if "eval/accuracy" in r]
    if not steps:
        return ""
    marks = _stage_starts(steps)
    band = tuple((r["step"], r["eval/accuracy_low"], r["eval/accuracy_high"]) for r in held_out)
    greedy = [(r["step"], r["eval/accuracy"]) for r in held_out]
    sampled = Series("sampled, training questions", [(r["step"], r["accuracy"]) for r in steps], colour(0))
    accuracy = [sampled, Series("greedy, held-out questions", greedy, colour(1), band, dots=True)]
    charts = [line_chart("Accuracy", accuracy, marks, "share"), _usage(steps, marks)]
    for title, metrics, unit in _CHARTS:
        series = [
            Series(label, [(r["step"], r[metric]) for r in steps if metric in r], colour(i))
            for i, (metric, label) in enumerate(metrics.items())
        ]
        charts.append(line_chart(title, series, marks, unit))
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


def _usage(steps: list[dict[str, Any]], marks: list[tuple[float, str]]) -> str:
    names = [key.removeprefix("strategy/") for key in steps[0] if key.startswith("strategy/")]
    rows = [(float(r["step"]), [r[f"strategy/{name}"] for name in names]) for r in steps] if names else []
    return area_chart("Strategy usage (share of steps)", names, rows, marks)


def _stage_starts(steps: list[dict[str, Any]]) -> list[tuple[float, str]]:
    marks: list[tuple[float, str]] = []
    for record in steps:
        if not marks or marks[-1][1] != record["stage"]:
            marks.append((record["step"], record["stage"]))
    return marks


def _episodes(episodes: list[dict[str, Any]]) -> str:
    if not episodes:
        return ""
    cards = [_episode(e, opened=i < 3) for i, e in enumerate(reversed(episodes[-_EPISODES:]))]
    hint = "Each step has its strategy's colour. The bars are the planner's probabilities; the outlined one was chosen."
    return f'<h2>Sampled episodes</h2><p class="hint">{hint}</p>{"".join(cards)}'


def _episode(episode: dict[str, Any], *, opened: bool) -> str:
    verdict = '<span class="right">right</span>' if episode["correct"] else '<span class="wrong">wrong</span>'
    said = "no answer" if episode["predicted"] is None else episode["predicted"]
    facts = f"step {episode['step']} · said {said} · gold {episode['answer']}"
    facts += "".join(f" · {flag.replace('_', ' ')}" for flag in episode["flags"])
    steps = "".join(_step(step, episode["names"]) for step in episode["steps"])
    return (
        f'<details class="episode"{" open" if opened else ""}><summary>{verdict}'
        f'<span class="question">{escape(episode["question"])}</span><span class="hint">{escape(facts)}</span></summary>'
        f'<ol class="steps">{steps}</ol></details>'
    )


def _step(step: dict[str, Any], names: list[str]) -> str:
    name = step["strategy"]
    shade = colour(names.index(name)) if name else "#7d8590"
    bars = ""
    if step["probabilities"]:
        bars = "".join(
            f'<i{" class=chosen" if label == name else ""} style="height:{p:.1%};background:{colour(i)}" '
            f'title="{escape(label)} {p:.1%}"></i>'
            for i, (label, p) in enumerate(zip(names, step["probabilities"], strict=True))
        )
        sure = f"{step['probabilities'][names.index(name)]:.0%}"
    else:
        sure = "forced" if step["forced"] else ""
    label = f'<div><div class="name">{escape(name or "reasoner")}</div><div class="hint">{sure}</div></div>'
    text = f'<div class="text">{escape(step["text"].strip())}</div>'
    return f'<li style="--c:{shade}">{label}{text}<div class="bars">{bars}</div></li>'
