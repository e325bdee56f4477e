"""Draws one planned episode of a run as an SVG, for the README.

Takes the right answer that used the most different strategies, the newest among equals.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from rsim.reporting.charts import colour
from studies.ledger import Row

_ROW, _TOP, _WIDTH = 46, 64, 860


ISSUE = 1


def run(folder: Path, out: Path = Path("docs/episode.svg")) -> list[Row]:
    """Draws an episode of the run in ``folder``; measures nothing."""
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()]
    right = [e for e in episodes if e["correct"] and "forced" not in e["flags"]]
    chosen = max(enumerate(right), key=lambda pair: (len({s["strategy"] for s in pair[1]["steps"]}), pair[0]))[1]
    out.write_text(draw(chosen), encoding="utf-8")
    return []


def draw(episode: dict[str, Any]) -> str:
    height = _TOP + _ROW * len(episode["steps"]) + 14
    body = _text(20, 38, episode["question"], "question")
    for index, step in enumerate(episode["steps"]):
        body += _step(step, episode["names"], _TOP + _ROW * index)
    style = (
        "text{font-family:ui-sans-serif,system-ui,sans-serif;fill:#1c1f24}"
        ".question{font-size:19px;font-weight:650}.name{font-size:14px;font-weight:650}"
        ".step{font-size:15px;font-family:ui-monospace,monospace}.share{font-size:12px}"
    )
    card = f'<rect width="{_WIDTH}" height="{height}" rx="12" fill="#fbfaf8" stroke="#e2e0db"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
        f"<style>{style}</style>{card}{body}</svg>\n"
    )


def _step(step: dict[str, Any], names: list[str], top: int) -> str:
    shade = colour(names.index(step["strategy"]))
    drawn = f'<rect x="16" y="{top}" width="{_WIDTH - 32}" height="{_ROW - 6}" rx="6" fill="{shade}" opacity="0.10"/>'
    drawn += f'<rect x="16" y="{top}" width="5" height="{_ROW - 6}" fill="{shade}"/>'
    drawn += f'<text x="34" y="{top + 25}" class="name" style="fill:{shade}">{escape(step["strategy"])}</text>'
    drawn += _text(166, top + 25, step["text"].strip(), "step")
    probabilities = step["probabilities"] or []
    for i, p in enumerate(probabilities):
        tall = max(2.0, 30 * p)
        x = _WIDTH - 180 + 13 * i
        drawn += f'<rect x="{x}" y="{top + 35 - tall:.1f}" width="10" height="{tall:.1f}" fill="{colour(i)}"/>'
    if probabilities:
        drawn += _text(_WIDTH - 56, top + 25, f"{probabilities[names.index(step['strategy'])]:.0%}", "share")
    return drawn


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>'
