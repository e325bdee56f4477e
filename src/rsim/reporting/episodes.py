"""Episodes in a report: cards that can be searched and filtered, and the same question answered at several times or by several
runs, side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from typing import Any

from rsim.reporting.charts import colour

Episode = dict[str, Any]  # a line of episodes.jsonl

_SHOWN = 500  # cards of a page
_OPENED = 3
_HINT = "Each step has its strategy's colour; what the planner injected is underlined. The bars are its probabilities."


@dataclass(frozen=True)
class _Card:
    """``verdict`` and ``used``, the strategies, are what cards are filtered by."""

    verdict: str
    used: frozenset[str]
    summary: str
    body: str


def episodes_section(episodes: list[Episode]) -> str:
    """The episodes of a run, the newest first, or of an evaluation, in its order."""
    chosen = episodes if "index" in (episodes or [{}])[0] else episodes[::-1]
    cards = [_Card(_verdict(e), _used(e), _summary(e), _steps(e)) for e in chosen[:_SHOWN]]
    return _list("Episodes", _HINT, cards, len(episodes))


def pairs_section(title: str, columns: dict[str, list[Episode]]) -> str:
    """Every question that has an episode in each column (the last one counts), what was answered differently first."""
    latest = [{e["question"]: e for e in episodes} for episodes in columns.values()]
    shared = [q for q in latest[0] if all(q in column for column in latest)] if len(latest) > 1 else []
    rows = [[column[q] for column in latest] for q in shared]
    rows.sort(key=lambda row: len({e["correct"] for e in row}) == 1)
    cards = []
    for row in rows[:_SHOWN]:
        shown = "".join(
            f'<div><h3>{escape(label)}</h3><p class="hint">{escape(_facts(e))}</p>{_steps(e)}</div>'
            for label, e in zip(columns, row, strict=True)
        )
        summary = f'<span class="question">{escape(row[0]["question"])}</span>'
        verdict, used = " → ".join(map(_verdict, row)), frozenset[str]().union(*map(_used, row))
        cards.append(_Card(verdict, used, summary, f'<div class="pair">{shown}</div>'))
    return _list(title, f"{' → '.join(columns)}. {_HINT}", cards, len(rows))


def before_and_after(episodes: list[Episode]) -> str:
    """The held-out questions whose episodes a run has kept: at its first evaluation and at its last."""
    held_out = [e for e in episodes if e.get("held_out")]
    steps = sorted({e["step"] for e in held_out})
    if len(steps) < 2:
        return ""
    columns = {f"step {step}": [e for e in held_out if e["step"] == step] for step in (steps[0], steps[-1])}
    return pairs_section("Before and after, the same questions", columns)


def _list(title: str, hint: str, cards: list[_Card], total: int) -> str:
    if not cards:
        return ""
    verdicts = Counter(card.verdict for card in cards)
    names = Counter(name for card in cards for name in card.used)
    with_right = Counter(name for card in cards for name in card.used if card.verdict == "right")
    paired = any("→" in verdict for verdict in verdicts)
    used = {
        name: f"{name} ({count})" if paired else f"{name} ({with_right[name]} of {count} right)"
        for name, count in names.items()
    }
    controls = (
        '<label>Search <input type="search" class="find"></label>'
        + _select("Answer", "verdict", {verdict: f"{verdict} ({count})" for verdict, count in verdicts.items()})
        + _select("Strategy", "used", dict(sorted(used.items())))
    )
    count = f'<span class="count" role="status" data-of="{total:,}">{len(cards):,} of {total:,} shown</span>'
    made = "".join(
        f'<details class="episode" data-verdict="{escape(card.verdict)}" data-used="{escape("|".join(sorted(card.used)))}"'
        f'{" open" if i < _OPENED else ""}><summary><span class="{card.verdict.split()[-1]}">{escape(card.verdict)}</span>'
        f"{card.summary}</summary>{card.body}</details>"
        for i, card in enumerate(cards)
    )
    head = f'<h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p><p class="controls">{controls}{count}</p>'
    return f'<section class="list">{head}{made}</section>'


def _select(label: str, kind: str, options: dict[str, str]) -> str:
    made = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items())
    return f'<label>{label} <select class="{kind}"><option value="">all</option>{made}</select></label>'


def _verdict(episode: Episode) -> str:
    return "right" if episode["correct"] else "wrong"


def _used(episode: Episode) -> frozenset[str]:
    return frozenset(step["strategy"] for step in episode["steps"] if step["strategy"])


def _facts(episode: Episode) -> str:
    said = "no answer" if episode["predicted"] is None else f"said {episode['predicted']}"
    about = [said, f"gold {episode['answer']}", *(flag.replace("_", " ") for flag in episode["flags"])]
    return " · ".join(about)


def _summary(episode: Episode) -> str:
    where = f"question {episode['index'] + 1}" if "index" in episode else f"step {episode['step']}"
    held_out = " · held-out, greedy" if episode.get("held_out") else ""
    return (
        f'<span class="question">{escape(episode["question"])}</span>'
        f'<span class="hint">{escape(f"{where}{held_out} · {_facts(episode)}")}</span>'
    )


def _steps(episode: Episode) -> str:
    return f'<ol class="steps">{"".join(_step(step, episode["names"]) for step in episode["steps"])}</ol>'


def _step(step: dict[str, Any], names: list[str]) -> str:
    name = step["strategy"]
    shade = colour(names.index(name)) if name else "#7d8590"
    bars, sure = "", "forced" if step["forced"] else ""
    if step["probabilities"]:
        shares = dict(zip(names, step["probabilities"], strict=True))
        told = ", ".join(f"{label} {p:.1%}" for label, p in shares.items())
        drawn = "".join(
            f'<i{" class=chosen" if label == name else ""} style="height:{p:.1%};background:{colour(i)}" '
            f'title="{escape(label)} {p:.1%}"></i>'
            for i, (label, p) in enumerate(shares.items())
        )
        bars, sure = f'<div class="bars" role="img" aria-label="{escape(told)}">{drawn}</div>', f"{shares[name]:.0%}"
    prompt = f"<em>{escape(step['prompt'].lstrip())}</em>" if step.get("prompt") else ""  # older runs kept none
    said = step["text"].rstrip() if prompt else step["text"].strip()
    text = f'<div class="text">{prompt}{escape(said)}</div>'
    return (
        f'<li style="--c:{shade}"><div><div class="name">{escape(name or "reasoner")}</div>'
        f'<div class="hint">{sure}</div></div>{text}{bars}</li>'
    )
